"""Replicas fed with batches: a bounded number in flight, results as they come, the dead replaced.

Does not know JAX, tables or files, nor how a batch passes through a replica (`groups.py`). Every
answer arrives through one `ray.wait`, so a dead worker is seen as a failed call: its group is
replaced and its batches go back to the queue.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import ray
import ray.exceptions

from runner.cluster import find_devices, start_ray
from runner.errors import ArenaRunnerError, ConfigError, WorkerError, first_line, list_ids
from runner.groups import Group, Step
from runner.progress import Progress
from runner.records import BatchResult, Faults, ModelSpec, TokenTable, WorkerInfo, WorkerStats
from runner.strategy import Strategy
from sharding.batches import Batch, BatchShape, Plan
from sharding.shards import cut_shards
from sharding.topology import place_workers

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


class RayReplicas:
    """All replicas of a run. A context manager: leaving it ends every process.

    Args:
        num_workers: actors in all, None for as many as the devices suggest.
        group_size: how many of them make one replica.
        strategy, family: as for `Group`.

    Raises (from `start` and `run`):
        ConfigError: more workers than devices, or groups that do not fit.
        DataError: the model files do not fit each other.
        WorkerError: no replica is left that can work, or a batch fails.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        group_size: int,
        strategy: Strategy | None,
        family: str,
        verbose: bool,
        progress: Progress,
    ) -> None:
        self._num_workers = num_workers
        self._group_size = group_size
        self._strategy = strategy
        self._family = family
        self._verbose = verbose
        self._progress = progress
        self._groups: list[Group] = []
        self._created_at = time.monotonic()
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
        for group in self._groups:
            group.end()
        if ray.is_initialized():
            ray.shutdown()

    @property
    def stats(self) -> list[WorkerStats]:
        return [stats for group in self._groups for stats in group.stats]

    def start(self, spec: ModelSpec) -> None:
        """Start Ray and the actors and send them to load; returns before they have."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = cores or list(range(os.cpu_count() or 1))
        num_cpus = max(len(cores), self._num_workers or 1, self._group_size)
        start_ray(num_cpus, verbose=self._verbose)
        self.kind, num_devices = find_devices()
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
        for first in range(0, len(slots), self._group_size):
            group = Group(
                slots[first : first + self._group_size],
                strategy=self._strategy,
                family=self._family,
                spec=spec,
                verbose=self._verbose,
            )
            self._groups.append(group)
            self._spawn(group)

    def poll(self) -> None:
        """Take what workers answered so far: keeps the progress true and finds bad files early."""
        for group, step in self._finished_steps(timeout_s=0):
            self._take_setup_step(group, step)

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
        shards = cut_shards(costs, len(self._groups))
        self._queue = deque(plan.batches[shard.start : shard.stop] for shard in shards)
        self._compiled: set[BatchShape] = set()
        self._deaths_with: dict[int, int] = {}
        first_ready: float | None = None
        missing = {batch.index for batch in plan.batches}
        for group in self._groups:
            if group.loaded:
                group.hand_tokens(self._tokens)
        while missing:
            for group in self._groups:
                self._give_work(group)
            for group, step in self._finished_steps():
                if step.what != "predict":
                    self._take_setup_step(group, step)
                    first_ready = first_ready or group.ready_at
                    continue
                result = group.take_result(step)
                self.predict_s = time.monotonic() - (first_ready or self._created_at)
                missing.remove(result.batch)
                yield result
        for group in self._groups:
            group.stop_clock()

    def predict_in_float(self, batch: Batch) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`.

        Raises:
            WorkerError: the worker that was asked died of it.
        """
        group = next(group for group in self._groups if group.ready_at or group.loaded)
        try:
            answer: np.ndarray = ray.get(group.predict_in_float(batch))
        except (*_DEATHS, ray.exceptions.RayTaskError) as failure:
            raise WorkerError(
                f"{group.noun} {group.number}: {type(failure).__name__}: {first_line(failure)}"
            ) from failure
        return answer

    def _spawn(self, group: Group) -> None:
        self._show(group, "starting")
        group.spawn()

    def _finished_steps(self, timeout_s: float = WAIT_S) -> Iterator[tuple[Group, Step]]:
        """Wait for calls to end and yield the steps whose last answer has come."""
        owners = {reference: group for group in self._groups for reference in group.calls}
        if not owners:
            assert not timeout_s, "this is a bug: rows are missing and no worker has work"
            return
        references = list(owners)
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            group = owners[reference]
            if reference not in group.calls:
                continue  # of an actor that was seen dead a moment ago
            step, place = group.calls.pop(reference)
            try:
                step.answers[place] = ray.get(reference)
            except _DEATHS as death:
                self._bury(group, death)
            except ray.exceptions.RayTaskError as failure:
                raise self._explain(group, step, failure) from failure
            else:
                step.missing -= 1
                if not step.missing:
                    yield group, step

    def _take_setup_step(self, group: Group, step: Step) -> None:
        if step.what == "ping":
            self.start_workers_s = max(self.start_workers_s, time.monotonic() - self._created_at)
            self._show(group, "loading")
        elif step.what == "load":
            self._take_load(group, step.answers)
        elif step.what == "tokens":
            group.has_tokens = True
        elif step.what == "compile":
            group.take_compiled(step)
            self._compiled.add(step.payload)
        group.go_on_after(step)
        if group.warm and group.has_tokens:
            group.ready_at = group.ready_at or time.monotonic()

    def _take_load(self, group: Group, answers: list[WorkerInfo]) -> None:
        for info in answers:
            if self.info is not None and self.info.dtype != info.dtype:
                raise ConfigError(
                    "The devices differ in what --dtype auto means; name one dtype. Received: "
                    f"{self.info.device}: {self.info.dtype}, {info.device}: {info.dtype}"
                )
            self.info = info
            for note in info.notes:
                if note not in self._said:
                    self._said.add(note)
                    self._progress.note(note)
        group.take_load(answers)
        self._show(group, "loaded")
        if self._plan is not None:
            group.hand_tokens(self._tokens)

    def _give_work(self, group: Group) -> None:
        """Keep a group busy: shapes until all are compiled, and batches of those that are."""
        if not group.loaded or group.given_up:
            return
        self._give_shape(group)
        while group.has_tokens and len(group.in_flight) < group.most_in_flight:
            if not group.shard:
                group.shard.extend(self._take_shard(group))
            if not group.shard or group.shard[0].shape not in group.warm:
                break
            group.start(group.shard.popleft())
        if group.in_flight:
            self._show(group, "busy")
        elif group.compiling is None:
            self._show(group, "idle")

    def _take_shard(self, group: Group) -> Sequence[Batch]:
        """Take the first shard that the group can begin now, none if there is none."""
        for number, shard in enumerate(self._queue):
            if shard[0].shape in group.warm:
                del self._queue[number]
                return shard
        return ()

    def _give_shape(self, group: Group) -> None:
        """Give the next shape that nobody compiles now: compiled elsewhere, it is in the cache."""
        assert self._plan is not None, "this is a bug: shapes are given before there is a plan"
        if group.compiling is not None or len(group.warm) == len(self._plan.shapes):
            return
        elsewhere = {other.compiling for other in self._groups} - self._compiled
        for shape in self._plan.shapes:
            if shape not in group.warm and shape not in elsewhere:
                self._show(group, f"compiling {len(group.warm) + 1}/{len(self._plan.shapes)}")
                group.compile(shape)
                return

    def _bury(self, group: Group, death: Exception) -> None:
        """Take back the batches of a group that lost a worker and replace it, if it may be."""
        self.faults.worker_deaths += 1
        self.faults.retried_batches += len(group.in_flight)
        suspect = group.in_flight[0] if group.in_flight else None
        if batches := group.end():
            self._queue.appendleft(batches)
        if suspect is not None:
            deaths = self._deaths_with[suspect.index] = self._deaths_with.get(suspect.index, 0) + 1
            if deaths >= MAX_DEATHS_PER_BATCH:
                raise WorkerError(
                    f"{deaths} workers died computing {self._name(suspect)}. Try a smaller "
                    "--max-tokens-per-batch, or look for what is special in these rows."
                ) from death
        if group.restarts < MAX_RESTARTS:
            group.restarts += 1
            for stats in group.stats:
                stats.restarts += 1
            self._progress.note(f"{group.noun} {group.number} died and is started again")
            self._spawn(group)
            return
        group.given_up = True
        self._show(group, "dead")
        if all(other.given_up for other in self._groups):
            raise WorkerError(
                f"Every {group.noun} died {MAX_RESTARTS + 1} times; the last was {group.noun} "
                f"{group.number}. Is there memory enough for the model and one batch? Fewer "
                "--num-workers or a smaller --max-tokens-per-batch need less; --verbose shows the "
                "workers' logs."
            ) from death

    def _explain(
        self, group: Group, step: Step, failure: ray.exceptions.RayTaskError
    ) -> ArenaRunnerError:
        """Return the error that a worker raised, named by replica, batch and rows."""
        cause = failure.cause
        if isinstance(cause, ArenaRunnerError):
            return cause
        doing = f"in {step.what}"
        if step.what == "predict":
            doing = f"computing {self._name(step.payload)}"
        return WorkerError(
            f"{group.noun.capitalize()} {group.number} failed {doing}: "
            f"{type(cause).__name__}: {first_line(cause)}"
        )

    def _name(self, batch: Batch) -> str:
        rows = list_ids(self._ids, batch.rows)
        return f"batch {batch.index} ({len(batch.rows)} rows: {rows})"

    def _show(self, group: Group, state: str) -> None:
        self._progress.set_worker(group.number, state)
