"""Batches that finished -> the seconds that others will take, on each replica.

Starts from the roofline and learns. Does not know what a batch holds, nor what time it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sharding.batches import BatchShape
from sharding.kinds import CPU

# Until a batch says otherwise, on any device.
EXPECTED_MFU, *_ = CPU.efficiency
# A replica's speed is the mean over its last so many batches: one that slows down is known soon.
MEMORY_BATCHES = 24.0
# What is expected of a replica counts as so many batches, and so does one that shared the device
# with a compiler or was the first of its shape.
EXPECTED_WEIGHT = 0.3
DISTURBED_WEIGHT = 0.1
# A shape counts as like its nearest neighbour until so many batches say otherwise; by no batch
# more than so many times.
ALIKE_BATCHES = 8.0
MOST_BEND = 3.0
# A batch beside which a compiler ran for less of its time counts as undisturbed.
UNDISTURBED = 0.1
# So many batches that nothing disturbed make a speed that decisions may rest on.
ENOUGH_BATCHES = 3
# Part of a CPU that a compiler takes from the batches beside it, until it is known: it starts as
# many threads.
COMPILING_TAKES = 0.6


@dataclass(slots=True)
class Mean:
    """A weighted mean over the last values; it starts from nothing, or from a guess and what that
    weighs."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        kept = 1 - weight / MEMORY_BATCHES
        self.total = self.total * kept + value * weight
        self.weight = self.weight * kept + weight

    def value(self, otherwise: float = 0.0) -> float:
        return self.total / self.weight if self.weight else otherwise


class Rates:
    """Speeds of replicas in cost a second, and how shapes bend them.

    Attention and small batches reach other FLOP/s than the large matmuls, so each shape has a
    factor, relative to the first shape that finished; a shape that none has finished takes the
    factor of the nearest length. Replicas differ in speed alone.

    Args:
        cost: of a shape, in FLOPs or any unit that time is proportional to.
        compiling_takes: part of a replica that a compiler beside its batches takes, at first.
    """

    def __init__(
        self, cost: Callable[[BatchShape], float], *, compiling_takes: float = 0.0
    ) -> None:
        self._cost = cost
        self._guesses: dict[int, float] = {}
        # Of each replica: the seconds of its batches, and the work done in them.
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
        """Take the rate of a replica's large matmuls, before it has finished anything."""
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
        """Take what a batch took, the time in line behind others left out.

        Args:
            is_first: it was the first of its shape on this replica, which faults memory in.
            compiling_s: for so many of the seconds the replica compiled besides.
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
        """Whether a replica has finished a batch."""
        return replica in self._seconds

    def is_measured(self, replica: int) -> bool:
        """Whether a replica has finished batches enough that nothing disturbed."""
        return self._undisturbed.get(replica, 0) >= ENOUGH_BATCHES

    def speed(self, replica: int) -> float:
        """Return cost a second at a factor of one; 0 if nothing is known of a replica."""
        if replica in self._speeds:
            return self._speeds[replica]
        if self._speeds:
            return self._speed_of_all / len(self._speeds)
        return self._guesses.get(replica, 0.0)

    def work(self, shape: BatchShape) -> float:
        """Return the cost of a batch at a factor of one: seconds times speed."""
        return self._cost(shape) * self._bend(shape)

    def seconds(self, replica: int, shape: BatchShape) -> float:
        """Return what a batch of this shape takes on a replica; 0 if nothing is known."""
        speed = self.speed(replica)
        return self.work(shape) / speed if speed else 0.0

    def slowness(self, replica: int) -> float:
        """Return how many times as long its last undisturbed batch took as was expected, at least
        one: one that has become slow is known by that at once, by its speed after some batches."""
        return max(1.0, self._slowness.get(replica, 1.0))

    def first_s(self) -> float:
        """Return the seconds that the first batch of a shape takes beyond the others."""
        return self._firsts.value()

    def compiling_share(self) -> float:
        """Return the part of a replica that a compiler beside its batches takes from them."""
        return self._compiling.value() if self._compiling is not None else 0.0

    def preparing_s(
        self, shapes: set[BatchShape], *, used: set[BatchShape], warm: set[BatchShape], one_s: float
    ) -> float:
        """Return the seconds that shapes cost a replica besides their batches.

        Args:
            used, warm: of which it has finished a batch, and has a program. one_s: of a compile.
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
            # Speeds are relative to the first shape: its factor stays near one.
            self._bends[shape] = Mean(near * ALIKE_BATCHES, ALIKE_BATCHES)
        self._bends[shape].add(min(max(factor, near / MOST_BEND), near * MOST_BEND))

    def _bend(self, shape: BatchShape) -> float:
        if not self._bends:
            return 1.0
        if shape in self._bends:
            return self._bends[shape].value(1.0)
        nearest = min(self._bends, key=lambda known: (abs(known.length - shape.length), known.rows))
        return self._bends[nearest].value(1.0)


class Intervals:
    """When something went on, by any clock -> how much of it lay within a span of time."""

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
        """Return the seconds between two moments in which it went on."""
        spans = [*self._past, *([(self._since, end)] if self._since is not None else [])]
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in spans)
