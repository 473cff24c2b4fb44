"""A run whose replicas compute nothing -> the driver's time per batch.

An ordinary run through Ray, with journal, table, timeline and progress. Workers answer at once, so
all time is the driver's. Does not know the simulation.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from runner import RunConfig, run
from runner.common.records import BatchResult, CompileInfo, ModelSpec, TokenTable, Work, WorkerInfo
from runner.demo import make_rows, write_test_set
from sharding.batches import Batch, BatchShape
from sharding.topology import WorkerSlot

# Numbers of workers for which to time a look at pending calls, two per worker.
PENDING = (128, 1024)
LOOKS = 30


class Idle:
    """A `runner.model.worker.Replica` without a model, which answers at once."""

    def __init__(self, slot: WorkerSlot, *, verbose: bool, log_folder: str | None = None) -> None:
        self._number = slot.replica

    def ping(self) -> str:
        return "127.0.0.1"

    def load(self, spec: ModelSpec) -> WorkerInfo:
        return WorkerInfo("cpu", "nothing", "float32", 0, 0, 0.0, 1e12, "nothing")

    def hold_tokens(self, tokens: TokenTable) -> None:
        pass

    def compile(self, shape: BatchShape) -> CompileInfo:
        return CompileInfo(0.0, cached=True)

    def predict(self, batch: Batch) -> BatchResult:
        answers = np.full((len(batch.rows), 3), 1 / 3, np.float32)
        return BatchResult(batch, self._number, answers, (Work(1e-6, 0),))


def measure(batches: int, num_workers: int = 2) -> dict[str, Any]:
    """Run batches of one row on idle workers.

    Returns: wall-clock and CPU seconds of the driver per batch, batches per second, and the seconds
    of one look at pending calls by number of workers.
    """
    from runner.executors.ray import actors, replicas

    times: list[tuple[float, float]] = []
    plain_run, plain_actors = replicas.RayReplicas._run, dict(actors.ACTORS)
    looks: dict[int, float] = {}

    def timed(self: Any, backlog: Any) -> Iterator[BatchResult | None]:
        for result in plain_run(self, backlog):
            if result is not None:
                times.append((time.perf_counter(), time.process_time()))
            yield result
        looks.update(look_s())

    actors.ACTORS[None] = Idle
    replicas.RayReplicas._run = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            test_set = Path(folder, "test.csv")
            write_test_set(test_set, make_rows(batches, seed=7))
            run(
                RunConfig(
                    mode="data-parallel",
                    num_workers=num_workers,
                    input=test_set,
                    output=Path(folder, "submission.csv"),
                    pooling="mean",
                    max_tokens_per_batch=1,
                )
            )
    finally:
        replicas.RayReplicas._run = plain_run  # type: ignore[method-assign]
        actors.ACTORS.update(plain_actors)
    # During the first batches, shapes are still compiled.
    steady = times[len(times) // 4 :]
    (began, cpu_began), (ended, cpu_ended) = steady[0], steady[-1]
    count = len(steady) - 1
    return {
        "batches": len(times),
        "batch_s": (ended - began) / count,
        "batch_cpu_s": (cpu_ended - cpu_began) / count,
        "batches_per_s": count / (ended - began),
        "look_s": looks,
    }


def look_s() -> dict[int, float]:
    """Return, by number of workers, the seconds that Ray takes to say that none of their calls has
    ended."""
    import ray

    @ray.remote(num_cpus=0)
    class Sleeper:
        def sleep(self) -> None:
            time.sleep(60)

    sleeper = Sleeper.remote()
    calls = [sleeper.sleep.remote() for _ in range(2 * max(PENDING))]
    found = {}
    for workers in PENDING:
        took = []
        for _ in range(LOOKS):
            began = time.perf_counter()
            owners = dict.fromkeys(calls[: 2 * workers])
            ray.wait(list(owners), num_returns=1, timeout=0)
            took.append(time.perf_counter() - began)
        found[workers] = median(took)
    ray.kill(sleeper)
    return found
