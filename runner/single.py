"""The plan in this process, without Ray: the reference answer and the debugger's path."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from runner.progress import Progress
from runner.records import BatchResult, Faults, ModelSpec, TokenTable, WorkerInfo, WorkerStats
from runner.workers import Replica
from sharding.batches import Batch, Plan
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
        stats = self.stats[0]
        self._replica.hold_tokens(tokens)
        for number, shape in enumerate(plan.shapes, start=1):
            self._progress.set_worker(0, f"compiling {number}/{len(plan.shapes)}")
            stats.count_compiled(self._replica.compile(shape))
        self._progress.set_worker(0, "busy")
        started = time.monotonic()
        for batch in plan.batches:
            result = self._replica.predict(batch)
            stats.count(len(result.rows), result.work[0])
            self.predict_s = time.monotonic() - started
            stats.idle_s = self.predict_s - stats.busy_s
            yield result

    def predict_in_float(self, batch: Batch) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`."""
        return self._replica.predict_in_float(self._spec, batch)
