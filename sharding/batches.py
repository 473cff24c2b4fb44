"""Token lengths and padded lengths -> batches under a token budget, longest rows first.

Rows are known by their position in the test set only. Does not know devices or replicas.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sharding.buckets import bucket_of


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """What a compiled function is made for: `rows` rows padded to `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are computed together. `shape.rows` may exceed `len(rows)`: the rest is filler."""

    index: int
    rows: tuple[int, ...]
    shape: BatchShape


@dataclass(frozen=True, slots=True)
class Plan:
    """All batches in the order of work, and the shapes to compile in the order of first use."""

    batches: tuple[Batch, ...]
    shapes: tuple[BatchShape, ...]
    real_tokens: int

    @property
    def num_rows(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding and filler rows included."""
        return sum(batch.shape.tokens for batch in self.batches)


def plan_batches(
    lengths: np.ndarray,
    *,
    buckets: tuple[int, ...],
    max_tokens_per_batch: int,
    rows: np.ndarray | None = None,
    known: Iterable[BatchShape] = (),
) -> Plan:
    """Return every row in exactly one batch, longest first; ties go by row.

    A batch takes its padded length from its longest row and as many of the next rows as its shape
    holds. There is one shape at most for each bucket, of as many rows as the budget allows, or up
    to a quarter fewer if that leaves less of a last batch to rows of the next bucket, which
    are padded further there than they need. Only the very last batch can be short of rows.

    Args:
        lengths: (rows,) token counts.
        buckets: padded lengths, ascending; the last holds the longest row.
        max_tokens_per_batch: rows x padded length of a batch, except if one row alone is more.
        rows: the row of each length, ascending; None if they are all rows.
        known: shapes that are compiled already: their lengths keep their rows.
    """
    if max_tokens_per_batch < 1:
        raise ValueError(
            "max_tokens_per_batch must be positive. "
            f"Received: max_tokens_per_batch={max_tokens_per_batch}"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = np.arange(lengths.size) if rows is None else rows
    order = np.lexsort((rows, -lengths))
    padded = bucket_of(lengths, buckets)[order] if lengths.size else order
    batches: list[Batch] = []
    shapes: dict[int, BatchShape] = {}
    compiled = {shape.length: shape for shape in known if shape.tokens <= max_tokens_per_batch}
    start = 0
    while start < order.size:
        length = int(padded[start])
        if length not in shapes:
            in_bucket = int(np.count_nonzero(padded[start:] == length))
            most = max(1, max_tokens_per_batch // length)
            fresh = BatchShape(_rows_of(in_bucket, most), length)
            shapes[length] = compiled.get(length, fresh)
        members = tuple(rows[order[start : start + shapes[length].rows]].tolist())
        batches.append(Batch(len(batches), members, shapes[length]))
        start += len(members)
    return Plan(tuple(batches), tuple(shapes.values()), int(lengths.sum()))


def _rows_of(in_bucket: int, most: int) -> int:
    """Return the rows of a bucket's batches: those that leave the least of the last one over."""
    if in_bucket < most:
        return in_bucket
    return min(range(most, most - most // 4 - 1, -1), key=lambda rows: -in_bucket % rows)
