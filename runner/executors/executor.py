"""The interface of an executor, which computes a plan: in one process, or on replicas run by Ray.

An executor is entered, opened, started, polled until there are tokens, run for each pass over the
rows, and left. Does not know how a batch is computed, nor what becomes of its answer.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Protocol, Self

import numpy as np

from runner.common.records import BatchResult, Computed, ModelSpec, TokenTable
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape
from sharding.forecast import Pace
from sharding.rates import Rates
from sharding.strategies import Strategy


class Executor(Protocol):
    """All replicas of a run. A context manager: leaving it ends all processes that it started.

    Attributes:
        kind: of its devices, a name in `sharding.kinds`; known once it is open, as is `replicas`.
        replicas: how many there are.
        computed: what it has done so far.
    """

    kind: str
    replicas: int
    computed: Computed

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None: ...

    def open(self, dtype: str) -> str:
        """Find the devices; return what `dtype` means on them, `auto` if only a worker can tell.

        Raises:
            ConfigError: more workers than devices, or groups that do not fit.
            WorkerError: the devices cannot be used.
        """

    def memory_bytes(self) -> int | None:
        """Return the memory of the smallest GPU among its devices, None if unknown."""

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        """Begin to load the model, and return before it is loaded.

        Args:
            strategy: how the members of a group share a replica, None if each worker has one.
        """

    def poll(self) -> None:
        """Take the answers of workers so far, which finds bad files early.

        Raises:
            DataError: the model files do not fit each other.
            WorkerError: no replica is left, or one cannot load.
        """

    def run(
        self, backlog: Backlog, tokens: TokenTable, *, rates: Rates, ids: Sequence[str]
    ) -> Generator[BatchResult | None, None, None]:
        """Yield the first answer to each batch as it arrives, and None several times a second in
        between.

        Args:
            rates: learns how long batches take.
            ids: one a row, to name rows in errors.

        Raises:
            DataError, WorkerError: as `poll`.
        """

    def warm(self) -> set[BatchShape]:
        """Return the shapes for which some replica has a program."""

    def paces(self, shapes: Iterable[BatchShape] | None = None) -> list[Pace]:
        """Return how fast each replica is, and how long it still has to load and compile.

        Args:
            shapes: those to come, None for those of the backlog.
        """

    def is_measured(self) -> bool:
        """Return whether enough batches have finished to decide by their times."""

    def compile_s(self) -> float:
        """Return the seconds that a shape takes to compile if it is new."""

    def predict_in_float(self, batch: Batch, *, within_s: float) -> np.ndarray:
        """Return a batch's probabilities in float32, after `run`.

        Raises:
            WorkerError: it failed, or took longer than `within_s`.
        """
