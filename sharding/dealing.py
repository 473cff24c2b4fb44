"""The state of replicas and the remaining work -> what each replica does next.

The scheduling policy of a run: which batch to compute, which shape to compile, whether to start a
speculative copy of a straggler's batch, and how long a batch may take before it counts as hung. Ray
replicas and the simulation (`benchmarks/simulated.py`) both use it. Does not know workers or
answers, and has no clock; callers pass the time.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.forecast import Pace
from sharding.rates import Intervals, Rates

# One batch is computed while the next waits at the replica.
BATCHES_IN_FLIGHT = 2
# A batch is overdue if it takes longer than this factor times its forecast, plus these seconds.
OVERDUE_FACTOR, OVERDUE_S = 3.0, 1.0
# While one replica compiles a shape, others wait for this long to read it from the cache.
COMPILE_WITHIN_S = 120.0
# A batch is hung if it takes longer than this factor times its forecast, plus a number of seconds
# that is larger for a replica's first batch.
HANG_FACTOR = 8.0
FIRST_BATCH_WITHIN_S = 120.0
BATCH_WITHIN_S = 15.0
# Under a time limit, a hang may cost at most this share of the remaining time, but a batch always
# gets this factor times its forecast, plus these seconds. Applies once a replica's speed is known.
HANG_SHARE, PATIENCE_FACTOR, PATIENCE_S = 0.1, 3.0, 4.0
# A speculative copy must be expected to end sooner by this factor.
SOONER = 1.2
# The assumed seconds to compile a program only for a copy; it is often in the cache.
COMPILES_S = 3.0
# Facts about all replicas together are refreshed after this many seconds.
LOOK_S = 0.1


@dataclass(eq=False)
class ReplicaState:
    """What a replica is doing and has done; times are those that the dealer is given.

    members: how many batches it computes at a time, one at each stage. in_flight: its batches, the
    oldest first. warm: shapes for which it has a program. used: shapes of which it has finished a
    batch. compiling: a shape, since `compiling_since`. finished_at: when its last batch ended.
    start_s: how long it took to start, None until it has been ready once.
    """

    number: int
    node: str = ""
    members: int = 1
    most_in_flight: int = BATCHES_IN_FLIGHT
    in_flight: deque[Batch] = field(default_factory=deque)
    warm: set[BatchShape] = field(default_factory=set)
    used: set[BatchShape] = field(default_factory=set)
    compiling: BatchShape | None = None
    compiling_since: float = 0.0
    compile_times: Intervals = field(default_factory=Intervals)
    finished_at: float = 0.0
    spawned_at: float = 0.0
    is_ready: bool = False
    start_s: float | None = None
    given_up: bool = False

    def begin_compiling(self, shape: BatchShape, now: float) -> None:
        self.compiling, self.compiling_since = shape, now
        self.compile_times.begin(now)

    def end_compiling(self, now: float) -> None:
        self.compiling = None
        self.compile_times.end(now)

    def clear(self, now: float) -> None:
        """Forget what the replica's process had: the process has ended."""
        for left in (self.in_flight, self.warm, self.used):
            left.clear()
        self.end_compiling(now)
        self.is_ready = False


class Dealer:
    """Decides what each replica does next, until every row is answered.

    Args:
        replicas: those of the run; more may be appended.
        patience_s: how many seconds a batch may take beyond its forecast before it counts as hung.

    Attributes:
        copied_batches: the number of speculative copies.
    """

    def __init__(
        self,
        backlog: Backlog,
        rates: Rates,
        replicas: Sequence[ReplicaState],
        *,
        patience_s: float = float("inf"),
    ) -> None:
        self._backlog = backlog
        self._rates = rates
        self._replicas = replicas
        self._patience_s = patience_s
        # Replica -> batch index -> when the replica got this batch, for those in flight.
        self._given_at: dict[int, dict[int, float]] = defaultdict(dict)
        # Node -> the shapes in its cache, because a replica there compiled them.
        self._compiled: dict[str, set[BatchShape]] = defaultdict(set)
        self._complete: dict[int, tuple[int, int]] = {}
        self._speed_of_all, self._alive, self._looked_at = 0.0, 1, float("-inf")
        self._late, self._late_at = _Late(), float("-inf")
        # Shapes that some replica is compiling; one such replica is enough for a copy.
        self._compiled_to_copy: set[BatchShape] = set()
        self._by_node: dict[str, list[ReplicaState]] = {}
        self.copied_batches = 0

    def is_settled(self, replica: ReplicaState) -> bool:
        """Return whether a replica has enough batches and every program."""
        return len(replica.in_flight) >= replica.most_in_flight and self._has_all(replica)

    def next_batch(self, replica: ReplicaState, now: float) -> Batch | None:
        """Move a replica's next batch in flight and return it; None if it gets none now."""
        backlog, in_flight = self._backlog, replica.in_flight
        if len(in_flight) >= replica.most_in_flight or any(map(backlog.is_suspect, in_flight)):
            return None
        batch = backlog.take(
            replica.number,
            runnable=replica.warm.__contains__,
            alone=not in_flight,
            share=self._share(replica, now),
        )
        if batch is None and not in_flight and not backlog.counts():
            batch = self._copy(replica, now)
        if batch is not None:
            given_at = self._given_at[replica.number]
            for index in given_at.keys() - {one.index for one in in_flight}:
                del given_at[index]
            given_at[batch.index] = now
        return batch

    def next_shape(self, replica: ReplicaState, now: float) -> BatchShape | None:
        """Return the shape that a replica compiles next, None if there is none.

        There is none if it has them all, is compiling, or others are compiling the missing ones,
        which will then be in the cache.
        """
        if replica.compiling is not None:
            return None
        if self._has_all(replica):
            return self._shape_to_copy(replica, now)
        if replica.in_flight and not self._rates.is_measured(replica.number):
            return None  # measure batches first, while no compiler runs
        missing = [one for one in self.shapes(replica) if one not in replica.warm]
        if not missing:
            self._complete[replica.number] = (self._backlog.version, len(replica.warm))
            return None
        # Each node has a cache of its own.
        elsewhere = {
            other.compiling
            for other in self._on(replica.node)
            if other.compiling is not None and now - other.compiling_since < COMPILE_WITHIN_S
        }
        elsewhere -= self._compiled[replica.node]
        return next((shape for shape in missing if shape not in elsewhere), None)

    def shapes(self, replica: ReplicaState) -> tuple[BatchShape, ...]:
        """Return the shapes that a replica may still get, in the order of first use."""
        return self._backlog.shapes(replica.number)

    def compiled(self, replica: ReplicaState, shape: BatchShape) -> None:
        """Note that a replica compiled a shape, which its node now has in the cache."""
        self._compiled[replica.node].add(shape)

    def paces(
        self,
        now: float,
        *,
        shapes: Iterable[BatchShape] | None,
        compile_s: Callable[[int], float],
    ) -> list[Pace]:
        """Return how fast each replica is, and how long it will load and compile.

        Args:
            shapes: those to come, None for those of the backlog.
            compile_s: the number of replicas that share a cache -> seconds to compile a shape.
        """
        starts = [one.start_s for one in self._replicas if one.start_s is not None]
        slowest_start_s = max(starts, default=None)
        asked = None if shapes is None else {*shapes}
        alike = Counter(one.node for one in self._replicas)
        one_s = {count: compile_s(count) for count in set(alike.values())}
        paces = []
        for replica in self._replicas:
            if replica.given_up:
                continue
            delay_s = 0.0
            if not replica.is_ready:
                if slowest_start_s is None:
                    continue
                waited = now - replica.spawned_at
                # If it already takes longer than the others did, this is a guess.
                delay_s = max(slowest_start_s - waited, waited / 4)
            delay_s += self._rates.preparing_s(
                {*self.shapes(replica)} if asked is None else asked,
                used=replica.used,
                warm=replica.warm,
                one_s=one_s[alike[replica.node]],
            )
            delay_s += self._overdue_s(replica, now)
            paces.append(Pace(self._rates.speed(replica.number), delay_s))
        return paces

    def began(self, replica: ReplicaState, batch: Batch) -> float:
        """Return when a replica began its oldest batch in flight."""
        # A batch that an earlier pass left behind counts as given long ago.
        return max(self._given_at[replica.number].get(batch.index, 0.0), replica.finished_at)

    def batch_limit_s(self, replica: ReplicaState, batch: Batch, left_s: float) -> float:
        """Return the seconds that a batch may take before it counts as hung.

        Args:
            left_s: the remaining seconds in which rows can be predicted.
        """
        is_known = self._rates.knows(replica.number)
        seconds = self._rates.seconds(replica.number, batch.shape) * replica.members
        patience_s = BATCH_WITHIN_S if is_known else FIRST_BATCH_WITHIN_S
        limit = min(patience_s, self._patience_s) + HANG_FACTOR * seconds
        if is_known:
            least = PATIENCE_S + PATIENCE_FACTOR * seconds
            limit = min(limit, max(least, HANG_SHARE * left_s))
        # While the replica compiles, a batch gets half of the cores.
        return limit if replica.compiling is None else 2 * limit

    def _overdue_s(self, replica: ReplicaState, now: float) -> float:
        """Return the delay to expect from a replica whose batch is overdue, 0 if none is: the time
        so far once more, and the time to replace the replica."""
        if replica.compiling is not None or not replica.in_flight:
            return 0.0
        if not self._rates.is_measured(replica.number):
            return 0.0
        batch = replica.in_flight[0]
        took = now - self.began(replica, batch)
        expected = self._rates.seconds(replica.number, batch.shape)
        is_overdue = took > OVERDUE_FACTOR * expected + OVERDUE_S
        return took + (replica.start_s or 0.0) if is_overdue else 0.0

    def _has_all(self, replica: ReplicaState) -> bool:
        """Return whether a replica had a program for every shape and nothing has changed since."""
        found = self._complete.get(replica.number)
        return found == (self._backlog.version, len(replica.warm))

    def _share(self, replica: ReplicaState, now: float) -> float:
        """Return the replica's share of the total speed."""
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            alive = [one.number for one in self._replicas if not one.given_up]
            self._speed_of_all, self._alive = sum(map(self._rates.speed, alive)), len(alive)
        own = self._rates.speed(replica.number)
        if not own or not self._speed_of_all:
            return 1 / max(1, self._alive)
        return min(1.0, own / self._speed_of_all)

    def _shape_to_copy(self, replica: ReplicaState, now: float) -> BatchShape | None:
        """Return a shape to compile for a speculative copy, None if there is none.

        This idle replica would compile it and finish a batch sooner than the one that computes it.
        """
        if replica.in_flight or self._backlog.counts():
            return None
        self._look_for_late(now)
        for shape in self._late.shapes():
            if shape in replica.warm or shape in self._compiled_to_copy:
                continue  # a batch is copied once
            takes_s = self._rates.seconds(replica.number, shape) + COMPILES_S
            if self._late.find(shape, now, takes_s, self._may_be_copied) is not None:
                self._compiled_to_copy.add(shape)
                return shape
        return None

    def _copy(self, replica: ReplicaState, now: float) -> Batch | None:
        """Return a batch that this idle replica would finish sooner than the one that computes it.

        The first answer counts, so no row waits for a slow or hung worker.
        """
        self._look_for_late(now)
        latest: tuple[float, Batch] | None = None
        for shape in self._late.shapes():
            if shape not in replica.warm:
                continue
            own_s = self._rates.seconds(replica.number, shape)
            found = self._late.find(shape, now, own_s, self._may_be_copied)
            if found is not None and (latest is None or found[0] > latest[0]):
                latest = found
        if latest is None:
            return None
        self._late.remove(latest[1])
        self._backlog.copy(latest[1], replica.number)
        self.copied_batches += 1
        return latest[1]

    def _look_for_late(self, now: float) -> None:
        """Refresh when the batches in flight should end."""
        if now - self._late_at >= LOOK_S:
            self._late_at = now
            self._late = _Late()
            self._compiled_to_copy = {
                one.compiling for one in self._replicas if one.compiling is not None
            }
            for other in self._replicas:
                end = None
                for batch in other.in_flight:
                    began = self.began(other, batch) if end is None else end
                    seconds = self._rates.seconds(other.number, batch.shape)
                    end = began + seconds * self._rates.slowness(other.number)
                    self._late.add(batch, end)
            self._late.sort()

    def _may_be_copied(self, batch: Batch) -> bool:
        return len(self._backlog.replicas_of(batch)) == 1 and not self._backlog.is_suspect(batch)

    def _on(self, node: str) -> Sequence[ReplicaState]:
        if sum(map(len, self._by_node.values())) != len(self._replicas):
            self._by_node = defaultdict(list)
            for one in self._replicas:
                self._by_node[one.node].append(one)
        return self._by_node[node]


class _Late:
    """The batches in flight of each shape, in the order in which they should end."""

    def __init__(self) -> None:
        self._ends: dict[BatchShape, list[tuple[float, int, Batch]]] = defaultdict(list)

    def add(self, batch: Batch, end: float) -> None:
        self._ends[batch.shape].append((end, batch.index, batch))

    def sort(self) -> None:
        for ends in self._ends.values():
            ends.sort(key=lambda one: one[:2])

    def shapes(self) -> list[BatchShape]:
        return [shape for shape, ends in self._ends.items() if ends]

    def find(
        self, shape: BatchShape, now: float, own_s: float, is_open: Callable[[Batch], bool]
    ) -> tuple[float, Batch] | None:
        """Return the seconds until a batch should end, and the batch, if it is worth a copy.

        The copy would take `own_s`. The seconds are infinite if the batch is overdue.
        """
        ends = self._ends[shape]
        while ends and not is_open(ends[0][2]):
            ends.pop(0)
        while ends and not is_open(ends[-1][2]):
            ends.pop()
        if not ends:
            return None
        if ends[0][0] - now < -own_s:
            return float("inf"), ends[0][2]
        left = ends[-1][0] - now
        return (left, ends[-1][2]) if left > SOONER * own_s else None

    def remove(self, batch: Batch) -> None:
        ends = self._ends[batch.shape]
        del ends[0 if ends[0][2] is batch else -1]
