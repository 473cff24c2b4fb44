"""Token lengths and padded lengths -> batches under a token budget, longest rows first.

Rows are known by their position in the test set only. Does not know devices or replicas.
"""

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
    lengths: np.ndarray, *, buckets: tuple[int, ...], max_tokens_per_batch: int
) -> Plan:
    """Return every row in exactly one batch, longest first; ties go by row.

    A batch takes its padded length from its longest row and as many of the next rows as the
    budget allows, at least one. There is at most one shape for each bucket: only the last batch
    can be short of rows, and it gets a shape of its own where no earlier batch had its length.

    Args:
        lengths: (rows,) token counts.
        buckets: padded lengths, ascending; the last holds the longest row.
        max_tokens_per_batch: rows x padded length of a batch, except where one row alone is more.
    """
    if max_tokens_per_batch < 1:
        raise ValueError(
            "max_tokens_per_batch must be positive. "
            f"Received: max_tokens_per_batch={max_tokens_per_batch}"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((np.arange(lengths.size), -lengths))
    padded = bucket_of(lengths, buckets)[order] if lengths.size else order
    batches: list[Batch] = []
    shapes: dict[int, BatchShape] = {}
    start = 0
    while start < order.size:
        length = int(padded[start])
        rows = tuple(order[start : start + max(1, max_tokens_per_batch // length)].tolist())
        shape = shapes.setdefault(length, BatchShape(len(rows), length))
        batches.append(Batch(len(batches), rows, shape))
        start += len(rows)
    return Plan(tuple(batches), tuple(shapes.values()), int(lengths.sum()))
