"""Layers -> pipeline stages: runs of consecutive layers, one run for each device.

Time and memory are separate: an embedding of 256,000 rows is large but takes no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class StageLayers:
    """Decoder layers from `start` up to but not including `stop`, and the size of their weights.

    The first stage also holds the token embedding; the last holds the final norm and the head.
    """

    start: int
    stop: int
    weight_bytes: int


def cut_stages(
    costs: Sequence[float],
    weight_bytes: Sequence[int],
    num_stages: int,
    *,
    first_bytes: int = 0,
    last_bytes: int = 0,
    max_bytes: int | None = None,
) -> tuple[StageLayers, ...]:
    """Cut layers into `num_stages` runs so that the slowest stage is as fast as possible.

    Of equally fast cuts, return the one whose largest stage is smallest; the result is
    deterministic. Dynamic programming takes O(num_stages * layers^2), once for time and once for
    size.

    Args:
        costs: time of each layer, any unit.
        weight_bytes: bytes of each layer's weights.
        first_bytes, last_bytes: of other weights in the first and the last stage.
        max_bytes: the weights that a device can hold; None for no limit.

    Raises:
        ValueError: fewer layers than stages, or no cut keeps every stage under `max_bytes`.
    """
    layers = len(costs)
    if not 1 <= num_stages <= layers:
        raise ValueError(
            f"--strategy pipeline: Each stage needs a layer and there are {layers}. "
            f"Received: --group-size {num_stages}"
        )

    def held(start: int, stop: int) -> int:
        ends = (first_bytes if start == 0 else 0) + (last_bytes if stop == layers else 0)
        return sum(weight_bytes[start:stop]) + ends

    def cost(start: int, stop: int) -> float:
        return sum(costs[start:stop])

    def fits(start: int, stop: int) -> bool:
        return max_bytes is None or held(start, stop) <= max_bytes

    fastest = _least_largest(layers, num_stages, cost, fits)
    if fastest is None:
        total = sum(weight_bytes) + first_bytes + last_bytes
        raise ValueError(
            f"--strategy pipeline: {total / 1e9:.1f} GB of weights cannot be cut into {num_stages} "
            f"stages of at most {(max_bytes or 0) / 1e9:.1f} GB. Use a larger --group-size or a "
            "smaller --dtype."
        )
    slowest = max(cost(start, stop) for start, stop in pairwise(fastest))
    edges = _least_largest(
        layers,
        num_stages,
        held,
        lambda start, stop: fits(start, stop) and cost(start, stop) <= slowest,
    )
    assert edges is not None, "this is a bug: the fastest cut must be allowed again"
    return tuple(StageLayers(start, stop, held(start, stop)) for start, stop in pairwise(edges))


def _least_largest(
    layers: int,
    num_stages: int,
    measure: Callable[[int, int], float],
    allowed: Callable[[int, int], bool],
) -> tuple[int, ...] | None:
    """Return the edges of the cut whose largest stage is smallest, None if no cut is allowed."""
    # best[stop]: (largest so far, edges) of the stages up to `stop`.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for number in range(1, num_stages + 1):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in range(number, layers - (num_stages - number) + 1):
            for start, (largest, edges) in best.items():
                if start < stop and allowed(start, stop):
                    cut = (max(largest, measure(start, stop)), (*edges, stop))
                    following[stop] = min(following.get(stop, cut), cut)
        best = following
    return best[layers][1] if layers in best else None
