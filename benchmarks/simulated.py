"""A run on simulated devices and a simulated clock: its decisions, in milliseconds.

Planning, backlog, rates, dealer, steering and deadline are the real ones. Replicas start, compile,
compute, slow down, die and hang as executors would see it. Used by `benchmarks/scheduling.py` and
the tests.
"""

import heapq
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from runner.common.records import COMPILING_TO_READING, BatchResult
from runner.config.run_config import RunConfig
from runner.driver.deadline import Deadline, lengths_to_cut_to
from runner.driver.steering import Steering
from runner.preset.auto import plan_run
from runner.preset.reader import Preset
from runner.results.journal import Journal
from runner.results.ledger import Ledger
from runner.results.table import Merger
from runner.telemetry.progress import Progress
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.costs import ModelShape
from sharding.dealing import Dealer, ReplicaState
from sharding.forecast import Pace
from sharding.kinds import KINDS
from sharding.rates import COMPILING_TAKES, Rates

# Seconds between the dispatcher's looks at the clock.
WAIT_S = 0.2
# Seconds to read a program from the node's cache.
FROM_CACHE_S = 0.2
# The demo's backbone, and the speed of a core that was measured.
SHAPE = ModelShape(
    vocabulary_size=2048,
    num_layers=4,
    hidden_dim=256,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_dim=1024,
)
KIND, FLOPS_PER_S = "cpu", 1.3e11


@dataclass(eq=False)
class Replica(ReplicaState):
    """One device. Its fate is set before the run.

    speed: FLOP/s if it does nothing else. starts_in_s, restarts_in_s: until it has loaded, at first
    and after it was lost. compiles_in_s: for a shape that its node has not compiled. first_s: added
    to the first batch of a shape. compiling_takes: fraction of the device that a compiler takes.
    noise: sigma of the lognormal factor of each batch, whose mean is one. slows_to: the fraction of
    its speed that is left from `slows_at` on.
    """

    speed: float = FLOPS_PER_S
    starts_in_s: float = 6.0
    restarts_in_s: float = 6.0
    compiles_in_s: float = 1.0
    first_s: float = 0.1
    compiling_takes: float = 0.5
    noise: float = 0.1
    dies_at: float = float("inf")
    hangs_at: float = float("inf")
    slows_at: float = float("inf")
    slows_to: float = 1 / 3
    # The device's queue, and the undisturbed seconds that its first batch still needs.
    is_loaded: bool = False
    is_hung: bool = False
    line: deque[Batch] = field(default_factory=deque)
    needs_s: float = 0.0
    since: float = 0.0
    life: int = 0
    schedule: int = 0

    @property
    def pace(self) -> float:
        """The fraction of its speed that it has now."""
        beside = 1.0 - self.compiling_takes * (self.compiling is not None)
        return beside * (self.slows_to if self.since >= self.slows_at else 1.0)


class Simulated:
    """A run of rows of these lengths on replicas, as the executors would do it.

    Args:
        lengths: (rows,) tokens.
        driver_s: seconds of the driver that every batch takes.

    Attributes:
        time: the simulated clock. deciding_s, decisions: real seconds that the dealer took, and how
            often it was asked what a replica does next.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        replicas: Sequence[Replica],
        *,
        limit_s: float | None = None,
        pooling: str = "mean",
        sequence_length: int = 512,
        seed: int = 0,
        max_tokens_per_batch: int = 2048,
        driver_s: float = 0.0,
    ) -> None:
        self.time = 0.0
        self.lengths = np.asarray(lengths)
        self.members = replicas
        self.deciding_s, self.decisions = 0.0, 0
        self._chance = random.Random(seed)
        self._driver_s, self._driver_free_at = driver_s, 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._is_over = False
        self._cached: dict[str, set[BatchShape]] = defaultdict(set)
        self._compiled_s: list[float] = []
        config = SimpleNamespace(
            pooling=pooling,
            sequence_length=sequence_length,
            max_tokens_per_batch=max_tokens_per_batch,
        )

        def plan(
            rows: Sequence[int] | None, cap: int | None = None, known: Sequence[BatchShape] = ()
        ) -> Plan:
            return plan_run(
                self.lengths,
                cast(RunConfig, config),
                cast(Preset, SimpleNamespace(shape=SHAPE)),
                kind=KIND,
                replicas=len(replicas),
                rows=rows,
                cap=cap,
                known=known,
            )

        began = time.perf_counter()
        self.first_plan = plan(None)
        self.backlog = Backlog(self.first_plan.batches, cost=SHAPE.batch_flops)
        self.planning_s = time.perf_counter() - began
        self.rates = Rates(SHAPE.batch_flops, compiling_takes=COMPILING_TAKES)
        self.dealer = Dealer(self.backlog, self.rates, replicas)
        self.deadline = Deadline(limit_s, "shorten")
        self.deadline.rehearsed(0.005)
        self.merger = Merger([str(row) for row in range(len(lengths))], 3)
        self.notes: list[str] = []
        top = sequence_length if pooling == "padded-mean" else int(self.lengths.max())
        journal = SimpleNamespace(add=lambda *args, **kwargs: None)
        progress = SimpleNamespace(
            note=self.notes.append, advance=lambda **_: None, forecast=lambda **_: None
        )
        self.steering = Steering(
            self.backlog,
            self.rates,
            self,
            ledger=Ledger(self.merger, cast(Journal, journal)),
            progress=cast(Progress, progress),
            deadline=self.deadline,
            lengths=self.lengths,
            replan=lambda rows, cap, shapes: plan(rows, cap, [*self.first_plan.shapes, *shapes]),
            caps=lengths_to_cut_to(
                min(sequence_length // 4, top),
                top,
                multiple_of=KINDS[KIND].bucket_multiple,
                others=(one.length for one in self.first_plan.shapes),
            ),
            full_length=sequence_length if pooling == "padded-mean" else None,
            started=0.0,
            clock=lambda: self.time,
        )

    @property
    def work(self) -> int:
        """FLOPs of the plan."""
        return sum(SHAPE.batch_flops(batch.shape) for batch in self.first_plan.batches)

    # What steering asks an executor for.

    def warm(self) -> set[BatchShape]:
        return {shape for replica in self.members for shape in replica.warm}

    def compile_s(self) -> float:
        return max(self._compiled_s, default=0.5)

    def is_measured(self) -> bool:
        return any(self.rates.is_measured(replica.number) for replica in self.members)

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        def compile_s(alike: int) -> float:
            one_s = self.compile_s()
            if shapes is not None:
                return one_s
            return (one_s + (alike - 1) * one_s / COMPILING_TO_READING) / alike

        return self.dealer.paces(self.time, shapes=shapes, compile_s=compile_s)

    # The run.

    def run(self) -> float:
        """Do the run; return when it ended, in simulated seconds."""
        for replica in self.members:
            self._later(replica.starts_in_s, self._load, replica, replica.life)
            for at, happens in (
                (replica.dies_at, self._die),
                (replica.hangs_at, self._hang),
                (replica.slows_at, self._reckon),
            ):
                if at < float("inf"):
                    self._later(at, happens, replica)
        self._later(WAIT_S, self._look)
        while self.backlog and not self._is_over:
            self.time, _, happens, subject = heapq.heappop(self._events)
            happens(*subject)
        return self.time

    def _later(self, seconds: float, happens: Callable[..., None], *subject: Any) -> None:
        self._order += 1
        heapq.heappush(self._events, (self.time + seconds, self._order, happens, subject))

    def _look(self) -> None:
        """Do what the dispatcher does when nothing arrived: find hung replicas, and serve those
        with room."""
        left_s = self.deadline.left_s(self.time)
        for replica in self.members:
            if replica.in_flight:
                batch = replica.in_flight[0]
                limit_s = self.dealer.batch_limit_s(replica, batch, left_s)
                if self.time - self.dealer.began(replica, batch) > limit_s:
                    self._lose(replica, harmless=tuple(replica.in_flight)[1:])
            if not self.dealer.is_settled(replica):
                self._serve(replica)
        self._tick()
        self._later(WAIT_S, self._look)

    def _tick(self) -> None:
        self._is_over = self._is_over or not self.steering.tick()

    def _load(self, replica: Replica, life: int) -> None:
        if life == replica.life:
            replica.is_loaded = True
            self.rates.expect(replica.number, replica.speed / 0.6)
            self._serve(replica)

    def _serve(self, replica: Replica) -> None:
        """Give a replica the batches and the shape that the dealer has for it."""
        if not replica.is_loaded:
            return
        is_idle, began = not replica.line, time.perf_counter()
        self.decisions += 1
        while (batch := self.dealer.next_batch(replica, self.time)) is not None:
            replica.in_flight.append(batch)
            replica.line.append(batch)
        shape = self.dealer.next_shape(replica, self.time)
        self.deciding_s += time.perf_counter() - began
        if is_idle and replica.line:
            self._begin(replica)
        if shape is not None:
            self._reckon(replica)
            replica.begin_compiling(shape, self.time)
            is_cached = shape in self._cached[replica.node]
            takes_s = FROM_CACHE_S if is_cached else replica.compiles_in_s
            self._later(takes_s, self._compile, replica, replica.life, shape, is_cached)
            self._reckon(replica)

    def _compile(self, replica: Replica, life: int, shape: BatchShape, is_cached: bool) -> None:
        if life != replica.life:
            return
        self._reckon(replica)
        if not is_cached:
            self._compiled_s.append(self.time - replica.compiling_since)
        self._cached[replica.node].add(shape)
        self.dealer.compiled(replica, shape)
        replica.end_compiling(self.time)
        if not replica.is_ready:
            replica.is_ready, replica.start_s = True, self.time - replica.spawned_at
        replica.warm.add(shape)
        self._reckon(replica)
        self._serve(replica)

    def _begin(self, replica: Replica) -> None:
        """Begin the first batch in a replica's queue."""
        shape = replica.line[0].shape
        noise = self._chance.lognormvariate(-(replica.noise**2) / 2, replica.noise)
        replica.needs_s = SHAPE.batch_flops(shape) / replica.speed * noise
        replica.needs_s += replica.first_s * (shape not in replica.used)
        replica.since = self.time
        self._reckon(replica)

    def _reckon(self, replica: Replica) -> None:
        """Update what a replica has done until now, and schedule the end of its batch."""
        if not replica.line or replica.is_hung:
            replica.since = self.time
            return
        replica.needs_s = max(0.0, replica.needs_s - (self.time - replica.since) * replica.pace)
        replica.since = self.time
        replica.schedule += 1
        self._later(replica.needs_s / replica.pace, self._end, replica, replica.schedule)

    def _end(self, replica: Replica, schedule: int) -> None:
        """Send the answer of a computed batch to the driver, which takes one at a time."""
        if schedule != replica.schedule or replica.is_hung:
            return
        batch = replica.line.popleft()
        if replica.line:
            self._begin(replica)
        free_at = max(self.time, self._driver_free_at)
        self._driver_free_at = free_at + self._driver_s
        self._later(self._driver_free_at - self.time, self._answer, replica, replica.life, batch)

    def _answer(self, replica: Replica, life: int, batch: Batch) -> None:
        if life != replica.life:
            return
        began = self.dealer.began(replica, batch)
        replica.in_flight.remove(batch)
        replica.finished_at = self.time
        self.rates.learn(
            replica.number,
            batch.shape,
            self.time - began,
            is_first=batch.shape not in replica.used,
            compiling_s=replica.compile_times.within(began, self.time),
        )
        replica.used.add(batch.shape)
        if self.backlog.finish(batch):
            answers = np.full((len(batch.rows), 3), 1 / 3, np.float32)
            self.steering.take(BatchResult(batch, replica.number, answers, ()))
        self._tick()
        self._serve(replica)

    def _die(self, replica: Replica) -> None:
        if not replica.is_ready:
            self._later(1.0, self._die, replica)  # it dies only after it has begun to work
            return
        self._lose(replica)

    def _hang(self, replica: Replica) -> None:
        self._reckon(replica)
        replica.is_hung = True

    def _lose(self, replica: Replica, harmless: Sequence[Batch] = ()) -> None:
        """Put back what a lost replica had in flight, and restart it."""
        for batch in replica.in_flight:
            if batch in harmless:
                self.backlog.put_back(batch, replica.number)
            else:
                self.backlog.setback(batch, replica.number, "it died")
        self.backlog.release(replica.number)
        replica.clear(self.time)
        replica.line.clear()
        replica.is_loaded = replica.is_hung = False
        replica.life += 1
        replica.schedule += 1
        replica.spawned_at = self.time
        self._later(replica.restarts_in_s, self._load, replica, replica.life)
