"""One replica that Ray runs: the requests to its actors, their answers, and its restarts.

Does not know other replicas, the plan, or when to give up, which `failures.py` decides.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.util.placement_group import remove_placement_group

from runner.common.records import BatchResult, WorkerInfo, WorkerStats
from runner.executors.ray.actors import Actors, Ready, reserve
from runner.executors.ray.session import private_folder
from runner.telemetry.timeline import COMPILING, LOADING, LOST, STARTING, Timeline
from sharding.batches import Batch, BatchShape
from sharding.dealing import BATCHES_IN_FLIGHT, ReplicaState

# Batches in flight in a pipeline beyond one per stage, so that no stage waits for a hand-over.
EXTRA_IN_PIPELINE = 2


@dataclass(slots=True, eq=False)
class Step:
    """One request to a group, and the answers of the members that take part.

    missing: how many answers have yet to come. asked_at: seconds by the dispatcher's clock.
    asked_s: by the timeline's.
    """

    what: str
    payload: Any
    answers: list[Any]
    missing: int
    asked_at: float
    asked_s: float


class Group(ReplicaState):
    """The workers of one replica, over all sets of actors that they have been.

    Actors go through steps: ping, meet (if tensor-parallel), load, tokens, compile for each shape,
    predict for each batch. `calls` has those under way: reference -> (step, place of its answer).

    Args:
        family, verbose: as for `Actors`.
        timeline: records what each member did when.
        clock: the dispatcher's, in seconds.
    """

    def __init__(
        self,
        ready: Ready,
        *,
        family: str,
        verbose: bool,
        timeline: Timeline,
        log_folder: Path | None,
        clock: Callable[[], float],
    ) -> None:
        self.slots = slots = ready.slots
        self.strategy_name = ready.strategy_name
        super().__init__(
            number=slots[0].replica,
            node=slots[0].node,
            members=len(slots),
            most_in_flight=len(slots) + EXTRA_IN_PIPELINE
            if self.strategy_name == "pipeline"
            else BATCHES_IN_FLIGHT,
        )
        self.noun = "worker" if self.strategy_name is None else "group"
        self.device = slots[0].kind
        self.stats = [WorkerStats(slot.replica, slot.member, slot.kind) for slot in slots]
        self.calls: dict[Any, tuple[Step, int]] = {}
        self.loaded = self.has_tokens = False
        # Only those that count against it; a batch explains the others.
        self.restarts = 0
        # When it last became ready, by `time.monotonic()`; and seconds that it was ready before.
        self.ready_at = self._alive_s = 0.0
        self._timeline = timeline
        self._clock = clock
        self._ready = ready
        self._placement = reserve(slots)
        self._start = partial(
            Actors,
            placement=self._placement,
            family=family,
            verbose=verbose,
            # Absolute, since a worker may have another working directory.
            log_folder=str(log_folder.resolve()) if log_folder is not None else None,
        )
        self.spawn()

    def spawn(self) -> None:
        """Start new actors in the slots and let them load."""
        self.spawned_at = self._clock()
        self.actors = self._start(self._ready)
        self._ask("ping", self.actors.ping())
        # The members of a tensor group load once they know where to meet.
        if self.strategy_name != "tensor":
            self._ask("load", self.actors.load())

    def go_on_after(self, step: Step) -> None:
        """Record a finished step of the start, and request the next."""
        if what := {"ping": STARTING, "load": LOADING}.get(step.what):
            for slot in self.slots:
                self._timeline.add(what, slot.replica, slot.member, step.asked_s)
        if step.what == "ping" and self.strategy_name == "tensor":
            if folder := private_folder():
                address = f"unix:{folder}/{secrets.token_hex(4)}"
                self._ask("load", self.actors.load(address))
                return
            machines = set(step.answers)
            host = "127.0.0.1" if len(machines) == 1 else step.answers[0]
            self._ask("meet", self.actors.reserve_address(host))
        elif step.what == "meet":
            self._ask("load", self.actors.load(step.answers[0]))
        if self.warm and self.has_tokens and not self.is_ready:
            self.is_ready, self.ready_at = True, time.monotonic()
            self.start_s = self._clock() - self.spawned_at

    def take_load(self, answers: list[WorkerInfo]) -> None:
        self.loaded = True
        self.device = answers[0].device.split(",")[0]
        for stats, info in zip(self.stats, answers, strict=True):
            stats.introduce(info)

    def hand_tokens(self, tokens: Any) -> None:
        """Give the reference of the token table to the members that read it."""
        self.has_tokens = False
        self._ask("tokens", self.actors.hold_tokens(tokens))

    def compile(self, shape: BatchShape) -> None:
        self.begin_compiling(shape, self._clock())
        self._ask("compile", self.actors.compile(shape), shape)

    def take_compiled(self, step: Step) -> None:
        self.warm.add(step.payload)
        self.end_compiling(self._clock())
        for stats, answer in zip(self.stats, step.answers, strict=True):
            stats.count_compiled(answer)
            self._timeline.add(
                COMPILING,
                stats.replica,
                stats.member,
                step.asked_s,
                ended_s=min(step.asked_s + answer.seconds, self._timeline.now()),
                shape=step.payload,
                is_cached=answer.cached,
            )

    def start(self, batch: Batch) -> None:
        """Start to predict a batch."""
        self.in_flight.append(batch)
        self._ask("predict", self.actors.predict(batch), batch)

    def replace_by_one(self, tokens: Any) -> Actors:
        """End the group; return a new actor without a model in the place of its first member.

        The members of a tensor group cannot compute alone, and the device has no room for both.
        """
        self.end()
        self.actors = self._start(self._ready.first_alone())
        self.actors.hold_tokens(tokens)
        return self.actors

    def take_result(self, step: Step) -> tuple[BatchResult, float]:
        """Count a finished batch; return its result, and when it began, which is not before the end
        of the batch ahead of it."""
        self.in_flight.remove(step.payload)
        began = self._began(step)
        self.finished_at = self._clock()
        result: BatchResult = step.answers[0]
        # Each member of a tensor group answers for itself, a pipeline's last stage for all.
        work = [entry for answer in step.answers for entry in answer.work]
        for stats, entry in zip(self.stats, work, strict=True):
            stats.count(len(result.batch.rows), entry)
        self._timeline.predicted(result.batch, self.number, work, step.asked_s)
        return result, began

    def drop(self, step: Step) -> None:
        """Forget a batch that failed, and the calls of other members for it."""
        for slot in self.slots:
            lane = (slot.replica, slot.member)
            self._timeline.add(LOST, *lane, step.asked_s, batch=step.payload)
        self.in_flight.remove(step.payload)
        self.forget(step)
        self.finished_at = self._clock()

    def forget(self, step: Step) -> None:
        """Stop waiting for the calls of a step."""
        for reference in [ref for ref, (of, _) in self.calls.items() if of is step]:
            del self.calls[reference]

    def oldest(self) -> Iterator[tuple[Step, float]]:
        """Yield each step that is under way, and since when; of the batches only the first, since
        the others wait for it."""
        steps = dict.fromkeys(step for step, _ in self.calls.values())
        predicting = [step for step in steps if step.what == "predict"]
        for step in steps:
            if step.what != "predict":
                yield step, step.asked_at
            elif step is predicting[0]:
                yield step, self._began(step)

    def end(self, *, is_over: bool = False) -> tuple[Batch, ...]:
        """End all actors and return the batches in flight, the oldest first.

        Args:
            is_over: whether the run is over; then work that was under way is not lost by a fault.
        """
        batches = tuple(self.in_flight)
        self._mark_lost(is_over)
        self.actors.kill()
        self.calls.clear()
        self.stop_clock()
        self.clear(self._clock())
        self.loaded = self.has_tokens = False
        return batches

    def give_up(self) -> tuple[Batch, ...]:
        """End all actors for good, and free their places."""
        self.given_up = True
        batches = self.end()
        remove_placement_group(self._placement)
        return batches

    def stop_clock(self) -> None:
        """Update how long the workers were ready, and how much of that they were idle."""
        if self.is_ready:
            self._alive_s += time.monotonic() - self.ready_at
            self.is_ready = False
        for stats in self.stats:
            stats.idle_s = max(0.0, self._alive_s - stats.busy_s)

    def _began(self, step: Step) -> float:
        return max(step.asked_at, self.finished_at)

    def _mark_lost(self, is_over: bool) -> None:
        """Record the work that gets no answer, a batch above all."""
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

    def _ask(self, what: str, calls: list[Any], payload: Any = None) -> None:
        step = Step(
            what, payload, [None] * len(calls), len(calls), self._clock(), self._timeline.now()
        )
        for place, reference in enumerate(calls):
            self.calls[reference] = (step, place)
