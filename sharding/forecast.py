"""A backlog and the paces of replicas -> the remaining seconds. Has no clock."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.rates import Rates

# The share of a running batch that remains, on average.
HALF_DONE = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a replica is.

    speed: cost per second. delay_s: seconds until it begins, since it loads or compiles first.
    """

    speed: float
    delay_s: float = 0.0


def seconds_left(backlog: Backlog, rates: Rates, paces: Sequence[Pace]) -> float | None:
    """Return the seconds until all rows have an answer, None if nothing is known yet.

    A replica's first batch in flight is assumed to be half done; the others have not begun. At the
    end, when the first replica becomes idle, each other one has half a batch left.
    """
    in_line: dict[int, list[float]] = defaultdict(list)
    for batch in backlog.in_flight():
        in_line[backlog.replicas_of(batch)[0]].append(rates.work(batch.shape))
    in_flight = sum(sum(line) - HALF_DONE * line[0] for line in in_line.values())
    last_shape = backlog.last_shape()
    last = rates.work(last_shape) if last_shape is not None else 0.0
    waiting = work_of_shapes(backlog.counts(), rates)
    return seconds_of(waiting + in_flight + HALF_DONE * last * (len(paces) - 1), paces)


def work_of(batches: Iterable[Batch], rates: Rates) -> float:
    """Return the work of batches."""
    return work_of_shapes(Counter(batch.shape for batch in batches), rates)


def work_of_shapes(counts: Mapping[BatchShape, int], rates: Rates) -> float:
    """Return the work of batches, counted by shape."""
    return sum(count * rates.work(shape) for shape, count in counts.items())


def seconds_of(work: float, paces: Sequence[Pace]) -> float | None:
    """Return the seconds that replicas need for this work together, None if no speed is known.

    Each begins after its delay; one that would begin after the others have finished does nothing.
    """
    speed = done = 0.0
    since: float | None = None
    for pace in sorted(paces, key=lambda pace: pace.delay_s):
        if not pace.speed:
            continue
        if since is not None:
            if done + speed * (pace.delay_s - since) >= work:
                break
            done += speed * (pace.delay_s - since)
        since, speed = pace.delay_s, speed + pace.speed
    return None if since is None else since + (work - done) / speed
