"""Costs of batches -> a shard: the run of neighbouring batches that a replica pulls next.

Does not know what a batch holds nor who pulls it.
"""

from collections.abc import Iterable


def shard_size(costs: Iterable[float], *, remaining: float, share: float) -> int:
    """Return how many of the next batches a replica pulls: at least one if there is one.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987) with half its chunk: a shard is the
    replica's share of half of what is left. The first shards are large, the last are single
    batches, so a slow replica delays the end by at most one batch; a faster one pulls more.

    Args:
        costs: of the batches that wait, in their order, any unit.
        remaining: the cost of all batches that nobody has pulled.
        share: the replica's part of the speed of all, above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"A share lies above 0 and at most at 1. Received: share={share}")
    target, size, total = remaining * share / 2, 0, 0.0
    for cost in costs:
        total += cost
        if size and total > target:
            break
        size += 1
    return size
