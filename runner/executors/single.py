"""The plan in this process, without Ray: the reference answer and the debugger's path."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
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
from runner.common.records import (
    BatchResult,
    CompileInfo,
    Faults,
    ModelSpec,
    TokenTable,
    WorkerInfo,
    WorkerStats,
    seconds_to_compile,
)
from runner.executors.recovery import Recovery
from runner.model import cpu_allocator
from runner.model.worker import Replica
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import COMPILING, LOADING, Timeline
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.forecast import Pace
from sharding.rates import Intervals, Rates
from sharding.topology import WorkerSlot

# One batch computes while the next is brought to the device.
BATCHES_IN_FLIGHT = 2
# Seconds between looks at the clock when nothing arrives.
WAIT_S = 0.2

Answer = tuple[Any, Any, BaseException | None]


class _Compiling:
    """The one shape that is being compiled, and when any was. asked_s: by the timeline."""

    def __init__(self) -> None:
        self.shape: BatchShape | None = None
        self.asked_s = 0.0
        self.times = Intervals()

    def begin(self, shape: BatchShape, asked_s: float) -> None:
        self.shape, self.asked_s = shape, asked_s
        self.times.begin(time.monotonic())

    def end(self) -> None:
        self.shape = None
        self.times.end(time.monotonic())


class InProcess:
    """One replica on the first device JAX finds, on all cores where that is the CPU."""

    def __init__(self, *, verbose: bool, progress: Progress, timeline: Timeline) -> None:
        self._replica = Replica(WorkerSlot(0, "auto"), verbose=verbose)
        self._progress = progress
        self._timeline = timeline
        self._load_asked_s = 0.0
        self._rates: Rates | None = None
        self._backlog: Backlog | None = None
        self._warm: set[BatchShape] = set()
        self._used: set[BatchShape] = set()
        self._threads: _Threads | None = None
        self.stats = [WorkerStats(replica=0)]
        self.faults = Faults()
        self.replicas = 1
        self.start_workers_s = 0.0
        self.predict_s = 0.0
        self.copied_batches = 0
        self.info: WorkerInfo | None = None

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._threads is not None:
            self._threads.end()
        cpu_allocator.let_go()

    def open(self, dtype: str, compilation_cache: str) -> str:
        """Find the device; return what `dtype` means on it."""
        self.kind, dtype = self._replica.find_device(dtype, compilation_cache)
        return dtype

    def start(self, spec: ModelSpec) -> None:
        """Begin to load the model; returns before it is there."""
        self._progress.set_worker(0, "loading")
        self._spec = spec
        self._threads = _Threads()
        self._load_asked_s = self._timeline.now()
        self._threads.compile(self._replica.load, spec)

    def poll(self) -> None:
        """Take over the model where it is there by now: finds bad files early."""
        assert self._threads is not None, "this is a bug: looked for a model that is not loading"
        if self.info is None and (answer := self._threads.wait(0.0)):
            self._take_load(answer)

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        """Yield the answer to every batch, and None at least every `WAIT_S` between them."""
        self._rates, self._backlog = rates, backlog
        note, mark = partial(self._progress.note, event="fault"), self._timeline.event
        recovery = Recovery(backlog, self.faults, ids, note, mark)
        assert self._threads is not None, "this is a bug: batches come after the model"
        while self.info is None:
            if answer := self._threads.wait(WAIT_S):
                self._take_load(answer)
            yield None
        rates.expect(0, self.info.matmul_flops_per_s)
        self._replica.hold_tokens(tokens)
        yield from self._run(backlog, recovery, rates, self._threads)

    def warm(self) -> set[BatchShape]:
        """Return the shapes of which there is a program."""
        return set(self._warm)

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        """Return how fast the device is, and how long it will compile besides.

        Args:
            shapes: those that are to come, None for those of the backlog.
        """
        if self._rates is None or self._backlog is None or not self._warm:
            return []
        to_come = {*(self._backlog.shapes(0) if shapes is None else shapes)}
        one_s = seconds_to_compile(self.stats, is_new=shapes is not None)
        delay_s = self._rates.preparing_s(to_come, used=self._used, warm=self._warm, one_s=one_s)
        return [Pace(self._rates.speed(0), delay_s)]

    def is_measured(self) -> bool:
        """Whether batches enough have finished to rest a decision on."""
        return self._rates is not None and self._rates.is_measured(0)

    def compile_s(self) -> float:
        """Return the seconds that a shape takes to compile that was in no plan before."""
        return seconds_to_compile(self.stats, is_new=True)

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`.

        Raises:
            WorkerError: it took longer than `within_s`.
        """
        threads = _Threads()
        threads.predict(lambda batch: self._replica.predict_in_float(self._spec, batch), batch)
        threads.end()
        answer = threads.wait(min(within_s, threading.TIMEOUT_MAX))
        if answer is None:
            raise WorkerError(f"no answer within {within_s:.0f} s")
        if answer[2] is not None:
            raise WorkerError(f"{type(answer[2]).__name__}: {first_line(answer[2])}")
        values: np.ndarray = answer[1]
        return values

    def _take_load(self, answer: "Answer") -> None:
        _, info, error = answer
        if error is not None:
            raise error
        self.info = info
        self._timeline.add(LOADING, 0, 0, self._load_asked_s)
        self.stats[0].introduce(info)
        for note in info.notes:
            self._progress.note(note)

    def _run(
        self, backlog: Backlog, recovery: Recovery, rates: Rates, threads: "_Threads"
    ) -> Generator[BatchResult | None, None, None]:
        self._warm, self._used = set(), set()
        compiling = _Compiling()
        in_flight: deque[Batch] = deque()
        started = 0.0
        while backlog:
            while batch := self._next_batch(backlog, in_flight):
                in_flight.append(batch)
                threads.predict(self._replica.predict, batch)
                started = started or time.monotonic()
            if compiling.shape is None and (rates.is_measured(0) or not in_flight):
                # What a batch takes is known sooner if no compiler is beside it. From then on one
                # thread compiles in the order of use, ahead of the batches.
                self._compile_next(backlog, compiling, threads)
            answer = threads.wait(WAIT_S)
            if answer is None:
                yield None
                continue
            asked, value, error = answer
            if isinstance(asked, BatchShape):
                self._take_compiled(asked, value, error, compiling)
                continue
            in_flight.remove(asked)
            if error is not None:
                self._take_failure(recovery, asked, error)
                continue
            self._count(value, rates, compiling, started)
            recovery.answered()
            if backlog.finish(asked):
                yield value

    def _next_batch(self, backlog: Backlog, in_flight: deque[Batch]) -> Batch | None:
        """Return what to compute next, None if enough is under way."""
        if len(in_flight) >= BATCHES_IN_FLIGHT or any(map(backlog.is_suspect, in_flight)):
            return None
        return backlog.take(0, runnable=self._warm.__contains__, alone=not in_flight)

    def _compile_next(self, backlog: Backlog, compiling: "_Compiling", threads: "_Threads") -> None:
        shapes = backlog.shapes(0)
        shape = next((shape for shape in shapes if shape not in self._warm), None)
        if shape is None:
            return
        threads.compile(self._replica.compile, shape)
        compiling.begin(shape, self._timeline.now())
        if not self._warm:
            self._progress.set_worker(0, f"compiling 1/{len(shapes)}")

    def _take_compiled(
        self,
        shape: BatchShape,
        info: CompileInfo | None,
        error: BaseException | None,
        compiling: "_Compiling",
    ) -> None:
        if error is not None and not isinstance(error, DeviceMemoryError):
            raise error
        # If memory was short, predicting says so of a batch that can be split.
        info = info or CompileInfo(0.0, cached=False)
        self.stats[0].count_compiled(info)
        self._timeline.add(COMPILING, 0, 0, compiling.asked_s, shape=shape, is_cached=info.cached)
        self._warm.add(shape)
        compiling.end()
        self._progress.set_worker(0, "busy")

    def _count(
        self, result: BatchResult, rates: Rates, compiling: "_Compiling", started: float
    ) -> None:
        """Count a batch that went well, and learn from it."""
        now, shape, stats = time.monotonic(), result.batch.shape, self.stats[0]
        seconds = result.work[0].seconds
        rates.learn(
            0,
            shape,
            seconds,
            is_first=shape not in self._used,
            compiling_s=compiling.times.within(now - seconds, now),
        )
        self._used.add(shape)
        stats.count(len(result.batch.rows), result.work[0])
        self._timeline.predicted(result.batch, 0, result.work, 0.0)
        self.predict_s = now - started
        stats.idle_s = max(0.0, self.predict_s - stats.busy_s)

    def _take_failure(self, recovery: Recovery, batch: Batch, error: BaseException) -> None:
        if isinstance(error, DeviceMemoryError):
            recovery.too_large(0, (0,), batch)
        elif isinstance(error, ArenaRunnerError):
            raise recovery.explain("Worker 0", batch, error) from error
        else:
            self._progress.keep(error)
            recovery.failed(0, batch, error, f"{type(error).__name__}: {first_line(error)}")


class _Threads:
    """Threads that do not keep the process alive: one compiles, others predict."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._compiling: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._predicting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for work in (self._compiling, *(self._predicting,) * BATCHES_IN_FLIGHT):
            threading.Thread(target=self._serve, args=(work,), daemon=True).start()

    def compile(self, function: Callable[[Any], Any], asked: BatchShape | ModelSpec) -> None:
        self._compiling.put((function, asked))

    def predict(self, function: Callable[[Batch], Any], batch: Batch) -> None:
        self._predicting.put((function, batch))

    def wait(self, timeout_s: float) -> Answer | None:
        """Return (what was asked, its value, its error), None if nothing came."""
        try:
            return self._answers.get(block=timeout_s > 0, timeout=timeout_s)
        except queue.Empty:
            return None

    def end(self) -> None:
        """Let the threads end when they have done what they do."""
        for work in (self._compiling, *(self._predicting,) * BATCHES_IN_FLIGHT):
            work.put(None)

    def _serve(self, work: "queue.SimpleQueue[Any]") -> None:
        while (task := work.get()) is not None:
            function, asked = task
            thread = threading.current_thread()
            idle, thread.name = thread.name, BUSY_THREAD
            answer: Answer
            try:
                answer = asked, function(asked), None
            except BaseException as error:
                answer = asked, None, error
            thread.name = idle
            self._answers.put(answer)
