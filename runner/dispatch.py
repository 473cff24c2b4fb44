"""Ray: starts replicas, feeds them batches, takes results as they come, replaces the dead.

Does not know JAX, tables or files. A replica is one worker or a group of them, and its life is a
chain of steps (ping, load, tokens, compile for each shape, then predict for each batch). A step is
one call to each member that has a part in it; every answer arrives through one `ray.wait`, so a
dead worker is seen as a failed call: its group is replaced and the batches go back to the queue.
"""

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runner.errors import ArenaRunnerError, ConfigError, WorkerError
from runner.progress import Progress
from runner.records import BatchResult, Faults, ModelSpec, TokenTable, WorkerInfo, WorkerStats
from runner.workers import PipelineStage, Replica, TensorMember
from sharding.batches import Batch, BatchShape, Plan
from sharding.shards import cut_shards
from sharding.stages import Stage
from sharding.topology import WorkerSlot, place_workers

# One batch computes while the next waits in the worker's queue.
BATCHES_IN_FLIGHT = 2
# Batches in flight in a pipeline beyond one for each stage, so that no stage waits for a hand-over.
EXTRA_IN_PIPELINE = 2
# A replica is given up after this many replacements.
MAX_RESTARTS = 2
# A batch that was being computed when this many workers died is taken to be the cause.
MAX_DEATHS_PER_BATCH = 2
# Seconds between looks at the clock when nothing arrives.
WAIT_S = 1.0

_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
)


@dataclass(slots=True, eq=False)
class _Step:
    """One thing asked of a replica: the answers of those members that have a part in it."""

    what: str
    payload: Any
    answers: list[Any]
    missing: int


@dataclass(slots=True, eq=False)
class _Replica:
    """The slots of one replica and the actors that fill them now."""

    slots: tuple[WorkerSlot, ...]
    stats: list[WorkerStats]
    placement: Any = None
    actors: list[Any] = field(default_factory=list)
    calls: dict[Any, tuple[_Step, int]] = field(default_factory=dict)
    loaded: bool = False
    warm: set[BatchShape] = field(default_factory=set)
    compiling: BatchShape | None = None
    ready_at: float | None = None
    alive_s: float = 0.0
    shard: deque[Batch] = field(default_factory=deque)
    in_flight: deque[Batch] = field(default_factory=deque)
    restarts: int = 0
    given_up: bool = False

    @property
    def number(self) -> int:
        return self.slots[0].replica


class RayReplicas:
    """Replicas as Ray actors, one a device. A context manager: leaving it ends every process.

    Args:
        strategy: None for whole replicas, else how a group holds one: tensor or pipeline.
        stages: with pipeline, the layers of each member.
        family: with tensor, the backbone's class, which names the layout rules.

    Raises (from `start` and `run`):
        ConfigError: more workers than devices, or groups that do not fit.
        DataError: the model files do not fit each other.
        WorkerError: no replica is left that can work, or a batch fails.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        verbose: bool,
        progress: Progress,
        strategy: str | None = None,
        group_size: int = 1,
        stages: tuple[Stage, ...] = (),
        family: str = "",
    ) -> None:
        self._num_workers = num_workers
        self._verbose = verbose
        self._progress = progress
        self._strategy = strategy
        self._group_size = group_size
        self._stages = stages
        self._family = family
        self._replicas: list[_Replica] = []
        self._created_at = time.monotonic()
        self._tokens: Any = None
        self._plan: Plan | None = None
        self._said: set[str] = set()
        self.kind = "cpu"
        self.faults = Faults()
        self.info: WorkerInfo | None = None
        self.start_workers_s = 0.0
        self.predict_s = 0.0

    def __enter__(self) -> "RayReplicas":
        return self

    def __exit__(self, *exception: object) -> None:
        for replica in self._replicas:
            for actor in replica.actors:
                ray.kill(actor)
        if ray.is_initialized():
            ray.shutdown()

    @property
    def stats(self) -> list[WorkerStats]:
        return [stats for replica in self._replicas for stats in replica.stats]

    def start(self, spec: ModelSpec) -> None:
        """Start Ray and the actors and send them to load; returns before they have."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = cores or list(range(os.cpu_count() or 1))
        num_cpus = max(len(cores), self._num_workers or 1, self._group_size)
        _start_ray(num_cpus, verbose=self._verbose)
        self.kind, num_devices = _find_devices()
        try:
            slots = place_workers(
                kind=self.kind,
                num_devices=num_devices,
                num_workers=self._num_workers,
                cores=cores,
                group_size=self._group_size,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._spec = spec
        for start in range(0, len(slots), self._group_size):
            group = slots[start : start + self._group_size]
            stats = [WorkerStats(slot.replica, slot.member, slot.kind) for slot in group]
            self._replicas.append(_Replica(group, stats))
            self._spawn(self._replicas[-1])

    def poll(self) -> None:
        """Take what workers answered so far: keeps the progress true and finds bad files early."""
        for replica, step in self._finished_steps(timeout_s=0):
            self._take_setup_step(replica, step)

    def run(
        self, plan: Plan, tokens: TokenTable, *, costs: Sequence[float], ids: Sequence[str]
    ) -> Iterator[BatchResult]:
        """Yield the result of every batch once, in the order in which they arrive.

        Args:
            costs: one number a batch, by which shards are cut.
            ids: one a row, to name rows in errors.
        """
        self._plan, self._ids = plan, ids
        self._tokens = ray.put(tokens)
        shards = cut_shards(costs, len(self._replicas))
        self._queue = deque(plan.batches[shard.start : shard.stop] for shard in shards)
        self._compiled: set[BatchShape] = set()
        self._deaths_with: dict[int, int] = {}
        first_ready: float | None = None
        missing = {batch.index for batch in plan.batches}
        for replica in self._replicas:
            if replica.loaded:
                self._hand_tokens(replica)
        while missing:
            for replica in self._replicas:
                self._give_work(replica)
            for replica, step in self._finished_steps():
                if step.what != "predict":
                    self._take_setup_step(replica, step)
                    first_ready = first_ready or replica.ready_at
                    continue
                result = self._take_result(replica, step)
                self.predict_s = time.monotonic() - (first_ready or self._created_at)
                missing.remove(result.batch)
                yield result
        for replica in self._replicas:
            self._stop_clock(replica)
            for stats in replica.stats:
                stats.idle_s = max(0.0, replica.alive_s - stats.busy_s)

    def _spawn(self, replica: _Replica) -> None:
        """Fill a replica's slots with new actors and send them to load."""
        kinds = {None: Replica, "pipeline": PipelineStage, "tensor": TensorMember}
        actor_class = ray.remote(kinds[self._strategy])
        needs = {"CPU": 1.0} | {"gpu": {"GPU": 1.0}, "tpu": {"TPU": 1.0}}.get(self.kind, {})
        if replica.placement is None:
            # PACK: the members of a group come to one node where one has room for them.
            replica.placement = placement_group([needs] * len(replica.slots), strategy="PACK")
        replica.actors = [
            actor_class.options(
                num_cpus=1,
                num_gpus=needs.get("GPU", 0),
                resources={"TPU": 1} if "TPU" in needs else None,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    replica.placement, placement_group_bundle_index=slot.member
                ),
            ).remote(slot, verbose=self._verbose)
            for slot in replica.slots
        ]
        replica.loaded, replica.warm, replica.compiling = False, set(), None
        self._show(replica, "starting")
        self._ask(replica, "ping", [actor.ping.remote() for actor in replica.actors])
        if self._strategy == "pipeline":
            pairs = zip(replica.actors, self._stages, strict=True)
            self._ask(replica, "load", [actor.load.remote(self._spec, s) for actor, s in pairs])
        elif self._strategy is None:
            self._ask(replica, "load", [actor.load.remote(self._spec) for actor in replica.actors])
        # The members of a tensor group load when they know where to meet.

    def _ask(self, replica: _Replica, what: str, calls: list[Any], payload: Any = None) -> None:
        step = _Step(what, payload, [None] * len(calls), len(calls))
        for place, reference in enumerate(calls):
            replica.calls[reference] = (step, place)

    def _hand_tokens(self, replica: _Replica) -> None:
        # Of a pipeline only the first stage sees tokens.
        readers = replica.actors[:1] if self._strategy == "pipeline" else replica.actors
        self._ask(replica, "tokens", [actor.hold_tokens.remote(self._tokens) for actor in readers])

    def _finished_steps(self, timeout_s: float = WAIT_S) -> Iterator[tuple[_Replica, _Step]]:
        """Wait for calls to end and yield the steps whose last answer has come."""
        owners = {reference: replica for replica in self._replicas for reference in replica.calls}
        if not owners:
            assert not timeout_s, "this is a bug: rows are missing and no worker has work"
            return
        references = list(owners)
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            replica = owners[reference]
            if reference not in replica.calls:
                continue  # of an actor that was seen dead a moment ago
            step, place = replica.calls.pop(reference)
            try:
                step.answers[place] = ray.get(reference)
            except _DEATHS as death:
                self._bury(replica, death)
            except ray.exceptions.RayTaskError as failure:
                raise self._explain(replica, step, failure) from failure
            else:
                step.missing -= 1
                if not step.missing:
                    yield replica, step

    def _take_setup_step(self, replica: _Replica, step: _Step) -> None:
        if step.what == "ping":
            self.start_workers_s = max(self.start_workers_s, time.monotonic() - self._created_at)
            self._show(replica, "loading")
            if self._strategy == "tensor":
                machines = set(step.answers)
                host = "127.0.0.1" if len(machines) == 1 else step.answers[0]
                self._ask(replica, "meet", [replica.actors[0].reserve_address.remote(host)])
        elif step.what == "meet":
            arguments = (self._spec, step.answers[0], self._group_size, self._family)
            calls = [actor.load.remote(*arguments) for actor in replica.actors]
            self._ask(replica, "load", calls)
        elif step.what == "load":
            self._take_load(replica, step.answers)
        elif step.what == "compile":
            replica.warm.add(step.payload)
            replica.compiling = None
            self._compiled.add(step.payload)
            for stats, answer in zip(replica.stats, step.answers, strict=True):
                stats.compile_s += answer.seconds
                stats.cached_shapes += answer.cached
                stats.compiled_shapes += not answer.cached
        if self._plan is not None and len(replica.warm) == len(self._plan.shapes):
            replica.ready_at = replica.ready_at or time.monotonic()

    def _take_load(self, replica: _Replica, answers: list[WorkerInfo]) -> None:
        for stats, info in zip(replica.stats, answers, strict=True):
            if self.info is not None and self.info.dtype != info.dtype:
                raise ConfigError(
                    "The devices differ in what --dtype auto means; name one dtype. Received: "
                    f"{self.info.device}: {self.info.dtype}, {info.device}: {info.dtype}"
                )
            self.info = info
            stats.introduce(info)
            for note in info.notes:
                if note not in self._said:
                    self._said.add(note)
                    self._progress.note(note)
        replica.loaded = True
        self._show(replica, "loaded")
        if self._tokens is not None:
            self._hand_tokens(replica)

    def _take_result(self, replica: _Replica, step: _Step) -> BatchResult:
        replica.in_flight.remove(step.payload)
        result: BatchResult = step.answers[0]
        # Each member of a tensor group answers for itself; a pipeline's last stage for all.
        work = [entry for answer in step.answers for entry in answer.work]
        for stats, entry in zip(replica.stats, work, strict=True):
            stats.count(len(result.rows), entry)
        return result

    def _give_work(self, replica: _Replica) -> None:
        """Keep a replica busy: shapes until all are compiled, then batches."""
        if not replica.loaded or replica.given_up:
            return
        if replica.ready_at is None:
            self._give_shape(replica)
            return
        while len(replica.in_flight) < self._most_in_flight:
            if not replica.shard:
                if not self._queue:
                    break
                replica.shard.extend(self._queue.popleft())
            batch = replica.shard.popleft()
            replica.in_flight.append(batch)
            self._ask(replica, "predict", self._start_batch(replica, batch), batch)
        self._show(replica, "busy" if replica.in_flight else "idle")

    @property
    def _most_in_flight(self) -> int:
        if self._strategy == "pipeline":
            return self._group_size + EXTRA_IN_PIPELINE
        return BATCHES_IN_FLIGHT

    def _start_batch(self, replica: _Replica, batch: Batch) -> list[Any]:
        """Send a batch on its way and return the calls whose answers make its result."""
        if self._strategy != "pipeline":
            return [actor.predict.remote(batch) for actor in replica.actors]
        first, *between, last = replica.actors
        activations = first.begin.remote(batch)
        for actor in between:
            activations = actor.carry_on.remote(activations)
        return [last.finish.remote(batch, activations)]

    def _give_shape(self, replica: _Replica) -> None:
        """Give the next shape that nobody compiles now: compiled elsewhere, it is in the cache."""
        if replica.compiling is not None:
            return
        assert self._plan is not None, "this is a bug: shapes are given before there is a plan"
        elsewhere = {other.compiling for other in self._replicas} - self._compiled
        for shape in self._plan.shapes:
            if shape not in replica.warm and shape not in elsewhere:
                replica.compiling = shape
                self._show(replica, f"compiling {len(replica.warm) + 1}/{len(self._plan.shapes)}")
                calls = [actor.compile.remote(shape) for actor in replica.actors]
                self._ask(replica, "compile", calls, shape)
                return

    def _stop_clock(self, replica: _Replica) -> None:
        if replica.ready_at is not None:
            replica.alive_s += time.monotonic() - replica.ready_at
            replica.ready_at = None

    def _bury(self, replica: _Replica, death: Exception) -> None:
        """Take back the batches of a replica that lost a worker and replace it, if it may be.

        The other members of a group cannot go on without the dead one, and may hang: they end too.
        """
        self.faults.worker_deaths += 1
        batches = [*replica.in_flight, *replica.shard]
        self.faults.retried_batches += len(replica.in_flight)
        suspect = replica.in_flight[0] if replica.in_flight else None
        replica.calls.clear()
        replica.in_flight.clear()
        replica.shard.clear()
        self._stop_clock(replica)
        replica.loaded, replica.compiling = False, None
        for actor in replica.actors:
            ray.kill(actor)
        replica.actors = []
        if batches:
            self._queue.appendleft(tuple(batches))
        if suspect is not None:
            deaths = self._deaths_with[suspect.index] = self._deaths_with.get(suspect.index, 0) + 1
            if deaths >= MAX_DEATHS_PER_BATCH:
                raise WorkerError(
                    f"{deaths} workers died computing {self._name(suspect)}. Try a smaller "
                    "--max-tokens-per-batch, or look for what is special in these rows."
                ) from death
        noun = "worker" if len(replica.slots) == 1 else "group"
        if replica.restarts < MAX_RESTARTS:
            replica.restarts += 1
            for stats in replica.stats:
                stats.restarts += 1
            self._progress.note(f"{noun} {replica.number} died and is started again")
            self._spawn(replica)
            return
        replica.given_up = True
        self._show(replica, "dead")
        if all(other.given_up for other in self._replicas):
            raise WorkerError(
                f"Every {noun} died {MAX_RESTARTS + 1} times; the last was {noun} "
                f"{replica.number}. Is there memory enough for the model and one batch? Fewer "
                "--num-workers or a smaller --max-tokens-per-batch need less; --verbose shows the "
                "workers' logs."
            ) from death

    def _explain(
        self, replica: _Replica, step: _Step, failure: ray.exceptions.RayTaskError
    ) -> ArenaRunnerError:
        """Return the error that a worker raised, named by replica, batch and rows."""
        cause = failure.cause
        if isinstance(cause, ArenaRunnerError):
            return cause
        doing = f"in {step.what}"
        if step.what == "predict":
            doing = f"computing {self._name(step.payload)}"
        reason = (str(cause).strip().splitlines() or [""])[0]
        return WorkerError(
            f"Worker {replica.number} failed {doing}: {type(cause).__name__}: {reason}"
        )

    def _name(self, batch: Batch) -> str:
        ids = ", ".join(self._ids[row] for row in batch.rows[:5])
        more = ", ..." if len(batch.rows) > 5 else ""
        return f"batch {batch.index} ({len(batch.rows)} rows: id {ids}{more})"

    def _show(self, replica: _Replica, state: str) -> None:
        self._progress.set_worker(replica.number, state)


def _start_ray(num_cpus: int, *, verbose: bool) -> None:
    """Start Ray on this machine for this run alone.

    Its servers listen on every interface, so a token that only this run's processes know keeps
    others out. Must run in the main thread: the kernel ends Ray's processes with the thread that
    started them.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Both were read when ray was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its workers at the lowest priority but one; ours are the work itself.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.CRITICAL,
        configure_logging=verbose,
    )


def _find_devices() -> tuple[str, int]:
    """Return the kind of device to use and how many there are, without starting JAX here.

    JAX_PLATFORMS decides the kind where it is set, as it does for JAX itself.
    """
    resources = ray.cluster_resources()
    found = {"gpu": int(resources.get("GPU", 0)), "tpu": int(resources.get("TPU", 0))}
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    kind = {"cuda": "gpu"}.get(wanted, wanted)
    if not kind:
        kind = next((name for name, count in found.items() if count), "cpu")
    return kind, found.get(kind, 0)
