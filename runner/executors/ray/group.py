"""The Ray actors that hold one replica: one worker, pipeline stages, or slices of every weight.

Knows how each kind is started and how a batch passes through it. Does not know other replicas, the
plan, or when to give up: `replicas.py` decides that.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runner.common.records import BatchResult, ModelSpec, WorkerInfo, WorkerStats
from runner.executors.ray.session import private_folder
from runner.model.slice_worker import TensorMember
from runner.model.stage_worker import PipelineStage
from runner.model.worker import Replica
from runner.telemetry.timeline import COMPILING, LOADING, LOST, STARTING, Timeline
from sharding.batches import Batch, BatchShape
from sharding.kinds import GPU, KINDS
from sharding.rates import Intervals
from sharding.strategies import Strategy
from sharding.topology import WorkerSlot

# One batch computes while the next waits in the worker's queue.
BATCHES_IN_FLIGHT = 2
# Seconds in which the end of a process is known to all.
DEATH_IS_KNOWN_WITHIN_S = 3.0
# Batches in flight in a pipeline beyond one for each stage, so that no stage waits for a hand-over.
EXTRA_IN_PIPELINE = 2

# One batch computes while the next is brought to the device. The members of a tensor group must
# start batches in the same order.
PREDICTING_THREADS = {None: 2, "pipeline": 2, "tensor": 1}
ACTORS = {None: Replica, "pipeline": PipelineStage, "tensor": TensorMember}


@dataclass(slots=True, eq=False)
class Step:
    """One thing asked of a group: the answers of those members that have a part in it.

    asked_at: by the dispatcher's clock, in seconds. asked_s: by the timeline's.
    """

    what: str
    payload: Any
    answers: list[Any]
    missing: int
    asked_at: float
    asked_s: float


class Group:
    """The workers of one replica, through the lives of several sets of actors.

    A group's life is a chain of steps: ping, (meet,) load, tokens, compile for each shape, predict
    for each batch. `calls` holds what is under way: reference -> (step, place of its answer).

    Args:
        strategy: how the members hold the replica together; None where one holds it whole.
        family: the backbone's class, which names the layout rules of tensor parallelism.
        timeline: keeps what each member did when.
        specs: one a member; they differ in paths alone, where members are on several machines.
    """

    def __init__(
        self,
        slots: tuple[WorkerSlot, ...],
        *,
        strategy: Strategy | None,
        family: str,
        specs: Sequence[ModelSpec],
        verbose: bool,
        timeline: Timeline,
        log_folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self._timeline = timeline
        self.stats = [WorkerStats(slot.replica, slot.member, slot.kind) for slot in slots]
        self.calls: dict[Any, tuple[Step, int]] = {}
        self.in_flight: deque[Batch] = deque()
        self.warm: set[BatchShape] = set()
        # Shapes of which this life of the actors has finished a batch.
        self.used: set[BatchShape] = set()
        self.compiling: BatchShape | None = None
        self.compiling_since = 0.0
        self.loaded = self.has_tokens = self.given_up = False
        # Those that count against it: not those that a batch explains.
        self.restarts = 0
        self.ready_at: float | None = None
        self.device = slots[0].kind
        self.finished_at = 0.0
        # By the dispatcher's clock; None before its actors were ever ready.
        self.spawned_at = 0.0
        self.start_s: float | None = None
        self._compile_times = Intervals()
        self._clock = clock
        self._alive_s = 0.0
        self._strategy = strategy
        self._name = strategy.name if strategy else None
        self._family = family
        self.specs = tuple(specs)
        # Of this machine, whatever a worker's own folder is.
        self._log_folder = str(log_folder.resolve()) if log_folder is not None else None
        self._verbose = verbose
        self._actors: list[Any] = []
        self._placement = _reserve(slots)

    @property
    def number(self) -> int:
        return self.slots[0].replica

    @property
    def node(self) -> str:
        """The machine of its first member, empty where there is one machine."""
        return self.slots[0].node

    @property
    def members(self) -> int:
        return len(self.slots)

    @property
    def is_ready(self) -> bool:
        return self.ready_at is not None

    @property
    def strategy_name(self) -> str | None:
        return self._name

    @property
    def noun(self) -> str:
        return "worker" if self._strategy is None else "group"

    @property
    def most_in_flight(self) -> int:
        """Batches to have under way at a time."""
        if self._name == "pipeline":
            return len(self.slots) + EXTRA_IN_PIPELINE
        return BATCHES_IN_FLIGHT

    def spawn(self) -> None:
        """Fill the slots with new actors and send them to load."""
        self.spawned_at = self._clock()
        plain = ACTORS[self._name]
        self._actors = [
            self._actor_class(plain, slot.member).remote(
                slot, verbose=self._verbose, log_folder=self._log_folder
            )
            for slot in self.slots
        ]
        self._ask("ping", [actor.ping.remote() for actor in self._actors])
        if self._strategy is None:
            self._ask("load", [self._actors[0].load.remote(self.specs[0])])
        elif self._name == "pipeline":
            parts = zip(self._actors, self.specs, self._strategy.stages, strict=True)
            self._ask("load", [actor.load.remote(spec, stage) for actor, spec, stage in parts])
        # The members of a tensor group load when they know where to meet.

    def go_on_after(self, step: Step) -> None:
        """Keep when a step of starting up was done, and ask for what must follow."""
        if what := {"ping": STARTING, "load": LOADING}.get(step.what):
            for slot in self.slots:
                self._timeline.add(what, slot.replica, slot.member, step.asked_s)
        if step.what == "ping" and self._name == "tensor":
            if folder := private_folder():
                self._meet_at(f"unix:{folder}/{secrets.token_hex(4)}")
                return
            machines = set(step.answers)
            host = "127.0.0.1" if len(machines) == 1 else step.answers[0]
            self._ask("meet", [self._actors[0].reserve_address.remote(host)])
        elif step.what == "meet":
            self._meet_at(step.answers[0])

    def _meet_at(self, address: str) -> None:
        arguments = (address, len(self.slots), self._family)
        pairs = zip(self._actors, self.specs, strict=True)
        self._ask("load", [actor.load.remote(spec, *arguments) for actor, spec in pairs])

    def take_load(self, answers: list[WorkerInfo]) -> None:
        self.loaded = True
        self.device = answers[0].device.split(",")[0]
        for stats, info in zip(self.stats, answers, strict=True):
            stats.introduce(info)

    def hand_tokens(self, tokens: Any) -> None:
        """Give the reference of the token table to those who read it."""
        # Of a pipeline only the first stage sees tokens.
        self.has_tokens = False
        readers = self._actors[:1] if self._name == "pipeline" else self._actors
        self._ask("tokens", [actor.hold_tokens.remote(tokens) for actor in readers])

    def compile(self, shape: BatchShape) -> None:
        self.compiling, self.compiling_since = shape, self._clock()
        self._compile_times.begin(self.compiling_since)
        self._ask(
            "compile",
            [
                actor.compile.options(concurrency_group="compile").remote(shape)
                for actor in self._actors
            ],
            shape,
        )

    def take_compiled(self, step: Step) -> None:
        self.warm.add(step.payload)
        self.compiling = None
        self._compile_times.end(self._clock())
        for stats, answer in zip(self.stats, step.answers, strict=True):
            stats.count_compiled(answer)
            self._timeline.add(
                *(COMPILING, stats.replica, stats.member, step.asked_s),
                ended_s=min(step.asked_s + answer.seconds, self._timeline.now()),
                shape=step.payload,
                is_cached=answer.cached,
            )

    def start(self, batch: Batch) -> None:
        """Send a batch on its way."""
        self.in_flight.append(batch)

        def call(method: Any, *arguments: Any) -> Any:
            return method.options(concurrency_group="predict").remote(*arguments)

        if self._name != "pipeline":
            calls = [call(actor.predict, batch) for actor in self._actors]
        else:
            first, *between, last = self._actors
            activations = call(first.begin, batch)
            for actor in between:
                activations = call(actor.carry_on, activations)
            calls = [call(last.finish, batch, activations)]
        self._ask("predict", calls, batch)

    def replace_by_one(self, tokens: Any) -> Any:
        """End the group; return a new actor in the place of its first member, who holds no model.

        The members of a tensor group cannot compute alone, and a device has no room for more.
        """
        self.end()
        actor = self._actor_class(Replica).remote(
            self.slots[0], verbose=self._verbose, log_folder=self._log_folder
        )
        actor.hold_tokens.remote(tokens)
        self._actors = [actor]
        return actor

    def take_result(self, step: Step) -> tuple[BatchResult, float, float]:
        """Count a finished batch; return its result, the seconds it took, those in line behind
        other batches left out, and for how many of them the group compiled besides."""
        self.in_flight.remove(step.payload)
        now = self._clock()
        began = max(step.asked_at, self.finished_at)
        self.finished_at = now
        result: BatchResult = step.answers[0]
        # Each member of a tensor group answers for itself; a pipeline's last stage for all.
        work = [entry for answer in step.answers for entry in answer.work]
        for stats, entry in zip(self.stats, work, strict=True):
            stats.count(len(result.batch.rows), entry)
        self._timeline.predicted(result.batch, self.number, work, step.asked_s)
        return result, now - began, self._compile_times.within(began, now)

    def drop(self, step: Step) -> None:
        """Forget a batch that failed; its other members' calls too."""
        for slot in self.slots:
            lane = (slot.replica, slot.member)
            self._timeline.add(LOST, *lane, step.asked_s, batch=step.payload)
        self.in_flight.remove(step.payload)
        self.forget(step)
        self.finished_at = self._clock()

    def forget(self, step: Step) -> None:
        """Wait no longer for the calls of a step."""
        for reference in [ref for ref, (of, _) in self.calls.items() if of is step]:
            del self.calls[reference]

    def has_lost_a_member(self) -> bool:
        """Whether a process of a group of several has ended: what one of the others then fails
        with says nothing of the work."""
        if len(self._actors) < 2:
            return False
        pings = [actor.ping.remote() for actor in self._actors]
        # Those that still wait for the dead one do not answer.
        ready, _ = ray.wait(pings, num_returns=len(pings), timeout=DEATH_IS_KNOWN_WITHIN_S)
        for ping in ready:
            try:
                ray.get(ping)
            except ray.exceptions.RayActorError:
                return True
            except ray.exceptions.RayError:
                continue
        return False

    def oldest(self) -> Iterator[tuple[Step, float]]:
        """Yield each step that is being worked at, and since when; batches behind others wait."""
        steps = dict.fromkeys(step for step, _ in self.calls.values())
        predicting = [step for step in steps if step.what == "predict"]
        for step in steps:
            if step.what != "predict":
                yield step, step.asked_at
            elif step is predicting[0]:
                yield step, max(step.asked_at, self.finished_at)

    def end(self, *, is_over: bool = False) -> tuple[Batch, ...]:
        """End all actors and return the batches in flight, the oldest first.

        The members of a group cannot go on without each other, and may hang: they end together.

        Args:
            is_over: whether the run is; a worker that was still starting is then no fault.
        """
        batches = tuple(self.in_flight)
        self._mark_lost(is_over)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        for left in (self.calls, self.in_flight, self.warm, self.used):
            left.clear()
        self.stop_clock()
        self.loaded = self.has_tokens = False
        self.compiling = None
        self._compile_times.end(self._clock())
        return batches

    def _mark_lost(self, is_over: bool) -> None:
        """Keep what the workers were at that no answer comes of, a batch above all."""
        steps = sorted((step for step, _ in self.oldest()), key=lambda one: one.what != "predict")
        for step in steps[:1]:
            batch = step.payload if step.what == "predict" else None
            what = {"ping": STARTING, "load": LOADING, "compile": COMPILING}.get(step.what, LOST)
            shape = step.payload if step.what == "compile" else None
            for slot in self.slots:
                lane = (slot.replica, slot.member, step.asked_s)
                if is_over and what != LOST:
                    self._timeline.add(what, *lane, shape=shape)
                else:
                    self._timeline.add(LOST, *lane, batch=batch)

    def give_up(self) -> tuple[Batch, ...]:
        """End all actors for good, and leave their places to others."""
        self.given_up = True
        batches = self.end()
        remove_placement_group(self._placement)
        return batches

    def stop_clock(self) -> None:
        """Settle how long the workers were ready and how much of that they were idle."""
        if self.ready_at is not None:
            self._alive_s += time.monotonic() - self.ready_at
            self.ready_at = None
        for stats in self.stats:
            stats.idle_s = max(0.0, self._alive_s - stats.busy_s)

    def _actor_class(self, plain: type, member: int = 0) -> Any:
        """Return the Ray actor class of a plain one, for the device of a member."""
        threads = {"compile": 1, "predict": PREDICTING_THREADS[self._name]}
        devices = _devices(self.slots[member])
        return ray.remote(concurrency_groups=threads)(plain).options(
            num_cpus=self.slots[member].cpus,
            num_gpus=devices.pop(GPU.resource, 0),  # Ray takes it by this name alone
            resources=devices or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=member
            ),
        )

    def _ask(self, what: str, calls: list[Any], payload: Any = None) -> None:
        step = Step(
            what, payload, [None] * len(calls), len(calls), self._clock(), self._timeline.now()
        )
        for place, reference in enumerate(calls):
            self.calls[reference] = (step, place)


def _devices(slot: WorkerSlot) -> dict[str, int]:
    """What a worker takes of a machine beside CPUs, as Ray names it."""
    kind = KINDS[slot.kind]
    return {} if kind.is_host else {kind.resource: 1}


def _reserve(slots: Sequence[WorkerSlot]) -> Any:
    """Reserve what a group's members need: in a cluster on the nodes that were chosen, else on
    one node where one has room for them."""
    bundles = [{"CPU": float(slot.cpus), **_devices(slot)} for slot in slots]
    nodes = [slot.node for slot in slots]
    if not all(nodes):
        return placement_group(bundles, strategy="PACK")
    return placement_group(
        bundles,
        strategy="STRICT_PACK" if len(set(nodes)) == 1 else "PACK",
        bundle_label_selector=[{"ray.io/node-id": node} for node in nodes],
    )
