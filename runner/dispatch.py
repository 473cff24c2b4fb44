"""Replicas fed with batches: a bounded number in flight, results as they come, the dead replaced.

Does not know JAX, tables or files, nor how a batch passes through a replica (`groups.py`) or what
becomes of one that failed (`recovery.py`). Every answer arrives through one `ray.wait`, so a dead
worker is seen as a failed call; one that hangs is seen by the clock.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from runner.cluster import (
    check_ray,
    find_devices,
    join_ray,
    private_folder,
    start_ray,
    stop_ray,
)
from runner.errors import (
    ArenaRunnerError,
    ConfigError,
    DeviceMemoryError,
    WorkerError,
    first_line,
)
from runner.faults import patience_s
from runner.groups import Group, Step
from runner.logs import keep_logs_of_ray, worker_log
from runner.machine import cores_here
from runner.nodes import Nodes
from runner.progress import Progress
from runner.records import (
    BatchResult,
    CompileInfo,
    Faults,
    ModelSpec,
    TokenTable,
    WorkerInfo,
    WorkerStats,
    seconds_to_compile,
)
from runner.recovery import Recovery
from runner.shipping import SHIP
from runner.strategy import Strategy, gpu_dtype
from runner.timeline import Timeline
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.dealing import Dealer
from sharding.forecast import Pace
from sharding.rates import Rates
from sharding.topology import WorkerSlot, place_workers

# A replica is given up after this many replacements that no batch explains.
MAX_RESTARTS = 3
# Seconds between looks at the clock when nothing arrives.
WAIT_S = 0.2
# A worker hangs that takes longer for a step than: compile and load as slow as they may be.
STEP_WITHIN_S = {"ping": 300.0, "meet": 120.0, "tokens": 300.0, "load": 600.0, "compile": 1800.0}
SLOWEST_LOAD_BYTES_PER_S = 20e6
# A run whose nodes are all gone waits so long for another.
NODE_COMES_WITHIN_S = 300.0
# A look at the clock that comes so late was late for the workers too: the machine was suspended.
LONGEST_LOOK_S = 10.0

_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)
_STORE_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class RayReplicas:
    """All replicas of a run. A context manager: leaving it ends every process.

    Args:
        num_workers: actors in all, None for as many as the devices suggest.
        group_size: how many of them make one replica.
        strategy, family, timeline: as for `Group`.
        left_s: the seconds in which rows can still be predicted, infinite where there is no limit.
        log_folder: where workers write to, None for Ray's own logs.
        address: of a Ray cluster to join, None to start Ray on this machine.

    Raises (from `open`, `start` and `run`):
        ConfigError: more workers than devices, or groups that do not fit.
        DataError: the model files do not fit each other.
        WorkerError: no replica is left that can work, or one cannot load.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        group_size: int,
        strategy: Strategy | None,
        family: str,
        verbose: bool,
        log_folder: Path | None,
        progress: Progress,
        left_s: Callable[[], float],
        timeline: Timeline,
        address: str | None = None,
    ) -> None:
        self._left_s = left_s
        self._address = address
        self._nodes: Nodes | None = None
        self._deserted_since: float | None = None
        self._num_workers = num_workers
        self._group_size = group_size
        self._strategy = strategy
        self._family = family
        self._verbose = verbose
        self._log_folder = log_folder
        self._progress = progress
        self._timeline = timeline
        self._groups: list[Group] = []
        self._created_at = time.monotonic()
        self._backlog: Backlog | None = None
        self._tokens: ray.ObjectRef | None = None
        self._float_actor: ray.actor.ActorHandle | None = None
        self._said: set[str] = set()
        self._clock, self._looked_at = 0.0, time.monotonic()
        self._dealer: Dealer | None = None
        self._looked_for_hung_at = 0.0
        self.kind = "cpu"
        self.replicas = 1
        self.faults = Faults()
        self.info: WorkerInfo | None = None
        self.start_workers_s = 0.0
        self.predict_s = 0.0
        self._copied_before = 0

    def __enter__(self) -> "RayReplicas":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._nodes is not None:
            self._nodes.close()
        # Where Ray itself has failed there is nobody to ask; its processes end all the same.
        with suppress(ray.exceptions.RayError):
            for group in self._groups:
                group.end(is_over=True)
        folder = private_folder()
        if kind is not None and folder is not None and self._log_folder is not None:
            keep_logs_of_ray(folder / "r" / "session_latest" / "logs", self._log_folder)
        stop_ray()

    @property
    def copied_batches(self) -> int:
        """Batches that two replicas computed."""
        return self._copied_before + (self._dealer.copied_batches if self._dealer else 0)

    @property
    def stats(self) -> list[WorkerStats]:
        return [stats for group in self._groups for stats in group.stats]

    def open(self, dtype: str, compilation_cache: str) -> str:
        """Start or join Ray and find the devices; return what `dtype` means on them, `auto` where
        only a worker can tell."""
        if self._address is not None:
            return self._join(self._address, dtype)
        cores = cores_here()
        num_cpus = max(len(cores), self._num_workers or 1, self._group_size)
        start_ray(num_cpus, verbose=self._verbose)
        with _ray_errors():
            self.kind, num_devices = find_devices()
        try:
            self._slots = place_workers(
                kind=self.kind,
                num_devices=num_devices,
                num_workers=self._num_workers,
                cores=cores,
                group_size=self._group_size,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.replicas = len(self._slots) // self._group_size
        if dtype != "auto":
            return dtype
        return {"cpu": "float32", "tpu": "bfloat16"}.get(self.kind) or gpu_dtype() or "auto"

    def _join(self, address: str, dtype: str) -> str:
        join_ray(address, verbose=self._verbose)
        self._nodes = Nodes(
            num_workers=self._num_workers,
            group_size=self._group_size,
            is_tensor=self._strategy is not None and self._strategy.name == "tensor",
            even_here=os.environ.get(SHIP) == "always",
            note=self._progress.note,
        )
        with _ray_errors():
            self.replicas, dtype = self._nodes.open(dtype)
        self.kind = self._nodes.kind
        return dtype

    def start(self, spec: ModelSpec) -> None:
        """Start the actors and send them to load; returns before they have."""
        self._stored_bytes = spec.stored_bytes
        if self._nodes is not None:
            self._nodes.start(spec)
            return
        for first in range(0, len(self._slots), self._group_size):
            slots = self._slots[first : first + self._group_size]
            with _ray_errors():
                self._add_group(slots, [spec] * len(slots))

    def _add_group(self, slots: tuple[WorkerSlot, ...], specs: Sequence[ModelSpec]) -> None:
        group = Group(
            slots,
            strategy=self._strategy,
            family=self._family,
            specs=specs,
            verbose=self._verbose,
            log_folder=self._log_folder,
            timeline=self._timeline,
            clock=lambda: self._clock,
        )
        if self._nodes is not None:
            for stats, slot in zip(group.stats, slots, strict=True):
                stats.node = self._nodes.name(slot.node)
        self._groups.append(group)
        self._spawn(group)

    def poll(self) -> None:
        """Take what workers answered so far: keeps the progress true and finds bad files early."""
        with _ray_errors():
            self._follow_nodes()
            for group, step in self._finished_steps(timeout_s=0):
                if step.what == "predict":
                    group.take_result(step)  # a copy of a batch that another replica ended before
                    continue
                self._take_setup_step(group, step)

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        """Yield the first answer to every batch, in the order in which they arrive, and None at
        least every `WAIT_S` between them.

        Args:
            rates: learns what batches take.
            ids: one a row, to name rows in errors.
        """
        self._copied_before = self.copied_batches
        self._backlog, self._rates = backlog, rates
        self._dealer = Dealer(backlog, rates, self._groups, patience_s=patience_s())
        note = partial(self._progress.note, event="fault")
        self._recovery = Recovery(backlog, self.faults, ids, note, self._timeline.event)
        with _ray_errors():
            self._tokens = self._store(tokens)
            yield from self._run(backlog)

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`, in a process of its own.

        Raises:
            WorkerError: each worker that was asked died of it, or one failed or took longer than
                `within_s`.
        """
        slowest_s = STEP_WITHIN_S["load"] + self._stored_bytes / SLOWEST_LOAD_BYTES_PER_S
        within_s = min(within_s, slowest_s)
        group = next((group for group in self._groups if not group.given_up), self._groups[0])
        failure: Exception
        with _ray_errors():
            for _ in range(MAX_RESTARTS + 1):
                if self._float_actor is None:
                    self._float_actor = group.replace_by_one(self._tokens)
                asked = self._float_actor.predict_in_float.remote(group.specs[0], batch)
                try:
                    answer: np.ndarray = _get_within(asked, within_s)
                    return answer
                except _DEATHS as death:
                    # The one that ended may have had nothing to do with these rows.
                    self.faults.worker_deaths += 1
                    self._float_actor, failure = None, death
                except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
                    self._float_actor, failure = None, error
                    break
        raise WorkerError(
            f"{group.noun} {group.number}: {type(failure).__name__}: {first_line(failure)}"
        ) from failure

    def _run(self, backlog: Backlog) -> Generator[BatchResult | None, None, None]:
        first_ready: float | None = None
        assert self._dealer is not None, "this is a bug: batches come with a dealer"
        dealer = self._dealer
        for group in self._groups:
            if group.loaded:
                self._expect(group)
                group.hand_tokens(self._tokens)
        while backlog:
            self._follow_nodes()
            for group in self._groups:
                if not dealer.is_settled(group):
                    self._give_work(group, dealer)
            for group, step in self._finished_steps():
                if step.what != "predict":
                    self._take_setup_step(group, step)
                    first_ready = first_ready or group.ready_at
                    continue
                result = self._take_result(group, step)
                self.predict_s = time.monotonic() - (first_ready or self._created_at)
                if result is not None:
                    yield result
            self._end_hung(dealer)
            yield None
        for group in self._groups:
            group.stop_clock()

    def _follow_nodes(self) -> None:
        """Start replicas on nodes that are ready for them, and give up those whose node is gone."""
        if self._nodes is None:
            return
        for ready in self._nodes.take_ready():
            self._add_group(ready.slots, ready.specs)
        lost = self._nodes.lost
        for group in self._groups:
            if not group.given_up and any(slot.node in lost for slot in group.slots):
                self.faults.worker_deaths += group.loaded
                self._desert(group)
        if not self._groups or not all(group.given_up for group in self._groups):
            self._deserted_since = None
            return
        self._deserted_since = self._deserted_since or time.monotonic()
        if time.monotonic() - self._deserted_since > NODE_COMES_WITHIN_S:
            raise WorkerError(
                f"All nodes with workers are gone, and no other came in {NODE_COMES_WITHIN_S:.0f} "
                "s: expected one with free devices, as `ray status` shows them."
            )

    def _desert(self, group: Group) -> None:
        """A node is gone, and a group with it: others do its work, where there are some."""
        assert self._nodes is not None, "this is a bug: only nodes of a cluster are lost"
        batches = group.give_up()
        if self._backlog is not None:
            self._recovery.lost(group.number, batches, "its node was lost")
        self._nodes.forget(group.number)
        self._show(group, "lost")
        self._timeline.event("its node was lost; it is given up", group.number)
        names = ", ".join(dict.fromkeys(stats.node for stats in group.stats))
        self._progress.note(
            f"warning: {group.noun} {group.number} is gone with its node ({names})",
            event="fault",
            replica=group.number,
        )

    def warm(self) -> set[BatchShape]:
        """Return the shapes of which some replica has a program."""
        return {shape for group in self._groups for shape in group.warm}

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        """Return how fast each replica is, and how long it will load and compile besides.

        Args:
            shapes: those that are to come, None for those of the backlog.
        """
        assert self._dealer is not None, "this is a bug: a forecast comes after the plan"
        is_new, stats = shapes is not None, self.stats
        return self._dealer.paces(
            self._clock,
            shapes=shapes,
            compile_s=lambda alike: seconds_to_compile(stats, is_new=is_new, replicas=alike),
        )

    def is_measured(self) -> bool:
        """Whether batches enough have finished to rest a decision on."""
        return any(self._rates.is_measured(group.number) for group in self._groups)

    def compile_s(self) -> float:
        """Return the seconds that a shape takes to compile that was in no plan before."""
        return seconds_to_compile(self.stats, is_new=True)

    def _store(self, tokens: TokenTable) -> ray.ObjectRef:
        try:
            return ray.put(tokens)
        except _STORE_FULL as error:
            size = (tokens.values.nbytes + tokens.offsets.nbytes) / 1e6
            raise WorkerError(
                f"Ray's object store has no room for the {size:,.0f} MB of token ids: make room in "
                f"/dev/shm and in the folder for temporary files. ({first_line(error)})"
            ) from error

    def _spawn(self, group: Group) -> None:
        self._show(group, "starting")
        group.spawn()

    def _finished_steps(self, timeout_s: float = WAIT_S) -> Iterator[tuple[Group, Step]]:
        """Wait for calls to end and yield the steps whose last answer has come."""
        owners = {reference: group for group in self._groups for reference in group.calls}
        if not owners:
            assert not timeout_s or self._nodes is not None, (
                "this is a bug: rows are missing and no worker has work"
            )
            time.sleep(timeout_s)
            self._look_at_the_clock()
            return
        references = list(owners)
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        # First of all: else each worker that ended with Ray would be taken for a death of its own.
        check_ray()
        self._look_at_the_clock()
        for reference in ready:
            group = owners[reference]
            if reference not in group.calls:
                continue  # of an actor that was seen dead a moment ago
            step, place = group.calls.pop(reference)
            try:
                step.answers[place] = ray.get(reference)
            except _DEATHS as death:
                self.faults.worker_deaths += 1
                self._bury(group, "its worker died", death)
            except _STORE_FULL as error:
                raise WorkerError(
                    "Ray's object store is full: make room in /dev/shm and in the folder for "
                    f"temporary files. ({first_line(error)})"
                ) from error
            except ray.exceptions.RayTaskError as failure:
                self._take_failure(group, step, failure)
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
            assert self._dealer is not None, "this is a bug: shapes are compiled after the plan"
            self._dealer.compiled(group, step.payload)
        group.go_on_after(step)
        if group.warm and group.has_tokens and group.ready_at is None:
            group.ready_at = time.monotonic()
            group.start_s = self._clock - group.spawned_at

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
        if self._backlog is not None:
            self._expect(group)
            group.hand_tokens(self._tokens)

    def _expect(self, group: Group) -> None:
        assert self.info is not None, "this is a bug: a loaded worker has said what it is"
        self._rates.expect(group.number, self.info.matmul_flops_per_s * len(group.slots))

    def _take_result(self, group: Group, step: Step) -> BatchResult | None:
        """Count an answer; None where another replica's came before."""
        assert self._backlog is not None, "this is a bug: batches are given after the plan"
        was_alone = len(group.in_flight) == 1 and self._backlog.is_suspect(step.payload)
        result, seconds, compiling_s = group.take_result(step)
        shape = step.payload.shape
        if not (was_alone and len(group.slots) > 1):
            # Alone in a pipeline, a batch takes as long as all stages together.
            self._rates.learn(
                group.number,
                shape,
                seconds,
                is_first=shape not in group.used,
                compiling_s=compiling_s,
            )
        group.used.add(shape)
        self._recovery.answered()
        return result if self._backlog.finish(step.payload) else None

    def _give_work(self, group: Group, dealer: Dealer) -> None:
        """Keep a group busy: shapes until all are compiled, and batches of those that are."""
        if not group.loaded or group.given_up:
            return
        while group.has_tokens and (batch := dealer.next_batch(group, self._clock)):
            group.start(batch)
        if shape := dealer.next_shape(group, self._clock):
            total = len(group.warm | {*dealer.shapes(group)})
            self._show(group, f"compiling {len(group.warm) + 1}/{total}")
            group.compile(shape)
        if group.in_flight:
            self._show(group, "busy")
        elif group.compiling is None:
            self._show(group, "idle")

    def _bury(self, group: Group, reason: str, cause: Exception | None = None) -> None:
        """Take back the batches of a group that lost a worker and replace it, if it may be."""
        if self._nodes is not None and self._nodes.has_lost(slot.node for slot in group.slots):
            self._desert(group)
            return
        batches = group.end()
        explained = False
        if self._backlog is not None:
            explained = self._recovery.lost(group.number, batches, reason)
        if not explained:
            group.restarts += 1
        again = group.restarts <= MAX_RESTARTS
        ending = "; it is started again" if again else "; it is given up"
        self._timeline.event(reason + ending, group.number)
        if again:
            for stats in group.stats:
                stats.restarts += 1
            self._progress.note(
                f"{group.noun} {group.number} died and is started again",
                event="fault",
                replica=group.number,
                log=worker_log(group.number, "*"),
            )
            self._spawn(group)
            return
        group.given_up = True
        self._show(group, "dead")
        if all(other.given_up for other in self._groups):
            raise WorkerError(
                f"Every {group.noun} died {MAX_RESTARTS + 1} times; the last was {group.noun} "
                f"{group.number}. Is there memory enough for the model and one batch? Fewer "
                "--num-workers or a smaller --max-tokens-per-batch need less; its last words are "
                f"in {worker_log(group.number, '*')}."
            ) from cause
        self._progress.note(
            f"warning: {group.noun} {group.number} died {MAX_RESTARTS + 1} times and is given up; "
            "the others do its work",
            event="fault",
            replica=group.number,
            log=worker_log(group.number, "*"),
        )

    def _take_failure(self, group: Group, step: Step, failure: ray.exceptions.RayTaskError) -> None:
        """A worker raised an error: find another way for the batch, or end the run."""
        cause = failure.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause  # handed on from an earlier stage
        if isinstance(cause, _DEATHS) or (
            not isinstance(cause, ArenaRunnerError) and group.has_lost_a_member()
        ):
            # Those who work with the dead one may hear of it sooner than we do.
            self.faults.worker_deaths += 1
            self._bury(group, "its worker died", failure)
            return
        if step.what == "compile" and isinstance(cause, DeviceMemoryError):
            # Predicting says it again, of a batch that can then be split.
            step.answers = [CompileInfo(0.0, cached=False)] * len(step.answers)
            group.forget(step)
            self._take_setup_step(group, step)
            return
        if step.what != "predict" or (
            isinstance(cause, ArenaRunnerError) and not isinstance(cause, DeviceMemoryError)
        ):
            raise self._explain(group, step, failure, cause) from failure
        assert self._backlog is not None, "this is a bug: batches are given after the plan"
        group.drop(step)
        if isinstance(cause, DeviceMemoryError):
            alike = [one.number for one in self._groups if one.device == group.device]
            self._recovery.too_large(group.number, alike, step.payload)
        else:
            self._progress.keep(failure)
            said = f"{type(cause).__name__}: {first_line(cause)}"
            self._recovery.failed(group.number, step.payload, failure, said)
        if group.strategy_name == "tensor":
            # The other members wait for the one that failed.
            for batch in group.end():
                self._backlog.put_back(batch, group.number)
            self._backlog.release(group.number)
            self._spawn(group)

    def _explain(
        self, group: Group, step: Step, failure: Exception, cause: BaseException
    ) -> ArenaRunnerError:
        """Return the error that a worker raised, named by replica and step, or by batch and rows;
        of files that do not fit nothing more is to be said."""
        replica = f"{group.noun.capitalize()} {group.number}"
        if not isinstance(cause, ArenaRunnerError):
            said = f"{type(cause).__name__}: {first_line(cause)}"
            return WorkerError(f"{replica} failed in {step.what}: {said}")
        if step.what == "predict":
            return self._recovery.explain(replica, step.payload, cause)
        return cause

    def _look_at_the_clock(self) -> None:
        """Move the dispatcher's clock, which stands still while the machine is suspended."""
        now = time.monotonic()
        self._clock += min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now

    def _end_hung(self, dealer: Dealer) -> None:
        """End groups that take far longer for something than they should."""
        if self._clock - self._looked_for_hung_at < WAIT_S:
            return
        self._looked_for_hung_at = self._clock
        assert self._backlog is not None, "this is a bug: work is given after the plan"
        for group in self._groups:
            for step, since in list(group.oldest()):
                if step.what == "predict":
                    limit = dealer.batch_limit_s(group, step.payload, self._left_s())
                else:
                    stored = self._stored_bytes if step.what == "load" else 0
                    limit = STEP_WITHIN_S[step.what] + stored / SLOWEST_LOAD_BYTES_PER_S
                if self._clock - since <= limit or group.given_up:
                    continue
                self.faults.hangs += 1
                doing = "a batch" if step.what == "predict" else step.what
                self._progress.note(
                    f"warning: {group.noun} {group.number} hangs: {self._clock - since:.0f} s in "
                    f"{doing}, where {limit:.0f} are the most; ended",
                    event="fault",
                    replica=group.number,
                )
                if step.what == "predict":
                    # Those behind it did no harm.
                    for batch in tuple(group.in_flight)[1:]:
                        group.in_flight.remove(batch)
                        self._backlog.put_back(batch, group.number)
                self._bury(group, "its worker hung")
                break

    def _show(self, group: Group, state: str) -> None:
        self._progress.set_worker(group.number, state)


def _get_within(asked: ray.ObjectRef, within_s: float) -> Any:
    """Return an answer, looking after Ray while it is waited for."""
    end = time.monotonic() + within_s
    while True:
        left_s = end - time.monotonic()
        ready, _ = ray.wait([asked], timeout=max(0.0, min(WAIT_S, left_s)))
        check_ray()
        if ready or left_s <= 0:
            return ray.get(asked, timeout=0)


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Within, what Ray raises of itself becomes a WorkerError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        check_ray()
        raise WorkerError(f"Ray failed: {type(error).__name__}: {first_line(error)}") from error
