"""Batches that finished -> the seconds that others will take, on each replica.

Starts from the roofline and learns. Does not know what a batch holds, nor what time it is.
"""

from collections.abc import Callable

from sharding.batches import BatchShape

# Part of a matmul's rate that a whole model reaches: 0.5 to 0.8 on CPUs (benchmarks/results).
EXPECTED_MFU = 0.6
# Weight of a new batch against those before: a replica that slows down is known after some ten.
NOVELTY = 0.15


class Rates:
    """Speeds of replicas in cost a second, and how shapes bend them.

    Attention and small batches reach other FLOP/s than the large matmuls, so each shape has a
    factor, relative to the first shape that finished; a shape that none has finished takes the
    factor of the nearest length. Replicas differ in speed alone.

    Args:
        cost: of a shape, in FLOPs or any unit that time is proportional to.
    """

    def __init__(self, cost: Callable[[BatchShape], float]) -> None:
        self._cost = cost
        self._guesses: dict[int, float] = {}
        self._speeds: dict[int, float] = {}
        self._bends: dict[BatchShape, float] = {}

    def expect(self, replica: int, flops_per_s: float) -> None:
        """Take the rate of a replica's large matmuls, before it has finished anything."""
        self._guesses[replica] = flops_per_s * EXPECTED_MFU

    def learn(self, replica: int, shape: BatchShape, seconds: float) -> None:
        """Take what a batch took, the time in line behind others left out."""
        if seconds <= 0:
            return
        known = self._speeds.get(replica)
        if known is None:
            # The first batch faults its memory in: what comes next corrects it.
            self._bends.setdefault(shape, 1.0 if not self._bends else self._bend(shape))
            self._speeds[replica] = self._cost(shape) * self._bend(shape) / seconds
            return
        bend = self._bends.get(shape)
        if bend is None:
            self._bends[shape] = seconds * known / self._cost(shape)
            return
        # Shared between the two: a shape's factor is learnt from all replicas, a speed from all
        # shapes.
        surprise = seconds * known / (self._cost(shape) * bend)
        self._bends[shape] = bend * surprise ** (NOVELTY / 2)
        self._speeds[replica] = known / surprise ** (NOVELTY)

    def knows(self, replica: int) -> bool:
        """Whether a replica has finished a batch."""
        return replica in self._speeds

    def speed(self, replica: int) -> float:
        """Return cost a second at a factor of one; 0 where nothing is known of a replica."""
        if replica in self._speeds:
            return self._speeds[replica]
        if self._speeds:
            return sum(self._speeds.values()) / len(self._speeds)
        return self._guesses.get(replica, 0.0)

    def work(self, shape: BatchShape) -> float:
        """Return the cost of a batch at a factor of one: seconds times speed."""
        return self._cost(shape) * self._bend(shape)

    def seconds(self, replica: int, shape: BatchShape) -> float:
        """Return what a batch of this shape takes on a replica; 0 where nothing is known."""
        speed = self.speed(replica)
        return self.work(shape) / speed if speed else 0.0

    def shapes(self) -> tuple[BatchShape, ...]:
        """Return the shapes of which a batch has finished."""
        return tuple(self._bends)

    def _bend(self, shape: BatchShape) -> float:
        if shape in self._bends or not self._bends:
            return self._bends.get(shape, 1.0)
        nearest = min(self._bends, key=lambda known: (abs(known.length - shape.length), known.rows))
        return self._bends[nearest]
