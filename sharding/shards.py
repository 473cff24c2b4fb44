"""Costs of batches -> shards: runs of neighbouring batches that replicas pull, large ones first.

Does not know what a batch holds nor who pulls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """Batches `start` up to, not including, `stop` of the plan."""

    start: int
    stop: int


def cut_shards(costs: Sequence[float], replicas: int) -> tuple[Shard, ...]:
    """Cut the batches into shards of falling cost, so that replicas end together.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987) with half its chunk: a shard is the
    share of one replica in half of what is left, at least one batch. The first shards are large,
    the last are single batches, so a slow replica delays the end by at most one batch.

    Args:
        costs: one positive number a batch, any unit.
        replicas: how many will pull.
    """
    if replicas < 1:
        raise ValueError(f"At least one replica must pull. Received: replicas={replicas}")
    remaining = float(sum(costs))
    shards: list[Shard] = []
    start = 0
    while start < len(costs):
        target = remaining / (2 * replicas)
        stop, cost = start + 1, costs[start]
        while stop < len(costs) and cost + costs[stop] <= target:
            cost += costs[stop]
            stop += 1
        shards.append(Shard(start, stop))
        remaining -= cost
        start = stop
    return tuple(shards)
