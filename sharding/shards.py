"""Costs of batches -> the size of a shard: how many batches a replica pulls at once.

Does not know batches or replicas.
"""

from collections.abc import Iterable


def shard_size(costs: Iterable[float], *, remaining: float, share: float) -> int:
    """Return how many of the waiting batches a replica pulls: at least one, if there is one.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987) with half its chunk: a shard is the
    replica's share of half of the remaining work. Early shards are large and the last ones are
    single batches, so a slow replica delays the end by at most one batch.

    Args:
        costs: of the waiting batches, in their order, in any unit.
        remaining: the cost of all batches that no replica has pulled.
        share: the replica's share of the total speed, above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"A share must be above 0 and at most 1. Received: share={share}")
    target, size, total = remaining * share / 2, 0, 0.0
    for cost in costs:
        total += cost
        if size and total > target:
            break
        size += 1
    return size
