"""The plan in this process, without Ray: the reference answer and the debugger's path."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from runner.common.errors import (
    BUSY_THREAD,
    ArenaRunnerError,
    DeviceMemoryError,
    WorkerError,
    first_line,
)
from runner.common.files import compilation_cache
from runner.common.machine import device_memory_bytes
from runner.common.records import (
    BatchResult,
    CompileInfo,
    Computed,
    ModelSpec,
    TokenTable,
    WorkerStats,
    seconds_to_compile,
)
from runner.common.units import seconds_text
from runner.executors.one_pass import Pass, no_rows
from runner.executors.recovery import Recovery
from runner.model import cpu_allocator
from runner.model.worker import Replica
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import COMPILING, LOADING, Timeline
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.dealing import BATCHES_IN_FLIGHT, Dealer, ReplicaState
from sharding.forecast import Pace
from sharding.rates import Rates
from sharding.strategies import Strategy
from sharding.topology import WorkerSlot

# Seconds between looks at the clock when nothing arrives.
WAIT_S = 0.2


class InProcess:
    """One replica on the first device that JAX finds, all cores if that is the CPU: an `Executor`,
    which documents its methods."""

    def __init__(self, *, verbose: bool, progress: Progress, timeline: Timeline) -> None:
        self._replica = Replica(WorkerSlot(0, "auto"), verbose=verbose)
        self._progress = progress
        self._timeline = timeline
        self._threads = _Threads(timeline.now)
        self._state = ReplicaState(0)
        self._stats = WorkerStats(replica=0)
        self.computed = Computed(stats=[self._stats])
        self._at_work = no_rows([self._state], self.computed.faults)
        self.kind = "cpu"
        self.replicas = 1

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.end()
        cpu_allocator.let_go()

    def open(self, dtype: str) -> str:
        self.kind, dtype = self._replica.find_device(dtype, compilation_cache())
        return dtype

    def memory_bytes(self) -> int | None:
        return device_memory_bytes()

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:  # noqa: ARG002 - no group
        self._progress.set_worker(0, "loading")
        self._spec = spec
        self._threads.compile(self._replica.load, spec)

    def poll(self) -> None:
        if self.computed.info is None and (answer := self._threads.wait(0.0)):
            self._take_load(answer)

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        replicas = [self._state]
        note = partial(self._progress.note, event="fault")
        recovery = Recovery(backlog, self.computed.faults, ids, note, self._timeline.event)
        self._at_work = Pass(backlog, rates, Dealer(backlog, rates, replicas), recovery, replicas)
        while (info := self.computed.info) is None:
            if answer := self._threads.wait(WAIT_S):
                self._take_load(answer)
            yield None
        rates.expect(0, info.matmul_flops_per_s)
        self._replica.hold_tokens(tokens)
        yield from self._run(backlog)

    def warm(self) -> set[BatchShape]:
        return set(self._state.warm)

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        return self._at_work.paces(time.monotonic(), self.computed.stats, shapes)

    def is_measured(self) -> bool:
        return self._at_work.is_measured()

    def compile_s(self) -> float:
        return seconds_to_compile(self.computed.stats, is_new=True)

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        threads = _Threads(self._timeline.now)
        threads.predict(lambda batch: self._replica.predict_in_float(self._spec, batch), batch)
        threads.end()
        answer = threads.wait(min(within_s, threading.TIMEOUT_MAX))
        if answer is None:
            raise WorkerError(f"no answer within {seconds_text(within_s)}")
        if answer.error is not None:
            raise WorkerError(f"{type(answer.error).__name__}: {first_line(answer.error)}")
        values: np.ndarray = answer.value
        return values

    def _take_load(self, answer: "Answer") -> None:
        if answer.error is not None:
            raise answer.error
        self.computed.info = info = answer.value
        self._timeline.add(LOADING, 0, 0, answer.asked_s)
        self._stats.introduce(info)
        for note in info.notes:
            self._progress.note(note)

    def _run(self, backlog: Backlog) -> Generator[BatchResult | None, None, None]:
        started = 0.0
        while backlog:
            self._give_work()
            if not started and self._state.in_flight:
                started = time.monotonic()
            answer = self._threads.wait(WAIT_S)
            if answer is None:
                yield None
            elif isinstance(answer.asked, BatchShape):
                self._take_compiled(answer.asked, answer)
            elif answer.error is not None:
                self._take_failure(answer.asked, answer.error)
            elif (result := self._take_result(answer.value, started)) is not None:
                yield result

    def _give_work(self) -> None:
        """Keep the device busy, and compile shapes ahead of their batches, in the order of use."""
        state, dealer = self._state, self._at_work.dealer
        while batch := dealer.next_batch(state, time.monotonic()):
            state.in_flight.append(batch)
            self._threads.predict(self._replica.predict, batch)
        if shape := dealer.next_shape(state, time.monotonic()):
            if not state.warm:
                self._progress.set_worker(0, f"compiling 1/{len(dealer.shapes(state))}")
            state.begin_compiling(shape, time.monotonic())
            self._threads.compile(self._replica.compile, shape)

    def _take_compiled(self, shape: BatchShape, answer: "Answer") -> None:
        if answer.error is not None and not isinstance(answer.error, DeviceMemoryError):
            raise answer.error
        # If memory was short, a batch of this shape will fail in the same way, and can be split.
        info = answer.value or CompileInfo(0.0, cached=False)
        self._stats.count_compiled(info)
        self._timeline.add(COMPILING, 0, 0, answer.asked_s, shape=shape, is_cached=info.cached)
        self._at_work.dealer.compiled(self._state, shape)
        self._state.warm.add(shape)
        self._state.end_compiling(time.monotonic())
        self._state.is_ready = True
        self._progress.set_worker(0, "busy")

    def _take_result(self, result: BatchResult, started: float) -> BatchResult | None:
        """Count and return an answer; None if the batch was answered before."""
        now, stats, work = time.monotonic(), self._stats, result.work
        self._state.in_flight.remove(result.batch)
        self._state.finished_at = now
        stats.count(len(result.batch.rows), work[0])
        self._timeline.predicted(result.batch, 0, work, 0.0)
        self.computed.predict_s = now - started
        stats.idle_s = max(0.0, now - started - stats.busy_s)
        is_first = self._at_work.take_answer(
            self._state, result.batch, began=now - work[0].seconds, ended=now
        )
        return result if is_first else None

    def _take_failure(self, batch: Batch, error: BaseException) -> None:
        self._state.in_flight.remove(batch)
        self._state.finished_at = time.monotonic()
        recovery = self._at_work.recovery
        if isinstance(error, DeviceMemoryError):
            recovery.too_large(0, (0,), batch)
        elif isinstance(error, ArenaRunnerError):
            raise recovery.explain("Worker 0", batch, error) from error
        else:
            self._progress.keep(error)
            recovery.failed(0, batch, error, f"{type(error).__name__}: {first_line(error)}")


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one task. asked_s: when it was requested, by the timeline."""

    asked: Any
    asked_s: float
    value: Any
    error: BaseException | None


class _Threads:
    """Threads that do not keep the process alive: one compiles, others predict.

    Args:
        now: seconds, for `asked_s` of answers.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._compiling: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._predicting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for work in (self._compiling, *(self._predicting,) * BATCHES_IN_FLIGHT):
            threading.Thread(target=self._serve, args=(work,), daemon=True).start()

    def compile(self, function: Callable[[Any], Any], asked: BatchShape | ModelSpec) -> None:
        self._compiling.put((function, asked, self._now()))

    def predict(self, function: Callable[[Batch], Any], batch: Batch) -> None:
        self._predicting.put((function, batch, self._now()))

    def wait(self, timeout_s: float) -> Answer | None:
        """Return the next answer, None if none came."""
        try:
            return self._answers.get(block=timeout_s > 0, timeout=timeout_s)
        except queue.Empty:
            return None

    def end(self) -> None:
        """Let the threads end once their tasks are done."""
        for work in (self._compiling, *(self._predicting,) * BATCHES_IN_FLIGHT):
            work.put(None)

    def _serve(self, work: "queue.SimpleQueue[Any]") -> None:
        while (task := work.get()) is not None:
            function, asked, asked_s = task
            thread = threading.current_thread()
            idle, thread.name = thread.name, BUSY_THREAD
            try:
                answer = Answer(asked, asked_s, function(asked), None)
            except BaseException as error:
                answer = Answer(asked, asked_s, None, error)
            thread.name = idle
            self._answers.put(answer)
