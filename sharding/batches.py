"""Token lengths and padded lengths -> batches under a token budget, longest rows first.

A row is its position in the test set. Does not know devices or replicas.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sharding.buckets import bucket_of


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """The shape that a function is compiled for: `rows` rows padded to `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are computed together. If `shape.rows` exceeds `len(rows)`, the rest is filler."""

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
    def padded_tokens(self) -> int:
        """All computed tokens, including padding and filler rows."""
        return sum(batch.shape.tokens for batch in self.batches)


def plan_batches(
    lengths: np.ndarray,
    *,
    buckets: tuple[int, ...],
    max_tokens_per_batch: int,
    rows: np.ndarray | None = None,
    known: Iterable[BatchShape] = (),
) -> Plan:
    """Return batches that have each row exactly once, longest first; ties are ordered by row.

    A batch's padded length is the bucket of its longest row, and it takes as many of the following
    rows as its shape holds. Each bucket has at most one shape, with as many rows as the budget
    allows. It has up to a quarter fewer if fewer rows of the next bucket then end up in the last
    batch, where they would be padded further than necessary. Only the last batch may have filler.

    Args:
        lengths: (rows,) token counts.
        buckets: padded lengths, ascending; the last holds the longest row.
        max_tokens_per_batch: the limit for rows x padded length; a longer single row is allowed.
        rows: the row of each length, ascending; None for all rows.
        known: compiled shapes: batches of their lengths keep their number of rows.
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
    """Return the rows of a bucket's batches, so that the last one is as full as possible."""
    if in_bucket < most:
        return in_bucket
    return min(range(most, most - most // 4 - 1, -1), key=lambda rows: -in_bucket % rows)
