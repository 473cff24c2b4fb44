"""Batches in the order of work, stored as runs of one shape.

A large test set has hundreds of thousands of batches but few shapes, so questions about all batches
are answered from the runs. Does not know replicas.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from sharding.batches import Batch, BatchShape


class BatchQueue:
    """A double-ended queue that quickly finds the first batch of a shape."""

    def __init__(self, batches: Iterable[Batch] = ()) -> None:
        # No run is empty, and each has one shape.
        self._runs: deque[deque[Batch]] = deque()
        self.extend(batches)

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for run in self._runs for batch in run)

    @property
    def first(self) -> Batch:
        return self._runs[0][0]

    @property
    def last(self) -> Batch:
        return self._runs[-1][-1]

    def append(self, batch: Batch) -> None:
        if not self._runs or self._runs[-1][0].shape != batch.shape:
            self._runs.append(deque())
        self._runs[-1].append(batch)

    def appendleft(self, batch: Batch) -> None:
        if not self._runs or self._runs[0][0].shape != batch.shape:
            self._runs.appendleft(deque())
        self._runs[0].appendleft(batch)

    def extend(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.append(batch)

    def popleft(self) -> Batch:
        batch = self._runs[0].popleft()
        if not self._runs[0]:
            self._runs.popleft()
        return batch

    def pop(self) -> Batch:
        batch = self._runs[-1].pop()
        if not self._runs[-1]:
            self._runs.pop()
        return batch

    def shapes(self) -> Iterator[BatchShape]:
        """Yield the shape of each run, in the order of work; shapes may repeat."""
        return (run[0].shape for run in self._runs)

    def cost(self, cost: Callable[[BatchShape], float]) -> float:
        """Return the cost of all batches, from the cost of a shape."""
        return sum(len(run) * cost(run[0].shape) for run in self._runs)

    def after(self, is_first: Callable[[BatchShape], bool]) -> Iterator[Batch]:
        """Yield the batches from the first whose shape satisfies `is_first`."""
        runs = iter(self._runs)
        for run in runs:
            if is_first(run[0].shape):
                yield from run
                break
        for run in runs:
            yield from run

    def take(self, is_first: Callable[[BatchShape], bool], count: int) -> list[Batch]:
        """Remove and return `count` batches, from the first whose shape satisfies `is_first`."""
        before: list[deque[Batch]] = []
        taken: list[Batch] = []
        while self._runs and not is_first(self._runs[0][0].shape):
            before.append(self._runs.popleft())
        while self._runs and len(taken) < count:
            taken.append(self.popleft())
        for run in reversed(before):
            self._put_before(run)
        return taken

    def _put_before(self, run: deque[Batch]) -> None:
        if self._runs and self._runs[0][0].shape == run[0].shape:
            self._runs[0].extendleft(reversed(run))
        else:
            self._runs.appendleft(run)
