"""Replicas fed with batches: a bounded number in flight, results as they come.

Does not know JAX, tables or files, nor how a batch passes through a replica (`group.py`), where one
may be started (`places.py`), or what becomes of one that failed (`failures.py`).
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import ray
import ray.exceptions

from runner.common.errors import ConfigError, WorkerError, first_line
from runner.common.records import (
    BatchResult,
    Faults,
    ModelSpec,
    TokenTable,
    WorkerInfo,
    WorkerStats,
    seconds_to_compile,
)
from runner.executors.ray.calls import (
    DEATHS,
    WAIT_S,
    finished_steps,
    get_within,
    ray_errors,
    store,
)
from runner.executors.ray.crew import Crew, Pass
from runner.executors.ray.failures import MAX_RESTARTS, Failures, load_within_s
from runner.executors.ray.group import Group, Step
from runner.executors.ray.nodes import Nodes
from runner.executors.ray.places import Here, Places
from runner.executors.ray.session import join_ray, private_folder, stop_ray
from runner.executors.ray.shipping import SHIP
from runner.executors.recovery import Recovery
from runner.model.injected_faults import patience_s
from runner.telemetry.logs import keep_logs_of_ray
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.dealing import Dealer
from sharding.forecast import Pace
from sharding.rates import Rates
from sharding.strategies import Strategy


class RayReplicas:
    """All replicas of a run: an `Executor`, whose methods it documents.

    Args:
        num_workers: actors in all, None for as many as the devices suggest.
        group_size: how many of them make one replica.
        strategy, family, timeline: as for `Group`.
        left_s: the seconds in which rows can still be predicted, infinite if there is no limit.
        log_folder: where workers write to, None for Ray's own logs.
        address: of a Ray cluster to join, None to start Ray on this machine.
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
        self._address = address
        self._verbose = verbose
        self._log_folder = log_folder
        places: Places
        if address is None:
            places = Here(num_workers=num_workers, group_size=group_size, verbose=verbose)
        else:
            places = Nodes(
                num_workers=num_workers,
                group_size=group_size,
                is_tensor=strategy is not None and strategy.name == "tensor",
                even_here=os.environ.get(SHIP) == "always",
                note=progress.note,
            )
        groups: list[Group] = []
        self.faults = Faults()
        self._crew = crew = Crew(
            places=places,
            progress=progress,
            timeline=timeline,
            left_s=left_s,
            at_work=_nothing(groups, self.faults),
            groups=groups,
            faults=self.faults,
        )
        self._make_group = partial(
            Group,
            strategy=strategy,
            family=family,
            verbose=verbose,
            log_folder=log_folder,
            timeline=timeline,
            clock=lambda: crew.clock.now,
        )
        self._failures = Failures(crew, self._take_setup_step)
        self._created_at = time.monotonic()
        self._float_actor: ray.actor.ActorHandle | None = None
        self._said: set[str] = set()
        self._copied_before = 0
        self.kind = "cpu"
        self.replicas = 1
        self.info: WorkerInfo | None = None
        self.start_workers_s = 0.0
        self.predict_s = 0.0

    def __enter__(self) -> "RayReplicas":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._crew.places.close()
        # If Ray itself has failed there is nobody to ask; its processes end all the same.
        with suppress(ray.exceptions.RayError):
            for group in self._crew.groups:
                group.end(is_over=True)
        folder = private_folder()
        if kind is not None and folder is not None and self._log_folder is not None:
            keep_logs_of_ray(folder / "r" / "session_latest" / "logs", self._log_folder)
        stop_ray()

    @property
    def copied_batches(self) -> int:
        return self._copied_before + self._crew.at_work.dealer.copied_batches

    @property
    def stats(self) -> list[WorkerStats]:
        return self._crew.stats

    def open(self, dtype: str, compilation_cache: str) -> str:
        if self._address is not None:
            join_ray(self._address, verbose=self._verbose)
        self.replicas, dtype = self._crew.places.open(dtype)
        self.kind = self._crew.places.kind
        return dtype

    def start(self, spec: ModelSpec) -> None:
        self._crew.stored_bytes = spec.stored_bytes
        self._crew.places.start(spec)
        with ray_errors():
            self._add_groups()

    def _add_groups(self) -> None:
        """Start replicas wherever there is a place ready for one."""
        places = self._crew.places
        for ready in places.take_ready():
            group = self._make_group(ready.slots, specs=ready.specs)
            for stats, slot in zip(group.stats, ready.slots, strict=True):
                stats.node = places.name(slot.node)
            self._crew.groups.append(group)
            self._crew.spawn(group)

    def _follow_nodes(self) -> None:
        self._add_groups()
        self._failures.follow_nodes()

    def _finished_steps(self, timeout_s: float = WAIT_S) -> Iterator[tuple[Group, Step]]:
        return finished_steps(
            self._crew.groups,
            self._crew.clock,
            timeout_s=timeout_s,
            is_idle_right=not timeout_s or self._crew.places.may_grow,
            on_death=self._failures.died,
            on_failure=self._failures.failed,
        )

    def poll(self) -> None:
        with ray_errors():
            self._follow_nodes()
            for group, step in self._finished_steps(timeout_s=0):
                if step.what == "predict":
                    group.take_result(step)  # a copy of a batch that another replica ended before
                    continue
                self._take_setup_step(group, step)

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        crew = self._crew
        self._copied_before = self.copied_batches
        note = partial(crew.progress.note, event="fault")
        with ray_errors():
            crew.at_work = Pass(
                backlog,
                rates,
                Dealer(backlog, rates, crew.groups, patience_s=patience_s()),
                Recovery(backlog, self.faults, ids, note, crew.timeline.event),
                store(tokens),
            )
            yield from self._run(backlog)

    def _run(self, backlog: Backlog) -> Generator[BatchResult | None, None, None]:
        first_ready: float | None = None
        crew, dealer = self._crew, self._crew.at_work.dealer
        for group in crew.groups:
            if group.loaded:
                self._expect(group)
                group.hand_tokens(crew.at_work.tokens)
        while backlog:
            self._follow_nodes()
            for group in crew.groups:
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
            self._failures.end_hung()
            yield None
        for group in crew.groups:
            group.stop_clock()

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        """In a process of its own: see `Executor`."""
        crew = self._crew
        within_s = min(within_s, load_within_s(crew.stored_bytes))
        group = next((group for group in crew.groups if not group.given_up), crew.groups[0])
        failure: Exception
        with ray_errors():
            for _ in range(MAX_RESTARTS + 1):
                if self._float_actor is None:
                    self._float_actor = group.replace_by_one(crew.at_work.tokens)
                asked = self._float_actor.predict_in_float.remote(group.specs[0], batch)
                try:
                    answer: np.ndarray = get_within(asked, within_s)
                    return answer
                except DEATHS as death:
                    # The one that ended may have had nothing to do with these rows.
                    self.faults.worker_deaths += 1
                    self._float_actor, failure = None, death
                except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
                    self._float_actor, failure = None, error
                    break
        raise WorkerError(
            f"{group.noun} {group.number}: {type(failure).__name__}: {first_line(failure)}"
        ) from failure

    def warm(self) -> set[BatchShape]:
        return {shape for group in self._crew.groups for shape in group.warm}

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        is_new, stats = shapes is not None, self.stats
        return self._crew.at_work.dealer.paces(
            self._crew.clock.now,
            shapes=shapes,
            compile_s=lambda alike: seconds_to_compile(stats, is_new=is_new, replicas=alike),
        )

    def is_measured(self) -> bool:
        rates = self._crew.at_work.rates
        return any(rates.is_measured(group.number) for group in self._crew.groups)

    def compile_s(self) -> float:
        return seconds_to_compile(self.stats, is_new=True)

    def _take_setup_step(self, group: Group, step: Step) -> None:
        crew = self._crew
        if step.what == "ping":
            self.start_workers_s = max(self.start_workers_s, time.monotonic() - self._created_at)
            crew.show(group, "loading")
        elif step.what == "load":
            self._take_load(group, step.answers)
        elif step.what == "tokens":
            group.has_tokens = True
        elif step.what == "compile":
            group.take_compiled(step)
            crew.at_work.dealer.compiled(group, step.payload)
        group.go_on_after(step)
        if group.warm and group.has_tokens and group.ready_at is None:
            group.ready_at = time.monotonic()
            group.start_s = crew.clock.now - group.spawned_at

    def _take_load(self, group: Group, answers: list[WorkerInfo]) -> None:
        crew = self._crew
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
                    crew.progress.note(note)
        group.take_load(answers)
        crew.show(group, "loaded")
        if crew.at_work.tokens is not None:
            self._expect(group)
            group.hand_tokens(crew.at_work.tokens)

    def _expect(self, group: Group) -> None:
        assert self.info is not None, "this is a bug: a loaded worker has said what it is"
        rate = self.info.matmul_flops_per_s * len(group.slots)
        self._crew.at_work.rates.expect(group.number, rate)

    def _take_result(self, group: Group, step: Step) -> BatchResult | None:
        """Count an answer; None if another replica's came before."""
        at_work, shape = self._crew.at_work, step.payload.shape
        was_alone = len(group.in_flight) == 1 and at_work.backlog.is_suspect(step.payload)
        result, seconds, compiling_s = group.take_result(step)
        if not (was_alone and len(group.slots) > 1):
            # Alone in a pipeline, a batch takes as long as all stages together.
            at_work.rates.learn(
                group.number,
                shape,
                seconds,
                is_first=shape not in group.used,
                compiling_s=compiling_s,
            )
        group.used.add(shape)
        at_work.recovery.answered()
        return result if at_work.backlog.finish(step.payload) else None

    def _give_work(self, group: Group, dealer: Dealer) -> None:
        """Keep a group busy: shapes until all are compiled, and batches of those that are."""
        if not group.loaded or group.given_up:
            return
        now = self._crew.clock.now
        while group.has_tokens and (batch := dealer.next_batch(group, now)):
            group.start(batch)
        if shape := dealer.next_shape(group, now):
            total = len(group.warm | {*dealer.shapes(group)})
            self._crew.show(group, f"compiling {len(group.warm) + 1}/{total}")
            group.compile(shape)
        if group.in_flight:
            self._crew.show(group, "busy")
        elif group.compiling is None:
            self._crew.show(group, "idle")


def _nothing(groups: list[Group], faults: Faults) -> Pass:
    """Return the pass before the first: no rows, no tokens."""
    backlog, rates = Backlog((), cost=_costs_nothing), Rates(_costs_nothing)
    recovery = Recovery(backlog, faults, (), note=lambda said: None)
    return Pass(backlog, rates, Dealer(backlog, rates, groups), recovery, None)


def _costs_nothing(shape: BatchShape) -> float:
    return 0.0
