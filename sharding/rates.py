"""The times of finished batches -> a forecast for other batches, on each replica.

Starts from the device's matmul rate and learns. Does not know what is in a batch; has no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sharding.batches import BatchShape
from sharding.kinds import CPU

# Assumed on any device until a batch has finished.
EXPECTED_MFU, *_ = CPU.efficiency
# A replica's speed is a mean over about this many recent batches, so it soon shows a slowdown.
MEMORY_BATCHES = 24.0
# The weight of the expected speed, in batches, and of a batch that shared the device with a
# compiler or was the first of its shape.
EXPECTED_WEIGHT = 0.3
DISTURBED_WEIGHT = 0.1
# A new shape starts with its nearest neighbour's factor, at this weight in batches. One batch can
# differ from that factor by at most `MOST_BEND` times.
ALIKE_BATCHES = 8.0
MOST_BEND = 3.0
# A batch counts as undisturbed if a compiler ran for less than this share of its time.
UNDISTURBED = 0.1
# A speed is reliable after this many undisturbed batches.
ENOUGH_BATCHES = 3
# The assumed share of a CPU that a compiler takes from batches, until it is measured. Both start
# the same number of threads.
COMPILING_TAKES = 0.6


@dataclass(slots=True)
class Mean:
    """A weighted mean of recent values. It may start from a guess with a weight."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = 1 - weight / MEMORY_BATCHES
        self.total = self.total * kept + value * weight
        self.weight = self.weight * kept + weight

    def value(self) -> float:
        """Return the mean, 0 if there is none yet."""
        return self.total / self.weight if self.weight else 0.0


class Rates:
    """The speed of each replica, in cost per second, and a factor for each shape.

    Attention and small batches reach other FLOP/s than large matmuls, so each shape has a factor,
    relative to the first shape that finished. A shape without a finished batch gets the factor of
    the shape with the nearest length. Replicas differ only in speed.

    Args:
        cost: of a shape, in FLOPs or any unit that is proportional to time.
        compiling_takes: the share of a replica that a compiler takes from its batches, at first.
    """

    def __init__(
        self, cost: Callable[[BatchShape], float], *, compiling_takes: float = 0.0
    ) -> None:
        self._cost = cost
        self._guesses: dict[int, float] = {}
        # Replica -> the seconds of its batches, and the work done in them.
        self._seconds: dict[int, Mean] = {}
        self._work: dict[int, Mean] = {}
        self._speeds: dict[int, float] = {}
        self._speed_of_all = 0.0
        self._slowness: dict[int, float] = {}
        self._undisturbed: dict[int, int] = {}
        self._bends: dict[BatchShape, Mean] = {}
        self._firsts = Mean()
        self._compiling = Mean(compiling_takes, 1.0) if compiling_takes else None

    def expect(self, replica: int, flops_per_s: float) -> None:
        """Set the expected speed of a replica from its rate in large matmuls."""
        self._guesses[replica] = flops_per_s * EXPECTED_MFU

    def learn(
        self,
        replica: int,
        shape: BatchShape,
        seconds: float,
        *,
        is_first: bool = False,
        compiling_s: float = 0.0,
    ) -> None:
        """Learn from the time of a batch, not counting its wait behind others.

        Args:
            is_first: whether it was the first of its shape on this replica, which faults memory in.
            compiling_s: for how many of these seconds the replica also compiled.
        """
        if seconds <= 0:
            return
        expected, knows = self.seconds(replica, shape), self.is_measured(replica)
        is_disturbed = self._compiling is not None and compiling_s > UNDISTURBED * seconds
        if self._compiling is not None and is_disturbed:
            if knows and not is_first:
                share = (seconds - expected) / compiling_s
                self._compiling.add(min(max(share, 0.0), 1.0), min(1.0, compiling_s / seconds))
            seconds -= self._compiling.value() * min(compiling_s, seconds)
        if is_first and knows:
            weight = 1.0 if not is_disturbed else DISTURBED_WEIGHT
            self._firsts.add(max(0.0, seconds - expected), weight)
            return
        weight = DISTURBED_WEIGHT if is_first or is_disturbed else 1.0
        if weight == 1.0 and knows:
            self._slowness[replica] = seconds / expected
        self._learn_speed(replica, shape, seconds, weight)
        if weight == 1.0:
            self._undisturbed[replica] = self._undisturbed.get(replica, 0) + 1
            self._learn_bend(shape, seconds * self.speed(replica) / self._cost(shape))

    def knows(self, replica: int) -> bool:
        """Return whether a replica has finished a batch."""
        return replica in self._seconds

    def is_measured(self, replica: int) -> bool:
        """Return whether a replica has finished enough undisturbed batches."""
        return self._undisturbed.get(replica, 0) >= ENOUGH_BATCHES

    def speed(self, replica: int) -> float:
        """Return the cost per second at a factor of one; 0 if unknown."""
        if replica in self._speeds:
            return self._speeds[replica]
        if self._speeds:
            return self._speed_of_all / len(self._speeds)
        return self._guesses.get(replica, 0.0)

    def work(self, shape: BatchShape) -> float:
        """Return the cost of a batch at a factor of one: seconds times speed."""
        return self._cost(shape) * self._bend(shape)

    def seconds(self, replica: int, shape: BatchShape) -> float:
        """Return the forecast for a batch of this shape on a replica; 0 if there is none."""
        speed = self.speed(replica)
        return self.work(shape) / speed if speed else 0.0

    def slowness(self, replica: int) -> float:
        """Return the time of the last undisturbed batch over its forecast, at least 1.

        It shows a slowdown at once; the speed shows it only after some batches.
        """
        return max(1.0, self._slowness.get(replica, 1.0))

    def first_s(self) -> float:
        """Return how many seconds longer the first batch of a shape takes."""
        return self._firsts.value()

    def compiling_share(self) -> float:
        """Return the share of a replica that a compiler takes from its batches."""
        return self._compiling.value() if self._compiling is not None else 0.0

    def preparing_s(
        self, shapes: set[BatchShape], *, used: set[BatchShape], warm: set[BatchShape], one_s: float
    ) -> float:
        """Return the seconds that new shapes cost a replica, besides their batches.

        Args:
            used: shapes of which it has finished a batch. warm: shapes for which it has a program.
            one_s: seconds to compile a shape.
        """
        compiles_s = len(shapes - warm) * one_s * self.compiling_share()
        return len(shapes - used) * self.first_s() + compiles_s

    def _learn_speed(self, replica: int, shape: BatchShape, seconds: float, weight: float) -> None:
        work = self.work(shape)
        if replica not in self._seconds:
            expected = self.speed(replica)
            start = EXPECTED_WEIGHT if expected else 0.0
            in_that = work / expected if expected else 0.0
            self._seconds[replica] = Mean(in_that * start, start)
            self._work[replica] = Mean(work * start, start)
        self._seconds[replica].add(seconds, weight)
        self._work[replica].add(work, weight)
        speed = self._work[replica].value() / self._seconds[replica].value()
        self._speed_of_all += speed - self._speeds.get(replica, 0.0)
        self._speeds[replica] = speed

    def _learn_bend(self, shape: BatchShape, factor: float) -> None:
        near = self._bend(shape)
        if shape not in self._bends:
            # Speeds are relative to the first shape, whose factor stays near one.
            self._bends[shape] = Mean(near * ALIKE_BATCHES, ALIKE_BATCHES)
        self._bends[shape].add(min(max(factor, near / MOST_BEND), near * MOST_BEND))

    def _bend(self, shape: BatchShape) -> float:
        if not self._bends:
            return 1.0
        if shape in self._bends:
            return self._bends[shape].value()
        nearest = min(self._bends, key=lambda known: (abs(known.length - shape.length), known.rows))
        return self._bends[nearest].value()


class Intervals:
    """When something ran, by any clock -> for how long it ran within a period."""

    def __init__(self) -> None:
        self._past: list[tuple[float, float]] = []
        self._since: float | None = None

    def begin(self, at: float) -> None:
        self._since = at

    def end(self, at: float) -> None:
        if self._since is not None:
            self._past.append((self._since, at))
            self._since = None

    def within(self, start: float, end: float) -> float:
        """Return for how many seconds it ran between two times."""
        spans = [*self._past, *([(self._since, end)] if self._since is not None else [])]
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in spans)
