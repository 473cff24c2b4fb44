"""A run on devices that are arithmetic, by a clock that jumps: what is decided, in milliseconds.

Backlog, rates, steering, deadline and the planning of batches are the real ones. Replicas compute,
compile, load, die, hang and slow down as `dispatch.py` and `single.py` let them.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from runner.deadline import Deadline, lengths_to_cut_to
from runner.merge import Merger
from runner.pipeline import plan_run
from runner.records import BatchResult
from runner.steering import Steering
from sharding.backlog import Backlog
from sharding.costs import ModelShape
from sharding.forecast import Pace
from sharding.rates import COMPILING_TAKES, Rates

STEP_S = 0.02
# The demo's backbone, on a core of a machine that was measured.
SHAPE = ModelShape(
    vocabulary_size=2048,
    num_layers=4,
    hidden_dim=256,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_dim=1024,
)
FLOPS_PER_S = 1.3e11


@dataclass
class Replica:
    """One device. What it can do to a run is set before."""

    number: int
    speed: float = FLOPS_PER_S
    start_s: float = 6.0
    reload_s: float = 6.0
    compile_s: float = 1.0
    first_s: float = 0.1
    compiling_takes: float = 0.5
    noise: float = 0.1
    dies_at: float = float("inf")
    hangs_at: float = float("inf")
    ready_at: float = 0.0
    done: float = 0.0
    batch_began: float = 0.0
    disturbed_s: float = 0.0
    warm: set = field(default_factory=set)
    used: set = field(default_factory=set)
    compiling: tuple | None = None
    in_flight: deque = field(default_factory=deque)
    compile_began: float = 0.0
    compiled_s: list = field(default_factory=list)


class Simulated:
    """A run of `lengths` on replicas, as the executors would do it."""

    def __init__(
        self,
        lengths,
        replicas,
        *,
        limit_s=None,
        policy="shorten",
        pooling="mean",
        sequence_length=512,
        floor=None,
        seed=0,
        hang_within_s=8.0,
    ):
        self.time = 0.0
        self.lengths = np.asarray(lengths)
        self.members = replicas
        self.replicas, self.kind = len(replicas), "cpu"
        self.chance = random.Random(seed)
        self.hang_within_s = hang_within_s
        for replica in replicas:
            replica.ready_at = replica.start_s
        config = SimpleNamespace(
            pooling=pooling, sequence_length=sequence_length, max_tokens_per_batch=2048
        )
        preset = SimpleNamespace(shape=SHAPE)

        def plan(rows, cap=None, known=()):
            return plan_run(
                self.lengths, config, preset, kind="cpu", replicas=self.replicas,
                rows=rows, cap=cap, known=known,
            )  # fmt: skip

        self.first_plan = plan(np.arange(len(lengths)))
        self.backlog = Backlog(self.first_plan.batches, cost=SHAPE.batch_flops)
        self.rates = Rates(SHAPE.batch_flops, compiling_takes=COMPILING_TAKES)
        self.deadline = Deadline(limit_s, policy)
        self.deadline.rehearsed(0.005)
        self.merger = Merger([str(row) for row in range(len(lengths))], 3)
        self.notes = []
        self.computed_s = 0.0
        top = sequence_length if pooling == "padded-mean" else int(self.lengths.max())
        floor = min(floor or sequence_length // 4, top)
        journal = SimpleNamespace(add=lambda *args, **kwargs: None)
        progress = SimpleNamespace(
            note=self.notes.append, advance=lambda **_: None, forecast=lambda **_: None
        )
        self.steering = Steering(
            self.backlog, self.rates, self, merger=self.merger, journal=journal,
            progress=progress, deadline=self.deadline, lengths=self.lengths,
            replan=lambda rows, cap, shapes: plan(rows, cap, [*self.first_plan.shapes, *shapes]),
            caps=lengths_to_cut_to(
                floor, top, multiple_of=8, others=(one.length for one in self.first_plan.shapes)
            ),
            full_length=sequence_length if pooling == "padded-mean" else None,
            started=0.0, clock=lambda: self.time,
        )  # fmt: skip

    # What steering asks of an executor.

    def warm(self):
        return {shape for replica in self.members for shape in replica.warm}

    def compile_s(self):
        return max(self._compiled_s(), default=0.5)

    def _compiled_s(self):
        return [seconds for replica in self.members for seconds in replica.compiled_s]

    def is_measured(self):
        return any(self.rates.is_measured(replica.number) for replica in self.members)

    def paces(self, shapes=None):
        starts = [replica for replica in self.members if replica.warm]
        paces = []
        for replica in self.members:
            if not replica.warm and not starts:
                continue
            delay_s = max(0.0, replica.ready_at - self.time)
            to_come = {*(self.backlog.shapes(replica.number) if shapes is None else shapes)}
            delay_s += len(to_come - replica.used) * self.rates.first_s()
            one_s = self.compile_s()
            if shapes is None:
                one_s = (one_s + (len(self.members) - 1) * one_s / 8) / len(self.members)
            compiling = len(to_come - replica.warm) * one_s
            delay_s += compiling * self.rates.compiling_share()
            speed = self.rates.speed(replica.number)
            if replica.in_flight and replica.compiling is None:
                expected = self.rates.seconds(replica.number, replica.in_flight[0].shape)
                took = self.time - replica.batch_began
                if took > 3 * expected + 1.0 and self.rates.is_measured(replica.number):
                    delay_s += took + replica.reload_s
            paces.append(Pace(speed, delay_s))
        return paces

    # The run.

    def run(self, most_s=600.0):
        """Return when it ended, in seconds."""
        while self.backlog and self.time < most_s:
            self.time += STEP_S
            for replica in self.members:
                result = self._advance(replica)
                if result is not None:
                    self.steering.take(result)
                    if not self.steering.tick():
                        return self.time
            if not self.steering.tick():
                return self.time
        return self.time

    def _advance(self, replica):
        if self.time < replica.ready_at:
            return None
        if self.time >= replica.dies_at:
            replica.dies_at = float("inf")
            self._lose(replica)
            return None
        if self.time >= replica.hangs_at:
            if self.time >= replica.hangs_at + self.hang_within_s:
                replica.hangs_at = float("inf")
                self._lose(replica)
            return None
        self.rates.expect(replica.number, FLOPS_PER_S / 0.6)
        while len(replica.in_flight) < 2:
            if any(map(self.backlog.is_suspect, replica.in_flight)):
                break
            batch = self.backlog.take(
                replica.number, runnable=replica.warm.__contains__,
                alone=not replica.in_flight, share=1 / len(self.members),
            )  # fmt: skip
            batch = batch or self._copy(replica)
            if batch is None:
                break
            if not replica.in_flight:
                self._begin(replica, batch)
            replica.in_flight.append(batch)
        share = 1.0
        if replica.compiling is not None:
            shape, until = replica.compiling
            if self.time >= until:
                replica.warm.add(shape)
                replica.compiled_s.append(self.time - replica.compile_began)
                replica.compiling = None
            elif replica.in_flight:
                share -= replica.compiling_takes
        elif not replica.in_flight or self.rates.is_measured(replica.number):
            elsewhere = {one.compiling[0] for one in self.members if one.compiling} - self.warm()
            for shape in self.backlog.shapes(replica.number):
                if shape not in replica.warm and shape not in elsewhere:
                    takes = replica.compile_s if shape not in self.warm() else 0.2
                    replica.compiling = (shape, self.time + takes)
                    replica.compile_began = self.time
                    break
        if not replica.in_flight:
            return None
        self.computed_s += STEP_S
        replica.done += STEP_S * share
        replica.disturbed_s += STEP_S * (share < 1)
        if replica.done < replica.needs_s:
            return None
        batch = replica.in_flight.popleft()
        took = self.time - replica.batch_began
        self.rates.learn(
            replica.number, batch.shape, took,
            is_first=batch.shape not in replica.used, compiling_s=replica.disturbed_s,
        )  # fmt: skip
        replica.used.add(batch.shape)
        if replica.in_flight:
            self._begin(replica, replica.in_flight[0])
        if not self.backlog.finish(batch):
            return None
        answers = np.full((len(batch.rows), 3), 1 / 3, np.float32)
        return BatchResult(batch, replica.number, answers, ())

    def _copy(self, replica):
        if replica.in_flight or any(True for _ in self.backlog.waiting()):
            return None
        for other in self.members:
            for batch in other.in_flight:
                is_alone = self.backlog.replicas_of(batch) == (other.number,)
                expected = self.rates.seconds(other.number, batch.shape)
                own = self.rates.seconds(replica.number, batch.shape)
                left = expected - (self.time - other.batch_began)
                if is_alone and batch.shape in replica.warm and (left > 1.2 * own or left < -own):
                    self.backlog.copy(batch, replica.number)
                    return batch
        return None

    def _begin(self, replica, batch):
        replica.batch_began, replica.done, replica.disturbed_s = self.time, 0.0, 0.0
        noise = self.chance.lognormvariate(0, replica.noise)
        replica.needs_s = SHAPE.batch_flops(batch.shape) / replica.speed * noise
        if batch.shape not in replica.used:
            replica.needs_s += replica.first_s

    def _lose(self, replica):
        for batch in replica.in_flight:
            self.backlog.setback(batch, replica.number, "it died")
        self.backlog.release(replica.number)
        replica.in_flight.clear()
        replica.warm.clear()
        replica.used.clear()
        replica.compiling = None
        replica.ready_at = self.time + replica.reload_s
