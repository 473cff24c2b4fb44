"""Ray: starts replicas, feeds them batches, takes results as they come, replaces the dead.

Does not know JAX, tables or files. A worker's life is a chain of calls (ping, load, tokens,
compile for each shape, then predict for each batch), and every answer arrives through one
`ray.wait`, so a dead worker is seen as a failed call and its batches go back to the queue.
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

from runner.errors import ArenaRunnerError, ConfigError, WorkerError
from runner.progress import Progress
from runner.records import BatchResult, Faults, ModelSpec, ReplicaInfo, TokenTable, WorkerStats
from runner.workers import Replica
from sharding.batches import Batch, BatchShape, Plan
from sharding.shards import cut_shards
from sharding.topology import ReplicaSlot, place_replicas

# One batch computes while the next waits in the worker's queue.
BATCHES_IN_FLIGHT = 2
# A slot is given up after this many new workers.
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
class _Worker:
    """One slot and the actor that fills it now."""

    slot: ReplicaSlot
    stats: WorkerStats
    actor: Any = None
    calls: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    loaded: bool = False
    warm: set[BatchShape] = field(default_factory=set)
    compiling: BatchShape | None = None
    ready_at: float | None = None
    alive_s: float = 0.0
    shard: deque[Batch] = field(default_factory=deque)
    in_flight: deque[Batch] = field(default_factory=deque)
    given_up: bool = False


class RayReplicas:
    """Replicas as Ray actors, one a device. A context manager: leaving it ends every process.

    Raises (from `start` and `run`):
        ConfigError: more workers than devices.
        DataError: the model files do not fit each other.
        WorkerError: no worker is left that can work, or a batch fails.
    """

    def __init__(self, *, num_workers: int | None, verbose: bool, progress: Progress) -> None:
        self._num_workers = num_workers
        self._verbose = verbose
        self._progress = progress
        self._workers: list[_Worker] = []
        self._created_at = time.monotonic()
        self._tokens: Any = None
        self._plan: Plan | None = None
        self.kind = "cpu"
        self.faults = Faults()
        self.info: ReplicaInfo | None = None
        self.start_workers_s = 0.0
        self.predict_s = 0.0

    def __enter__(self) -> "RayReplicas":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            if worker.actor is not None:
                ray.kill(worker.actor)
        if ray.is_initialized():
            ray.shutdown()

    @property
    def stats(self) -> list[WorkerStats]:
        return [worker.stats for worker in self._workers]

    def start(self, spec: ModelSpec) -> None:
        """Start Ray and the actors and send them to load; returns before they have."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = cores or list(range(os.cpu_count() or 1))
        _start_ray(max(len(cores), self._num_workers or 1), verbose=self._verbose)
        self.kind, num_devices = _find_devices()
        try:
            slots = place_replicas(
                kind=self.kind, num_devices=num_devices, num_workers=self._num_workers, cores=cores
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._spec = spec
        for slot in slots:
            worker = _Worker(slot, WorkerStats(replica=slot.replica, device=slot.kind))
            self._workers.append(worker)
            self._spawn(worker)

    def poll(self) -> None:
        """Take what workers answered so far: keeps the progress true and finds bad files early."""
        for worker, what, payload, answer in self._answers(timeout_s=0):
            self._take_setup_answer(worker, what, payload, answer)

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
        self._queue = deque(
            [plan.batches[shard.start : shard.stop]
             for shard in cut_shards(costs, max(1, len(self._workers)))]
        )  # fmt: skip
        self._compiled: set[BatchShape] = set()
        self._deaths_with: dict[int, int] = {}
        first_ready: float | None = None
        missing = {batch.index for batch in plan.batches}
        for worker in self._workers:
            if worker.loaded:
                self._call(worker, "hold_tokens", self._tokens)
        while missing:
            for worker in self._workers:
                self._give_work(worker)
            for worker, what, payload, answer in self._answers():
                if what != "predict":
                    self._take_setup_answer(worker, what, payload, answer)
                    if first_ready is None:
                        first_ready = worker.ready_at
                    continue
                self._count(worker, payload, answer)
                self.predict_s = time.monotonic() - (first_ready or self._created_at)
                if answer.batch in missing:
                    missing.remove(answer.batch)
                    yield answer
        for worker in self._workers:
            self._stop_clock(worker)
            worker.stats.idle_s = max(0.0, worker.alive_s - worker.stats.busy_s)

    def _spawn(self, worker: _Worker) -> None:
        """Fill a slot with a new actor and send it to load."""
        options: dict[str, Any] = {"num_cpus": 1}
        if worker.slot.kind == "gpu":
            options["num_gpus"] = 1
        elif worker.slot.kind == "tpu":
            options["resources"] = {"TPU": 1}
        actor_class = ray.remote(Replica).options(**options, max_restarts=0, max_task_retries=0)
        worker.actor = actor_class.remote(worker.slot, verbose=self._verbose)
        worker.loaded, worker.warm, worker.compiling = False, set(), None
        self._progress.set_worker(worker.slot.replica, "starting")
        self._call(worker, "ping")
        self._call(worker, "load", self._spec)

    def _call(self, worker: _Worker, what: str, *arguments: Any) -> None:
        reference = getattr(worker.actor, what).remote(*arguments)
        worker.calls[reference] = (what, arguments[0] if arguments else None)

    def _answers(self, timeout_s: float = WAIT_S) -> Iterator[tuple[_Worker, str, Any, Any]]:
        """Wait for calls to end and yield (worker, call, argument, answer) of those that did."""
        owners = {reference: worker for worker in self._workers for reference in worker.calls}
        if not owners and timeout_s:
            raise WorkerError("This is a bug: rows are missing and no worker has work.")
        if not owners:
            return
        references = list(owners)
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            worker = owners[reference]
            if reference not in worker.calls:
                continue  # of an actor that was seen dead a moment ago
            what, payload = worker.calls.pop(reference)
            try:
                answer = ray.get(reference)
            except _DEATHS as death:
                self._bury(worker, death)
            except ray.exceptions.RayTaskError as failure:
                raise self._explain(worker, what, payload, failure) from failure
            else:
                yield worker, what, payload, answer

    def _take_setup_answer(self, worker: _Worker, what: str, payload: Any, answer: Any) -> None:
        number = worker.slot.replica
        if what == "ping":
            self.start_workers_s = max(self.start_workers_s, time.monotonic() - self._created_at)
            self._progress.set_worker(number, "loading")
        elif what == "load":
            if self.info is not None and self.info.dtype != answer.dtype:
                raise ConfigError(
                    "The devices differ in what --dtype auto means; name one dtype. Received: "
                    f"{self.info.device}: {self.info.dtype}, {answer.device}: {answer.dtype}"
                )
            self.info = answer
            worker.loaded = True
            worker.stats.device, worker.stats.load_s = answer.device, answer.load_s
            self._progress.set_worker(number, "loaded")
            if self._tokens is not None:
                self._call(worker, "hold_tokens", self._tokens)
        elif what == "compile":
            worker.warm.add(payload)
            worker.compiling = None
            self._compiled.add(payload)
            worker.stats.compile_s += answer.seconds
            worker.stats.cached_shapes += answer.cached
            worker.stats.compiled_shapes += not answer.cached
        if self._plan is not None and len(worker.warm) == len(self._plan.shapes):
            worker.ready_at = worker.ready_at or time.monotonic()

    def _give_work(self, worker: _Worker) -> None:
        """Keep a worker busy: shapes until all are compiled, then batches."""
        if not worker.loaded or worker.given_up:
            return
        if worker.ready_at is None:
            self._give_shape(worker)
            return
        while len(worker.in_flight) < BATCHES_IN_FLIGHT:
            if not worker.shard:
                if not self._queue:
                    break
                worker.shard.extend(self._queue.popleft())
            batch = worker.shard.popleft()
            worker.in_flight.append(batch)
            self._call(worker, "predict", batch)
        self._progress.set_worker(worker.slot.replica, "busy" if worker.in_flight else "idle")

    def _give_shape(self, worker: _Worker) -> None:
        """Give the next shape that nobody compiles now: compiled elsewhere, it is in the cache."""
        if worker.compiling is not None:
            return
        assert self._plan is not None, "this is a bug: shapes are given before there is a plan"
        elsewhere = {other.compiling for other in self._workers} - self._compiled
        for shape in self._plan.shapes:
            if shape not in worker.warm and shape not in elsewhere:
                worker.compiling = shape
                step = f"compiling {len(worker.warm) + 1}/{len(self._plan.shapes)}"
                self._progress.set_worker(worker.slot.replica, step)
                self._call(worker, "compile", shape)
                return

    def _count(self, worker: _Worker, batch: Batch, result: BatchResult) -> None:
        worker.in_flight.remove(batch)
        worker.stats.rows += len(result.rows)
        worker.stats.batches += 1
        worker.stats.busy_s += result.seconds
        worker.stats.peak_rss_bytes = max(worker.stats.peak_rss_bytes, result.peak_rss_bytes)

    def _stop_clock(self, worker: _Worker) -> None:
        if worker.ready_at is not None:
            worker.alive_s += time.monotonic() - worker.ready_at
            worker.ready_at = None

    def _bury(self, worker: _Worker, death: Exception) -> None:
        """Take back a dead worker's batches and fill its slot again, if it may be."""
        self.faults.worker_deaths += 1
        batches = [*worker.in_flight, *worker.shard]
        self.faults.retried_batches += len(worker.in_flight)
        suspect = worker.in_flight[0] if worker.in_flight else None
        worker.calls.clear()
        worker.in_flight.clear()
        worker.shard.clear()
        self._stop_clock(worker)
        worker.loaded, worker.compiling = False, None
        if batches:
            self._queue.appendleft(tuple(batches))
        if suspect is not None:
            deaths = self._deaths_with[suspect.index] = self._deaths_with.get(suspect.index, 0) + 1
            if deaths >= MAX_DEATHS_PER_BATCH:
                raise WorkerError(
                    f"{deaths} workers died computing {self._name(suspect)}. Try a smaller "
                    "--max-tokens-per-batch, or look for what is special in these rows."
                ) from death
        number = worker.slot.replica
        ray.kill(worker.actor)
        if worker.stats.restarts < MAX_RESTARTS:
            worker.stats.restarts += 1
            self._progress.note(f"worker {number} died and is started again")
            self._spawn(worker)
            return
        worker.given_up, worker.actor = True, None
        self._progress.set_worker(number, "dead")
        if all(other.given_up for other in self._workers):
            raise WorkerError(
                f"Every worker died {MAX_RESTARTS + 1} times; the last was worker {number}. "
                "Is there memory enough for the model and one batch? Fewer --num-workers or a "
                "smaller --max-tokens-per-batch need less; --verbose shows the workers' logs."
            ) from death

    def _explain(
        self, worker: _Worker, what: str, payload: Any, failure: ray.exceptions.RayTaskError
    ) -> ArenaRunnerError:
        """Return the error that a worker raised, named by replica, batch and rows."""
        cause = failure.cause
        if isinstance(cause, ArenaRunnerError):
            return cause
        doing = f"computing {self._name(payload)}" if what == "predict" else f"in {what}"
        reason = (str(cause).strip().splitlines() or [""])[0]
        return WorkerError(
            f"Worker {worker.slot.replica} failed {doing}: {type(cause).__name__}: {reason}"
        )

    def _name(self, batch: Batch) -> str:
        ids = ", ".join(self._ids[row] for row in batch.rows[:5])
        more = ", ..." if len(batch.rows) > 5 else ""
        return f"batch {batch.index} ({len(batch.rows)} rows: id {ids}{more})"


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
