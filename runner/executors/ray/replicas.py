"""Feeds replicas with batches, a few in flight at a time, and yields results as they arrive.

Does not know JAX, tables or files. How a batch passes through a replica is in `actors.py`, where
replicas may start in `places.py`, and what happens when one fails in `failures.py`.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import ray
import ray.exceptions

from runner.common.errors import WorkerError, first_line
from runner.common.records import (
    BatchResult,
    Computed,
    ModelSpec,
    TokenTable,
    seconds_to_compile,
)
from runner.executors.one_pass import Pass, no_rows
from runner.executors.ray.actors import Actors
from runner.executors.ray.calls import (
    DEATHS,
    WAIT_S,
    finished_steps,
    get_within,
    ray_errors,
    store,
)
from runner.executors.ray.crew import Crew
from runner.executors.ray.failures import MAX_RESTARTS, Failures, load_within_s
from runner.executors.ray.group import Group, Step
from runner.executors.ray.nodes import Nodes
from runner.executors.ray.places import Here, Places
from runner.executors.ray.session import join_ray, private_folder, stop_ray
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
    """All replicas of a run: an `Executor`, which documents its methods.

    Args:
        num_workers: actors in all, None for as many as the devices suggest.
        group_size: how many of them make one replica.
        is_tensor: whether each member of a group holds a slice of every weight.
        family, timeline: as for `Group`.
        left_s: returns the seconds in which rows can still be predicted, infinite without a limit.
        log_folder: for the output of workers, None for Ray's own logs.
        address: of a Ray cluster to join, None to start Ray on this machine.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        group_size: int,
        is_tensor: bool,
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
                is_tensor=is_tensor,
                note=progress.note,
            )
        groups: list[Group] = []
        self.computed = Computed()
        self._crew = crew = Crew(
            places=places,
            progress=progress,
            timeline=timeline,
            left_s=left_s,
            at_work=no_rows(groups, self.computed.faults),
            groups=groups,
            computed=self.computed,
            created_at=time.monotonic(),
        )
        self._make_group = partial(
            Group,
            family=family,
            verbose=verbose,
            log_folder=log_folder,
            timeline=timeline,
            clock=lambda: crew.clock.now,
        )
        self._failures = Failures(crew)
        # Predicts in float32 after the passes, in the place of a replica.
        self._in_float: Actors | None = None
        self.kind = "cpu"
        self.replicas = 1

    def __enter__(self) -> "RayReplicas":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._crew.places.close()
        # If Ray itself has failed, nobody answers; its processes end all the same.
        with suppress(ray.exceptions.RayError):
            for group in self._crew.groups:
                group.end(is_over=True)
        folder = private_folder()
        if kind is not None and folder is not None and self._log_folder is not None:
            keep_logs_of_ray(folder / "r" / "session_latest" / "logs", self._log_folder)
        stop_ray()

    def open(self, dtype: str) -> str:
        if self._address is not None:
            join_ray(self._address, verbose=self._verbose)
        self.replicas, dtype = self._crew.places.open(dtype)
        self.kind = self._crew.places.kind
        return dtype

    def memory_bytes(self) -> int | None:
        return self._crew.places.memory_bytes()

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        self._crew.stored_bytes = spec.stored_bytes
        self._crew.places.start(spec, strategy)
        with ray_errors():
            self._add_groups()

    def _add_groups(self) -> None:
        """Start a replica wherever a place is ready for one."""
        places = self._crew.places
        for ready in places.take_ready():
            group = self._make_group(ready)
            for stats, slot in zip(group.stats, ready.slots, strict=True):
                stats.node = places.name(slot.node)
            self.computed.stats += group.stats
            self._crew.groups.append(group)
            self._crew.show(group, "starting")

    def _follow_nodes(self) -> None:
        self._add_groups()
        self._failures.follow_nodes()

    def _finished_steps(self, timeout_s: float = WAIT_S) -> Iterator[tuple[Group, Step]]:
        return finished_steps(
            self._crew.groups,
            self._crew.clock,
            timeout_s=timeout_s,
            may_be_idle=not timeout_s or self._crew.places.may_grow,
            on_death=self._failures.died,
            on_failure=self._failures.failed,
        )

    def poll(self) -> None:
        with ray_errors():
            self._follow_nodes()
            for group, step in self._finished_steps(timeout_s=0):
                if step.what == "predict":
                    group.take_result(step)  # a copy of a batch that another replica finished first
                    continue
                self._crew.take_step(group, step)

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        crew = self._crew
        note = partial(crew.progress.note, event="fault")
        with ray_errors():
            crew.at_work = Pass(
                backlog,
                rates,
                Dealer(backlog, rates, crew.groups, patience_s=patience_s()),
                Recovery(backlog, self.computed.faults, ids, note, crew.timeline.event),
                crew.groups,
                store(tokens),
            )
            yield from self._run(backlog)

    def _run(self, backlog: Backlog) -> Generator[BatchResult | None, None, None]:
        first_ready, copied_before = 0.0, self.computed.copied_batches
        crew, dealer = self._crew, self._crew.at_work.dealer
        for group in crew.groups:
            crew.hand_tokens(group)
        while backlog:
            self._follow_nodes()
            for group in crew.groups:
                if not dealer.is_settled(group):
                    self._give_work(group, dealer)
            self.computed.copied_batches = copied_before + dealer.copied_batches
            for group, step in self._finished_steps():
                if step.what != "predict":
                    self._crew.take_step(group, step)
                    first_ready = first_ready or group.is_ready * group.ready_at
                    continue
                result = self._take_result(group, step)
                self.computed.predict_s = time.monotonic() - (first_ready or crew.created_at)
                if result is not None:
                    yield result
            self._failures.end_hung()
            yield None
        for group in crew.groups:
            group.stop_clock()

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        crew = self._crew
        within_s = min(within_s, load_within_s(crew.stored_bytes))
        group = next((group for group in crew.groups if not group.given_up), crew.groups[0])
        failure: Exception
        with ray_errors():
            for _ in range(MAX_RESTARTS + 1):
                self._in_float = self._in_float or group.replace_by_one(crew.at_work.tokens)
                try:
                    answer: np.ndarray = get_within(
                        self._in_float.predict_in_float(batch), within_s
                    )
                    return answer
                except DEATHS as death:
                    # The process may have ended for reasons other than these rows.
                    self.computed.faults.worker_deaths += 1
                    self._in_float, failure = None, death
                except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
                    self._in_float, failure = None, error
                    break
        raise WorkerError(
            f"{group.noun} {group.number}: {type(failure).__name__}: {first_line(failure)}"
        ) from failure

    def warm(self) -> set[BatchShape]:
        return {shape for group in self._crew.groups for shape in group.warm}

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        return self._crew.at_work.paces(self._crew.clock.now, self.computed.stats, shapes)

    def is_measured(self) -> bool:
        return self._crew.at_work.is_measured()

    def compile_s(self) -> float:
        return seconds_to_compile(self.computed.stats, is_new=True)

    def _take_result(self, group: Group, step: Step) -> BatchResult | None:
        """Count an answer and return it; None if another replica's came first."""
        at_work, batch = self._crew.at_work, step.payload
        was_alone = len(group.in_flight) == 1 and at_work.backlog.is_suspect(batch)
        result, began = group.take_result(step)
        # A batch alone in a pipeline takes as long as all stages together.
        learn = not (was_alone and group.members > 1)
        is_first = at_work.take_answer(
            group, batch, began=began, ended=group.finished_at, learn=learn
        )
        return result if is_first else None

    def _give_work(self, group: Group, dealer: Dealer) -> None:
        """Keep a group busy: compile shapes until it has all, and send batches of those it has."""
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
