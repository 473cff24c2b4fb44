"""Ray and its clock as arithmetic: runs of many workers in the test's own process, in milliseconds.

`SimulatedRay` stands in for the module `ray` where the driver uses it. The driver, its dispatcher,
the actor shells of `runner/model/` and the faults of `runner/model/injected_faults.py` are the real
ones. In the place of a model is arithmetic on token ids (`tests.support.fakes.answer`), and in the
place of processes are calls that take simulated seconds, in the order of events. A worker dies,
hangs, fails or is slow when a test says so. Time passes only while the driver waits.
"""

import functools
import heapq
import importlib.metadata
import json
import pickle
import signal
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import ray
import ray.exceptions

import runner.cli
import runner.common.files
import runner.common.machine
import runner.data.inputs
import runner.data.submission
import runner.driver.passes
import runner.driver.run
import runner.driver.setting
import runner.driver.swap_pass
import runner.executors.ray.actors
import runner.executors.ray.calls
import runner.executors.ray.crew
import runner.executors.ray.failures
import runner.executors.ray.group
import runner.executors.ray.keepers
import runner.executors.ray.nodes
import runner.executors.ray.places
import runner.executors.ray.replicas
import runner.executors.ray.session
import runner.executors.single
import runner.model.injected_faults
import runner.model.stage_worker
import runner.model.worker
import runner.report.gather
import runner.results.journal
import runner.telemetry.progress
import runner.telemetry.timeline
from runner.common.records import CompileInfo, Examples, ModelSpec, TokenTable, WorkerInfo
from runner.config.task import CONTEST
from runner.data.dataset import read_examples
from runner.data.prompts import render_prompts
from runner.data.tokenization import tokenize
from runner.driver.swap_pass import swap
from runner.model.injected_faults import VARIABLE
from runner.model.slice_worker import TensorMember
from runner.model.stage_worker import PipelineStage
from runner.model.worker import Replica
from runner.preset.reader import read_preset
from runner.preset.tokenizer_files import TokenizerFiles
from sharding.batches import BatchShape
from sharding.stages import StageLayers
from sharding.topology import WorkerSlot
from tests.conftest import TOLERANCE
from tests.support.fakes import answer, write_fake_job

FOREVER = float("inf")
# By `time.monotonic()` and `time.time()` when a simulation begins.
MONOTONIC_START, WALL_START = 1000.0, 1.7e9
# Of the preset of `Job`.
LAYERS = 3
# A sleep of more seconds is one that does not end.
LONGEST_SLEEP_S = 1e5


class Dies(BaseException):
    """The process that a call runs in ends."""


class Hangs(BaseException):
    """A call does not return."""


class Ends(BaseException):
    """The guard has ended the driver's process.

    Attributes:
        code: its exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Clock:
    """Simulated seconds, and what happens when.

    Attributes:
        now: seconds since the simulation began. suspended_s: for so long the machine was
            suspended, which `time.monotonic()` counts and no worker notices.
    """

    def __init__(self) -> None:
        self.now = self.suspended_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.threads: list[SimulatedThread] = []

    def at(self, moment: float, happens: Callable[[], None]) -> None:
        """Let something happen at a moment, after what else happens then."""
        self._order += 1
        heapq.heappush(self._events, (max(moment, self.now), self._order, happens))

    def wait(self, is_done: Callable[[], bool], until: float = FOREVER) -> None:
        """Let time pass until something is so, or until a moment."""
        own = next((one for one in self.threads if one.is_current()), None)
        if own is not None:
            own.park(is_done, until)
            return
        while True:
            for one in [*self.threads]:
                one.go_on()
            if is_done():
                return
            due = self._events[0][0] if self._events else FOREVER
            due = min(due, *(one.until for one in self.threads), FOREVER)
            assert min(due, until) < FOREVER, "this is a bug: nothing will happen any more"
            if due > until:
                self.now = max(self.now, until)
                return
            self.now = max(self.now, due)
            if self._events and self._events[0][0] <= due:
                heapq.heappop(self._events)[2]()


class SimulatedThread:
    """A thread that runs only while the driver waits, in the place of `threading.Thread`."""

    def __init__(self, clock: Clock, target: Callable[..., None], args: Sequence[Any]) -> None:
        self._clock = clock
        self._is_done: Callable[[], bool] = lambda: True
        self.until = clock.now
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(target, args), daemon=True)

    def start(self) -> None:
        self._clock.threads.append(self)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Let it end, which it does as soon as it looks whether it should."""
        until = FOREVER if timeout is None else self._clock.now + timeout
        self._clock.wait(lambda: self not in self._clock.threads, until)

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def park(self, is_done: Callable[[], bool], until: float) -> None:
        """Called in the thread: wait, and let the others go on."""
        if is_done():
            return
        self._is_done, self.until = is_done, until
        self._back.release()
        self._turn.acquire()

    def go_on(self) -> None:
        """Called by the driver: let it run until it waits again, if it need not wait now."""
        if self._is_done() or self.until <= self._clock.now:
            self._is_done, self.until = (lambda: False), FOREVER
            self._turn.release()
            self._back.acquire()

    def _run(self, target: Callable[..., None], args: Sequence[Any]) -> None:
        self._turn.acquire()
        try:
            target(*args)
        finally:
            self._clock.threads.remove(self)
            self._back.release()


class SimulatedEvent:
    """In the place of `threading.Event`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float = FOREVER) -> bool:
        self._clock.wait(self.is_set, self._clock.now + timeout)
        return self._is_set


@dataclass(frozen=True)
class Server:
    """One of Ray's own processes, which has ended."""

    returncode: int


class ObjectRef:
    """What a call will answer, or what was put into the store."""

    def __init__(self) -> None:
        self.is_ready = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.then: list[Callable[[], None]] = []

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        if self.is_ready:
            return
        self.is_ready, self.value, self.error = True, value, error
        then, self.then = self.then, []
        for follow in then:
            follow()


@dataclass(eq=False)
class Call:
    """One call of an actor's method; `spent_s` grows while the method runs."""

    actor: "Actor"
    method: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    group: str | None
    reference: ObjectRef = field(default_factory=ObjectRef)
    started: float = 0.0
    spent_s: float = 0.0
    meeting: "Meeting | None" = None

    @property
    def ends_at(self) -> float:
        return self.started + self.spent_s


class Meeting:
    """A collective operation: none of the calls in it ends before all members have come."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[tuple[Call, Callable[[], None]]] = []


class Actor:
    """A process of a worker: its calls, in the threads of each concurrency group.

    Args:
        starts_at: when its bundle is free and the process is up, at the earliest.
    """

    def __init__(
        self,
        world: "SimulatedRay",
        plain: type,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        threads: dict[str, int],
        node: str,
    ) -> None:
        self.world, self.plain, self.node = world, plain, node
        self.instance: Any = None
        slot = arguments[0] if arguments and isinstance(arguments[0], WorkerSlot) else None
        self.replica = slot.replica if slot is not None else None
        self.member = slot.member if slot is not None else None
        self._made_of = arguments, named
        self._threads: dict[str | None, int] = {None: 1, **threads}
        self._queues: dict[str | None, deque[Call]] = defaultdict(deque)
        self._running: list[Call] = []
        self.device_free_at = 0.0
        self.is_dead = self.is_known_dead = False
        self.collectives = 0
        self.address = ""

    def begin(self) -> None:
        """The process is up."""
        if self.is_dead:
            return
        arguments, named = self._made_of
        self.instance = self.plain(*_copied(arguments), **_copied(named))
        self.pump()

    def ask(self, call: Call) -> ObjectRef:
        if self.is_known_dead:
            self.world.clock.at(self.world.clock.now, lambda: self._lose(call))
        else:
            self._queues[call.group].append(call)
            self.world.clock.at(self.world.clock.now, self.pump)
        return call.reference

    def pump(self) -> None:
        """Start the calls that there is a thread for and whose arguments are there."""
        if self.instance is None or self.is_dead:
            return
        for group, queue in [*self._queues.items()]:
            while queue and self._busy(group) < self._threads[group] and not self.is_dead:
                missing = [
                    one for one in queue[0].arguments
                    if isinstance(one, ObjectRef) and not one.is_ready
                ]  # fmt: skip
                if missing:
                    missing[0].then.append(self.pump)
                    break
                self._start(queue.popleft())

    def _busy(self, group: str | None) -> int:
        return sum(call.group == group for call in self._running)

    def _start(self, call: Call) -> None:
        clock, world = self.world.clock, self.world
        self._running.append(call)
        call.started = clock.now
        value, error = None, None
        before, world.current = world.current, call
        try:
            for strike in [*world.strikes]:
                strike(call)
            value = _copied(
                getattr(self.instance, call.method)(*self._resolved(call), **call.named)
            )
        except Dies:
            clock.at(call.ends_at, self.die)
            return
        except Hangs:
            return
        except ray.exceptions.RayError as failure:
            error = failure
            if isinstance(failure, (ray.exceptions.RayTaskError, ray.exceptions.RayActorError)):
                error = _task_error(call, failure)  # handed on with an argument
        except Exception as failure:
            error = _task_error(call, failure)
        finally:
            world.current = before

        def end() -> None:
            if not self.is_dead and call in self._running:
                self._running.remove(call)
                call.reference.settle(value, error)
                self.pump()

        if call.meeting is None or error is not None:
            clock.at(call.ends_at, end)
            return
        waiting = call.meeting.waiting
        waiting.append((call, end))
        if len(waiting) == call.meeting.size:
            ends_at = max(one.ends_at for one, _ in waiting)
            for _, end_of_one in waiting:
                clock.at(ends_at, end_of_one)

    def _resolved(self, call: Call) -> list[Any]:
        values = []
        for one in call.arguments:
            if not isinstance(one, ObjectRef):
                values.append(_copied(one))
                continue
            if one.error is not None:
                raise one.error
            values.append(one.value)
        return values

    def fail(self, call: Call, error: Exception) -> None:
        """End a call that is under way in an error."""
        if call in self._running and not self.is_dead:
            self._running.remove(call)
            call.reference.settle(error=_task_error(call, error))
            self.pump()

    def die(self, known_in_s: float | None = None) -> None:
        """End the process; who waits for it hears of it a little later."""
        if self.is_dead:
            return
        self.is_dead = True
        world = self.world
        world.free_bundle(self)
        world.tell_members(self)
        world.clock.at(
            world.clock.now + (world.death_is_known_s if known_in_s is None else known_in_s),
            self._lose_all,
        )

    def _lose_all(self) -> None:
        self.is_known_dead = True
        for call in [*self._running, *(one for queue in self._queues.values() for one in queue)]:
            self._lose(call)

    def _lose(self, call: Call) -> None:
        call.reference.settle(error=ray.exceptions.ActorDiedError())


class Handle:
    """What the driver has of an actor."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> "Method":
        if name.startswith("_") or not hasattr(self._actor.plain, name):
            raise AttributeError(name)
        return Method(self._actor, name)


class Method:
    """`actor.method`, to be called with `.remote(...)`."""

    def __init__(self, actor: Actor, name: str, group: str | None = None) -> None:
        self._actor, self._name, self._group = actor, name, group

    def options(self, *, concurrency_group: str) -> "Method":
        return Method(self._actor, self._name, concurrency_group)

    def remote(self, *arguments: Any, **named: Any) -> ObjectRef:
        return self._actor.ask(Call(self._actor, self._name, arguments, named, self._group))


class ActorClass:
    """What `ray.remote` makes of a class."""

    def __init__(self, world: "SimulatedRay", plain: type, threads: dict[str, int]) -> None:
        self._world, self._plain, self._threads = world, plain, threads
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> "ActorClass":
        made = ActorClass(self._world, self._plain, self._threads)
        made._options = self._options | options
        return made

    def remote(self, *arguments: Any, **named: Any) -> Handle:
        strategy = self._options.get("scheduling_strategy")
        node = getattr(strategy, "node_id", "")
        placement = getattr(strategy, "placement_group", None)
        bundle = getattr(strategy, "placement_group_bundle_index", 0)
        if placement is not None:
            node = placement.nodes[bundle]
        actor = Actor(self._world, self._plain, arguments, named, self._threads, node)
        self._world.start(actor, placement, bundle)
        return Handle(actor)


@dataclass(eq=False)
class PlacementGroup:
    """Bundles that are reserved; each holds one actor at a time, and others wait for it."""

    nodes: list[str]
    cpus: list[float]
    held: dict[int, Actor] = field(default_factory=dict)
    waiting: dict[int, deque[Actor]] = field(default_factory=lambda: defaultdict(deque))
    is_removed: bool = False


class SimulatedRay:
    """The module `ray`, and the machine that it runs on.

    Attributes:
        clock: its time. starts_s, loads_s, compiles_s: seconds of a worker's start, its load and
            one shape; from_cache_s: of a shape that another has compiled. token_s: of a padded
            token, on one device. speeds: of a replica, how many times as fast. dtypes: of a
            replica, what `auto` means there. death_is_known_s: until callers hear of a death;
            members_hear_s: until the other members of its group fail, None for never.
        strikes: called as each call begins; may raise `Dies`, `Hangs` or an error.
        store_is_full: whether nothing can be put.
        calls: (seconds, replica, member, method) of all calls, in order. compiled: (replica,
            shape) of all programs.
    """

    exceptions = ray.exceptions
    ObjectRef = ObjectRef

    def __init__(self) -> None:
        self.clock = Clock()
        self.starts_s, self.loads_s = 1.0, 2.0
        self.compiles_s, self.from_cache_s = 0.5, 0.1
        self.token_s, self.float_s = 0.00025, 1.0
        self.speeds: dict[int, float] = {}
        self.dtypes: dict[int, str] = {}
        self.death_is_known_s = 0.1
        self.members_hear_s: float | None = None
        self.strikes: list[Callable[[Call], None]] = []
        self.store_is_full = False
        self.current: Call | None = None
        self.actors: list[Actor] = []
        self.calls: list[tuple[float, int | None, int | None, str]] = []
        self.compiled: list[tuple[int | None, BatchShape]] = []
        self.dead_servers: list[tuple[str, Server]] = []
        self.alive: dict[str, int] = {}
        self._groups: list[PlacementGroup] = []
        self._placed: dict[Actor, tuple[PlacementGroup, int]] = {}
        self._meetings: dict[str, dict[Any, Meeting]] = defaultdict(dict)
        self._programs: set[Any] = set()
        self._private = SimpleNamespace(
            state=SimpleNamespace(available_resources_per_node=self._free_on_nodes)
        )
        self.strikes.append(self._keep)

    # What the driver calls.

    def remote(
        self, plain: type | None = None, *, concurrency_groups: dict[str, int] | None = None
    ) -> Any:
        if plain is not None:
            return ActorClass(self, plain, {})
        return lambda plain: ActorClass(self, plain, concurrency_groups or {})

    def put(self, value: Any) -> ObjectRef:
        if self.store_is_full:
            raise ray.exceptions.ObjectStoreFullError("Failed to put object: no room.")
        reference = ObjectRef()
        reference.settle(_copied(value))
        return reference

    def wait(
        self, references: Sequence[ObjectRef], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[ObjectRef], list[ObjectRef]]:
        assert len(set(references)) == len(references) >= num_returns

        def is_done() -> bool:
            return sum(one.is_ready for one in references) >= num_returns

        self.clock.wait(lambda: False, self.clock.now)  # what happens now has happened
        self.clock.wait(is_done, FOREVER if timeout is None else self.clock.now + timeout)
        ready = [one for one in references if one.is_ready][:num_returns]
        return ready, [one for one in references if one not in ready]

    def get(self, reference: ObjectRef, *, timeout: float | None = None) -> Any:
        until = FOREVER if timeout is None else self.clock.now + timeout
        self.clock.wait(lambda: reference.is_ready, until)
        if not reference.is_ready:
            raise ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")
        error = reference.error
        if isinstance(error, ray.exceptions.RayTaskError):
            raise error.as_instanceof_cause()
        if error is not None:
            raise error
        return _copied(reference.value)

    def kill(self, handle: Handle) -> None:
        handle._actor.die(known_in_s=0.0)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": _node_id(name), "NodeName": name, "Alive": cpus > 0}
            for name, cpus in self.alive.items()
        ]

    def placement_group(
        self,
        bundles: Sequence[dict[str, float]],
        *,
        strategy: str,
        bundle_label_selector: Sequence[dict[str, str]] | None = None,
    ) -> PlacementGroup:
        chosen = bundle_label_selector or [{} for _ in bundles]
        nodes = [one.get("ray.io/node-id", "") for one in chosen]
        made = PlacementGroup(nodes, [bundle["CPU"] for bundle in bundles])
        self._groups.append(made)
        return made

    def remove_placement_group(self, group: PlacementGroup) -> None:
        group.is_removed = True

    # What a test arranges.

    def strike(
        self,
        method: str,
        action: Callable[[Call], None],
        *,
        replica: int | None = None,
        member: int | None = None,
        times: int = 1,
        after: int = 0,
    ) -> None:
        """Do something as a call begins: of a method, of a replica and a member or all, so many
        times, after so many calls were spared."""
        left = [after, times]

        def look(call: Call) -> None:
            is_meant = (
                call.method == method
                and replica in (None, call.actor.replica)
                and member in (None, call.actor.member)
            )
            if not is_meant:
                return
            if left[0]:
                left[0] -= 1
            elif left[1]:
                left[1] -= 1
                action(call)

        self.strikes.append(look)

    def dies(self, method: str, *, after_s: float = 0.05, **which: Any) -> None:
        """A worker dies in a call, so many seconds after it began."""

        def die(call: Call) -> None:
            self.spend(after_s)
            raise Dies

        self.strike(method, die, **which)

    def hangs(self, method: str, **which: Any) -> None:
        """A call does not return."""

        def hang(call: Call) -> None:
            raise Hangs

        self.strike(method, hang, **which)

    def fails(self, method: str, error: Exception, **which: Any) -> None:
        """A call ends in an error."""

        def fail(call: Call) -> None:
            raise error

        self.strike(method, fail, **which)

    def suspend(self, seconds: float, *, at: float) -> None:
        """Suspend the machine: its clock goes on, and nothing else."""

        def jump() -> None:
            self.clock.suspended_s += seconds

        self.clock.at(at, jump)

    def interrupt(self, *, at: float) -> None:
        """The driver gets SIGINT."""

        def interrupt() -> None:
            raise KeyboardInterrupt

        self.clock.at(at, interrupt)

    def add_node(self, name: str, cpus: int, *, at: float = 0.0) -> None:
        self.clock.at(at, lambda: self.alive.update({name: cpus}))

    def lose_node(self, name: str, *, at: float) -> None:
        """A machine of the cluster is gone, and all workers there."""

        def lose() -> None:
            self.alive[name] = 0
            for actor in self.actors:
                if actor.node == _node_id(name):
                    actor.die()

        self.clock.at(at, lose)

    def called(self, method: str, replica: int | None = None) -> list[float]:
        """Return when a method was begun, in seconds."""
        return [
            at for at, of, _, name in self.calls
            if name == method and replica in (None, of)
        ]  # fmt: skip

    # What workers do.

    def spend(self, seconds: float) -> None:
        """The call that runs takes so many seconds more. Nothing in the driver's own process."""
        if self.current is not None:
            self.current.spent_s += seconds

    def compute(self, tokens: float) -> None:
        """The device of the call that runs computes so many tokens; one batch after the other."""
        call = self.current
        if call is None:
            return
        seconds = tokens * self.token_s / self.speeds.get(call.actor.replica or 0, 1.0)
        done_at = max(call.ends_at, call.actor.device_free_at) + seconds
        call.actor.device_free_at, call.spent_s = done_at, done_at - call.started

    def compile(self, program: tuple[object, BatchShape]) -> CompileInfo:
        if self.current is not None:
            self.compiled.append((self.current.actor.replica, program[1]))
        is_cached = program in self._programs
        self._programs.add(program)
        seconds = self.from_cache_s if is_cached else self.compiles_s
        self.spend(seconds)
        return CompileInfo(seconds, is_cached)

    def meet(self, address: str, size: int) -> None:
        """The call that runs does not end before its like of every member of the group."""
        call = self.current
        assert call is not None, "this is a bug: groups are of actors"
        call.actor.address = address
        call.actor.collectives += 1
        found = self._meetings[address].setdefault(call.actor.collectives, Meeting(size))
        call.meeting = found

    def start(self, actor: Actor, placement: PlacementGroup | None, bundle: int) -> None:
        self.actors.append(actor)
        if placement is None:
            self.clock.at(self.clock.now + self.starts_s, actor.begin)
            return
        assert not placement.is_removed, "this is a bug: an actor in a bundle that was given back"
        self._placed[actor] = placement, bundle
        if bundle in placement.held:
            placement.waiting[bundle].append(actor)
        else:
            self._begin(actor)

    def free_bundle(self, actor: Actor) -> None:
        placement, bundle = self._placed.get(actor, (None, 0))
        if placement is None or placement.held.get(bundle) is not actor:
            return
        del placement.held[bundle]
        if placement.waiting[bundle]:
            self._begin(placement.waiting[bundle].popleft())

    def _begin(self, actor: Actor) -> None:
        placement, bundle = self._placed[actor]
        placement.held[bundle] = actor
        self.clock.at(self.clock.now + self.starts_s, actor.begin)

    def tell_members(self, dead: Actor) -> None:
        """The other members of a group wait for the dead one, or fail."""
        if self.members_hear_s is None or not dead.address:
            return
        for meeting in self._meetings[dead.address].values():
            for call, _ in meeting.waiting:
                self.clock.at(
                    self.clock.now + self.members_hear_s,
                    lambda call=call: call.actor.fail(  # type: ignore[misc]
                        call, RuntimeError("Gloo: Connection closed by peer")
                    ),
                )

    def _keep(self, call: Call) -> None:
        actor = call.actor
        self.calls.append((self.clock.now, actor.replica, actor.member, call.method))

    def _free_on_nodes(self) -> dict[str, dict[str, float]]:
        free = {_node_id(name): float(cpus) for name, cpus in self.alive.items()}
        for group in self._groups:
            for node, cpus in zip(group.nodes, group.cpus, strict=True):
                free[node] -= 0.0 if group.is_removed else cpus
        return {name: {"CPU": count, "GPU": count} for name, count in free.items()}


def _node_id(name: str) -> str:
    """Ray's own are 28 bytes, in hexadecimal digits."""
    return name.encode().hex().ljust(56, "0")


def _copied(value: Any) -> Any:
    """What arrives in another process."""
    return pickle.loads(pickle.dumps(value))


def _task_error(call: Call, error: BaseException) -> ray.exceptions.RayTaskError:
    said = "".join(traceback.format_exception(error))
    name = f"{call.actor.plain.__name__}.{call.method}"
    return ray.exceptions.RayTaskError(name, said, error, f"ray::{name}", 1, "127.0.0.1")


# ---- workers


class _Predictor:
    """In the place of a model: arithmetic on token ids, in simulated seconds.

    Args:
        share: of the model that this worker computes.
        is_last: whether what comes out are answers; else the token ids that came in.
        name: of its programs, beside those of other members.
        meets: of a tensor group, its address and size.
    """

    def __init__(
        self,
        world: SimulatedRay,
        *,
        share: float = 1.0,
        is_last: bool = True,
        name: object = None,
        meets: tuple[str, int] | None = None,
    ) -> None:
        self._world, self._share, self._is_last = world, share, is_last
        self._name, self._meets = name, meets

    def compile(self, shape: BatchShape) -> CompileInfo:
        return self._world.compile((self._name, shape))

    def predict(self, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return answers, float32 (rows, classes), to token ids int32 (rows, length)."""
        self._world.compute(values.size * self._share)
        if self._meets is not None:
            self._world.meet(*self._meets)
        return _answers(values, lengths) if self._is_last else values


def _answers(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    rows = [answer(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    return np.stack(rows).astype(np.float32)


class _Simulated(Replica):
    """What the three kinds of workers have in common here."""

    world: ClassVar[SimulatedRay]

    def find_device(self, dtype: str, compilation_cache: str | None) -> tuple[str, str]:
        return "cpu", "float32" if dtype == "auto" else dtype

    def _take(self, predictor: _Predictor, dtype: str) -> WorkerInfo:
        self._predictor = predictor
        self.world.spend(self.world.loads_s)
        dtype = self.world.dtypes.get(self._slot.replica, dtype)
        return WorkerInfo("cpu", "simulated", dtype, 1000, 0, self.world.loads_s, 1e9, "fake")


class SimulatedReplica(_Simulated):
    def load(self, spec: ModelSpec) -> WorkerInfo:
        return self._take(_Predictor(self.world), spec.dtype)


class SimulatedStage(_Simulated, PipelineStage):
    def load(self, spec: ModelSpec, stage: StageLayers | None = None) -> WorkerInfo:
        assert stage is not None, "this is a bug: a stage must know its layers"
        predictor = _Predictor(
            self.world,
            share=(stage.stop - stage.start) / LAYERS,
            is_last=stage.stop == LAYERS,
            name=stage,
        )
        return self._take(predictor, spec.dtype)


class SimulatedMember(_Simulated, TensorMember):
    def load(
        self, spec: ModelSpec, address: str = "", group_size: int = 0, family: str = ""
    ) -> WorkerInfo:
        self.world.meet(address, group_size)
        predictor = _Predictor(
            self.world,
            share=1 / group_size,
            name=self._slot.member,
            meets=(address, group_size),
        )
        return self._take(predictor, spec.dtype)


# ---- the driver


_version = functools.cache(importlib.metadata.version)
_tokenized: dict[Any, TokenTable] = {}


def _tokenize(
    texts: list[str],
    files: TokenizerFiles,
    *,
    sequence_length: int,
    on_progress: Callable[[int], None],
) -> TokenTable:
    """`runner.data.tokenization.tokenize`, once for the same texts."""
    key = (tuple(texts), files.vocabulary, sequence_length)
    if key not in _tokenized:
        _tokenized[key] = tokenize(texts, files, sequence_length=sequence_length)
    on_progress(len(texts))
    return _tokenized[key]


class SimulatedTime:
    """The module `time`, as the driver and its workers see it."""

    def __init__(self, world: SimulatedRay) -> None:
        self._world = world

    def monotonic(self) -> float:
        call = self._world.current
        if call is not None:
            return MONOTONIC_START + call.ends_at
        return MONOTONIC_START + self._world.clock.now + self._world.clock.suspended_s

    perf_counter = monotonic

    def time(self) -> float:
        return self.monotonic() - MONOTONIC_START + WALL_START

    def sleep(self, seconds: float) -> None:
        if self._world.current is None:
            self._world.clock.wait(lambda: False, self._world.clock.now + seconds)
        elif seconds > LONGEST_SLEEP_S:
            raise Hangs
        else:
            self._world.spend(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class SimulatedGuard:
    """`runner.driver.guard.Guard` by the simulated clock: `Ends` is raised in the driver."""

    world: ClassVar[SimulatedRay]

    def __init__(self, at: float | None, act: Callable[[], int]) -> None:
        self._act, self._is_off, self._number = act, False, 0
        self._set(at)

    def __enter__(self) -> "SimulatedGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.call_off()

    def call_off(self) -> None:
        self._is_off = True

    def postpone(self, at: float | None) -> None:
        self._set(at)

    def _set(self, at: float | None) -> None:
        self._number = number = self._number + 1

        def act() -> None:
            if not self._is_off and number == self._number:
                self._is_off = True
                raise Ends(self._act())

        if at is not None:
            self.world.clock.at(at - MONOTONIC_START - self.world.clock.suspended_s, act)


class _Tokenizing(Future):
    """A future whose work was done at once, and is there after some simulated seconds."""

    def __init__(self, world: SimulatedRay, seconds: float) -> None:
        super().__init__()
        self._world, self._at = world, world.clock.now + seconds

    def done(self) -> bool:
        return self._world.clock.now >= self._at and super().done()


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *, cores: int = 2) -> SimulatedRay:
    """Let the driver of this process find a simulated Ray, clock and workers.

    Args:
        folder: an empty one that stands for the run's private folder.
        cores: of the machine.
    """
    world = SimulatedRay()
    seen = SimulatedTime(world)
    patch = monkeypatch.setattr
    executors = runner.executors.ray
    ray_rooms = executors.calls, executors.keepers, executors.nodes, executors.replicas
    for module in (
        *(runner.cli, runner.common.files, runner.data.submission, *ray_rooms),
        *(executors.crew, executors.failures, executors.group),
        *(runner.driver.passes, runner.driver.run, runner.driver.setting, runner.driver.swap_pass),
        *(runner.model.injected_faults, runner.model.stage_worker, runner.model.worker),
        runner.telemetry.timeline,
    ):
        patch(module, "time", seen)

    # Ray.
    for module in (*ray_rooms, executors.actors):
        patch(module, "ray", world)
    patch(executors.actors, "placement_group", world.placement_group)
    patch(executors.group, "remove_placement_group", world.remove_placement_group)
    patch(executors.places, "start_ray", lambda num_cpus, verbose: None)
    patch(
        runner.executors.ray.replicas,
        "join_ray",
        lambda address, verbose: patch(executors.session._session, "started_in", None),
    )
    patch(executors.replicas, "stop_ray", lambda: None)
    patch(executors.places, "find_devices", lambda: ("cpu", 0))
    patch(executors.nodes, "find_devices", lambda: ("cpu", 0))
    patch(executors.places, "cores_here", lambda: tuple(range(cores)))
    patch(executors.session._session, "started_in", (folder, -1))
    server = SimpleNamespace(dead_processes=lambda: world.dead_servers)
    patch(ray._private.worker, "_global_node", server)
    patch(
        runner.executors.ray.nodes,
        "threading",
        SimpleNamespace(
            Event=lambda: SimulatedEvent(world.clock),
            Thread=lambda *, target, args, **_: SimulatedThread(world.clock, target, args),
        ),
    )

    # Workers.
    actors = {None: SimulatedReplica, "pipeline": SimulatedStage, "tensor": SimulatedMember}
    monkeypatch.setattr(_Simulated, "world", world, raising=False)
    patch(executors.actors, "ACTORS", actors)
    patch(runner.executors.single, "Replica", SimulatedReplica)
    patch(runner.model.worker, "write_to_folder", lambda *_: None)
    patch(runner.model.worker, "prepare_process", lambda slot, verbose: None)
    patch(runner.model.worker, "address_here", lambda: "127.0.0.1")
    patch(runner.common.machine, "gpu_dtype", lambda: None)
    patch(runner.model.worker, "peak_rss_bytes", lambda: 1)

    def predict_in_float(spec: ModelSpec, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        world.spend(world.float_s)
        return _answers(tokens, lengths)

    def kill(process: int, number: int) -> None:
        assert number == signal.SIGKILL
        raise Dies

    patch(runner.model.worker, "predict_in_float", predict_in_float)
    patch(runner.model.injected_faults, "os", _Instead(runner.model.injected_faults.os, kill=kill))

    # What takes real time and is always the same, and the disk: nothing here is about power cuts.
    patch(runner.data.inputs, "tokenize", _tokenize)
    patch(importlib.metadata, "version", _version)
    patch(runner.results.journal, "make_durable", lambda it: it.execute("PRAGMA synchronous = OFF"))
    for module in (runner.results.journal, runner.common.files):
        patch(module, "os", _Instead(module.os, fsync=lambda descriptor: None))

    # The driver's threads and its page, which takes longer to draw than all else.
    def in_background(work: Callable[[], Any], name: str = "tokenize") -> Future:
        future = _Tokenizing(world, 0.5 if name == "tokenize" else 0.0)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr(SimulatedGuard, "world", world, raising=False)
    patch(runner.driver.passes, "in_background", in_background)
    patch(runner.report.gather, "in_background", in_background)
    patch(runner.driver.run, "Guard", SimulatedGuard)
    patch(runner.report.gather.Reports, "_write_page", lambda self, path, report: None)
    patch(runner.telemetry.progress, "REDRAW_S", 3600.0)
    return world


@dataclass(frozen=True)
class Ended:
    """What a run left. ids, values: of the submission, None where there is none."""

    code: int
    err: str
    out: str
    ids: list[str] | None
    values: np.ndarray | None
    report: dict[str, Any] | None
    rows: pd.DataFrame | None

    @property
    def faults(self) -> dict[str, int]:
        """The report's faults, those that there were."""
        assert self.report is not None, self.err
        return {name: count for name, count in self.report["faults"].items() if count}

    def differing(self, values: np.ndarray) -> list[int]:
        """Rows whose answers are not these."""
        assert self.values is not None, self.err
        far = np.abs(self.values - values).max(axis=1) > TOLERANCE
        return np.flatnonzero(far).tolist()


class Job:
    """A small test set, a preset of three layers that nobody reads, and the answers to it.

    Attributes:
        ids: of its rows. lengths: int64 (rows,), tokens. answers, swapped: float64 (rows, classes),
            worked out by hand from the ids of the tokens, of the texts as they are and with their
            responses exchanged.
    """

    def __init__(self, folder: Path, *, rows: int = 40, length: int = 1024) -> None:
        self.files = write_fake_job(folder, rows)
        config = self.files["preset"] / "config.json"
        made = json.loads(config.read_text())
        made["config"]["num_layers"] = LAYERS
        config.write_text(json.dumps(made))
        self.length = length
        examples = read_examples(self.files["input"], CONTEST)
        self.ids = list(examples.ids)
        self.lengths, self.answers = self._answers(examples)
        self.swapped = self._answers(swap(examples))[1]

    def flags(self, output: Path) -> list[str]:
        named = ((f"--{name.replace('_', '-')}", str(path)) for name, path in self.files.items())
        return [*chain(*named), *("--output", str(output), "--pooling", "mean"),
                *("--sequence-length", str(self.length))]  # fmt: skip

    def _answers(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        texts = render_prompts(examples, text_format="raw", task=CONTEST)
        files = read_preset(self.files["preset"]).tokenizer
        tokens = tokenize(texts, files, sequence_length=self.length)
        rows = np.split(tokens.values, tokens.offsets[1:-1])
        return tokens.lengths, np.stack([answer(row) for row in rows])


class Command:
    """Runs the command in this process, on a simulated Ray."""

    def __init__(
        self, job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        self.job, self.folder = job, folder
        self.output = folder / "s.csv"
        self._patch, self._capsys = monkeypatch, capsys
        (folder / "private").mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        self.ray = install(monkeypatch, folder / "private")

    def renew(self) -> None:
        """Let the next run find a Ray that no fault was arranged for."""
        self.ray = install(self._patch, self.folder / "private")

    def __call__(self, *flags: str, faults: Sequence[dict[str, Any]] = ()) -> Ended:
        """Run to the end; faults are struck as `runner.model.injected_faults` says.

        A second run finds what the first left on disk, and a new Ray.
        """
        if self.ray.actors or self.ray.clock.now:
            self.renew()
        self._patch.setenv(VARIABLE, json.dumps(list(faults)))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = runner.cli.main([*self.job.flags(self.output), *flags])
        except Ends as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        left = [actor for actor in self.ray.actors if not actor.is_dead]
        assert not left, "a process is left"
        said = self._capsys.readouterr()
        ids = values = report = rows = None
        if code == 0:
            table = pd.read_csv(self.output, dtype={"id": str}, keep_default_na=False)
            ids, values = table["id"].tolist(), table.iloc[:, 1:].to_numpy(dtype=float)
            report = json.loads(Path(f"{self.output}.report.json").read_text())
            rows = pd.read_csv(f"{self.output}.rows.csv", dtype={"id": str})
        return Ended(code, said.err, said.out, ids, values, report, rows)


class _Instead:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **functions: Callable[..., Any]) -> None:
        self.__dict__.update(functions)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
