"""A backlog, and how fast each replica is and from when on -> the seconds that are left.

Pure arithmetic; does not know a clock.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.rates import Rates

# Of a batch that is computed now, on average so much is still to be done.
HALF_WAY = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """One replica. speed: in cost a second. delay_s: so long it will do something else before, as
    load or compile."""

    speed: float
    delay_s: float = 0.0

    def later(self, seconds: float) -> "Pace":
        return replace(self, delay_s=self.delay_s + seconds)


def seconds_left(backlog: Backlog, rates: Rates, paces: Sequence[Pace]) -> float | None:
    """Return the seconds until all rows have an answer, None if nothing is known yet.

    Of the batches of a replica the first is half done, those in line behind it are not begun. At
    the end, when the first replica finds nothing to do, half of a batch is left to each of the
    others.
    """
    in_line: dict[int, list[float]] = defaultdict(list)
    for batch in backlog.under_way():
        in_line[backlog.replicas_of(batch)[0]].append(rates.work(batch.shape))
    under_way = sum(sum(line) - HALF_WAY * line[0] for line in in_line.values())
    last_shape = backlog.last_shape()
    last = rates.work(last_shape) if last_shape is not None else 0.0
    waiting = work_of_shapes(backlog.counts(), rates)
    return seconds_of(waiting + under_way + HALF_WAY * last * (len(paces) - 1), paces)


def work_of(batches: Iterable[Batch], rates: Rates) -> float:
    """Return the work of batches; there are many of a shape."""
    return work_of_shapes(Counter(batch.shape for batch in batches), rates)


def work_of_shapes(counts: Mapping[BatchShape, int], rates: Rates) -> float:
    """Return the work of so many batches of each shape."""
    return sum(count * rates.work(shape) for shape, count in counts.items())


def seconds_of(work: float, paces: Sequence[Pace]) -> float | None:
    """Return the seconds in which replicas do so much work together, None if none can.

    Each begins after its delay, and one that would begin after the others have ended has no part.
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
