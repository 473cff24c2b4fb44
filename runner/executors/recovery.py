"""A batch or a replica that failed -> what becomes of its rows, told to the user and counted.

Both executors use it. Does not know Ray or JAX.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from runner.common.errors import ArenaRunnerError, WorkerError, list_ids
from runner.common.records import Faults
from sharding.backlog import Backlog
from sharding.batches import Batch

# Failures in a run that may be blamed on a batch. If there are more, rows are not the cause.
MOST_EXPLAINED = 40
# Batches that may fail before any has been answered.
MOST_BEFORE_THE_FIRST = 3


@dataclass(slots=True)
class Recovery:
    """What a run does about failures.

    ids: one a row, to name rows. note: shows a sentence to the user. mark: (what, replica) records
    a sentence without ids.
    """

    backlog: Backlog
    faults: Faults
    ids: Sequence[str]
    note: Callable[[str], None]
    mark: Callable[[str, int], None] = lambda what, replica: None
    _explained: int = 0
    _answered: bool = False

    def answered(self) -> None:
        """A batch was answered, so model and device work."""
        self._answered = True

    def lost(self, replica: int, batches: Sequence[Batch], reason: str) -> bool:
        """A replica ended while these batches were under way. Return whether they explain it: a
        single batch does that was computed alone, since it had been under way at a failure before.

        Args:
            reason: in words that follow the name of a row.
        """
        suspect = batches[0] if len(batches) == 1 else None
        explains = suspect is not None and self.backlog.is_suspect(suspect) and self._answered
        self.faults.retried_batches += len(batches)
        for batch in batches:
            self._setback(batch, replica, reason)
        self.backlog.release(replica)
        self._explained += explains
        return explains and self._explained <= MOST_EXPLAINED

    def failed(self, replica: int, batch: Batch, error: BaseException, said: str) -> None:
        """A batch ended in an error, and its replica works on.

        Raises:
            WorkerError: so many failed that rows are not the cause.
        """
        self.faults.retried_batches += 1
        self._explained += 1
        most = MOST_EXPLAINED if self._answered else MOST_BEFORE_THE_FIRST
        if self._explained >= most:
            raise WorkerError(
                f"{self._explained} batches failed, the last one {self.name(batch)}: {said}"
            ) from error
        self.mark(f"a batch of {_size(batch)} failed and is tried again", replica)
        self.note(f"warning: {self.name(batch)} failed on worker {replica} ({said}); tried again")
        self._setback(batch, replica, f"it ended in an error ({said})")

    def too_large(self, replica: int, alike: Iterable[int], batch: Batch) -> None:
        """A batch does not fit the memory of a replica's device, nor of devices that are alike."""
        self.faults.memory_splits += 1
        self.faults.retried_batches += 1
        budget = self.backlog.too_large(
            batch, alike, replica, "one row alone does not fit the device's memory"
        )
        self.mark(f"a batch of {_size(batch)} does not fit the device's memory", replica)
        if budget:
            self.note(
                f"warning: {batch.shape.rows} rows of {batch.shape.length} tokens do not fit the "
                f"device of worker {replica}; {budget:,} tokens a batch from now on"
            )
        elif budget is not None:
            self._quarantined(batch, replica, "it does not fit the device's memory")

    def explain(self, replica: str, batch: Batch, error: ArenaRunnerError) -> ArenaRunnerError:
        """Return an error that ends the run, with the names of replica, batch and rows.

        Args:
            replica: in words that begin a sentence.
        """
        return type(error)(f"{replica} failed at {self.name(batch)}: {error}")

    def name(self, batch: Batch) -> str:
        rows = list_ids(self.ids, batch.rows)
        return f"batch {batch.index} ({len(batch.rows)} rows: {rows})"

    def _setback(self, batch: Batch, replica: int, reason: str) -> None:
        outcome = self.backlog.setback(batch, replica, reason)
        if outcome == "given up":
            self._quarantined(batch, replica, reason)
        elif outcome == "halved":
            self.mark(f"a batch of {_size(batch)} is halved to find the row", replica)
            self.note(f"warning: {self.name(batch)} failed again; halved to find the row")

    def _quarantined(self, batch: Batch, replica: int, reason: str) -> None:
        self.faults.quarantined_rows += len(batch.rows)
        self.mark("a row that nothing could compute is left out", replica)
        named = list_ids(self.ids, batch.rows)
        self.note(f"warning: the row of {named} is left out: {reason}; it gets the fallback")


def _size(batch: Batch) -> str:
    return f"{len(batch.rows)} x {batch.shape.length} tokens"
