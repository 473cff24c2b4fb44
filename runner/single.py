"""The plan in this process, without Ray: the reference answer and the debugger's path."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from runner.progress import Progress
from runner.records import (
    BatchResult,
    CompileInfo,
    Faults,
    ModelSpec,
    TokenTable,
    WorkerInfo,
    WorkerStats,
)
from runner.workers import Replica
from sharding.batches import Batch, BatchShape, Plan
from sharding.topology import WorkerSlot


class InProcess:
    """One replica on the first device JAX finds, on all cores where that is the CPU."""

    def __init__(self, *, verbose: bool, progress: Progress) -> None:
        self._replica = Replica(WorkerSlot(0, "auto"), verbose=verbose)
        self._progress = progress
        self.stats = [WorkerStats(replica=0)]
        self.faults = Faults()
        self.start_workers_s = 0.0
        self.predict_s = 0.0
        self.info: WorkerInfo | None = None

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, spec: ModelSpec) -> None:
        """Load the model; returns when it is there."""
        self._progress.set_worker(0, "loading")
        self._spec = spec
        self.info = self._replica.load(spec)
        self.kind = self.info.kind
        self.stats[0].introduce(self.info)
        for note in self.info.notes:
            self._progress.note(note)

    def poll(self) -> None:
        """Nothing happens beside this thread."""

    def run(
        self, plan: Plan, tokens: TokenTable, *, costs: Sequence[float], ids: Sequence[str]
    ) -> Iterator[BatchResult]:
        """Yield the result of every batch, in the order of the plan."""
        self._replica.hold_tokens(tokens)
        # One thread compiles in the order of use, ahead of the batches.
        with ThreadPoolExecutor(1, "compile") as compiler:
            compiling = {
                shape: compiler.submit(self._replica.compile, shape) for shape in plan.shapes
            }
            try:
                yield from self._predict(plan, compiling)
            finally:
                compiler.shutdown(cancel_futures=True)

    def _predict(
        self, plan: Plan, compiling: dict[BatchShape, Future[CompileInfo]]
    ) -> Iterator[BatchResult]:
        stats, started = self.stats[0], 0.0
        warm: set[BatchShape] = set()
        for batch in plan.batches:
            if batch.shape not in warm:
                self._progress.set_worker(0, f"compiling {len(warm) + 1}/{len(plan.shapes)}")
                stats.count_compiled(compiling[batch.shape].result())
                warm.add(batch.shape)
                self._progress.set_worker(0, "busy")
            started = started or time.monotonic()
            result = self._replica.predict(batch)
            stats.count(len(result.rows), result.work[0])
            self.predict_s = time.monotonic() - started
            stats.idle_s = self.predict_s - stats.busy_s
            yield result

    def predict_in_float(self, batch: Batch) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`."""
        return self._replica.predict_in_float(self._spec, batch)
