"""Token lengths, a model's dimensions and a number of replicas -> the batches of a run.

Chooses padded lengths and fills batches; `buckets.py` and `batches.py` do the arithmetic.
"""

from collections.abc import Sequence

import numpy as np

from sharding.batches import BatchShape, Plan, plan_batches
from sharding.buckets import choose_buckets
from sharding.costs import ModelShape
from sharding.kinds import KINDS


def plan_rows(
    lengths: np.ndarray,
    shape: ModelShape,
    *,
    kind: str,
    replicas: int,
    sequence_length: int,
    sees_padding: bool,
    budget: int,
    rows: Sequence[int] | None = None,
    cap: int | None = None,
    known: Sequence[BatchShape] = (),
) -> Plan:
    """Return the batches for these rows on this many replicas and this kind of device.

    Args:
        lengths: int64 (rows,), tokens of each row.
        sees_padding: whether padding changes the answer. If so, every row is padded to the sequence
            length, else to the shortest bucket that holds it.
        budget: the maximum number of padded tokens per batch.
        rows: the rows to plan, None for all.
        cap: the length to truncate rows to if time is short.
        known: compiled shapes to reuse instead of new ones.
    """
    chosen = np.arange(len(lengths)) if rows is None else np.asarray(rows, dtype=np.int64)
    limit = sequence_length if cap is None else min(cap, sequence_length)
    needed = np.minimum(lengths[chosen], limit)
    if sees_padding:
        buckets: tuple[int, ...] = (limit,)
    elif known:
        buckets = tuple(sorted({one.length for one in known if one.length < limit} | {limit}))
    else:
        buckets = choose_buckets(
            needed,
            sequence_length=limit,
            cost=lambda length: shape.batch_flops(BatchShape(1, length)),
            cost_of_shape=shape.compile_flops(kind, replicas),
            multiple_of=KINDS[kind].bucket_multiple,
        )
    return plan_batches(
        needed, buckets=buckets, max_tokens_per_batch=budget, rows=chosen, known=known
    )
