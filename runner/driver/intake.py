"""Answers as they arrive -> the journal, the table, and counts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runner.common.errors import WorkerError
from runner.common.records import BatchResult, Tally
from runner.results.ledger import Ledger
from runner.results.table import PREDICTED, SHORTENED
from runner.telemetry.progress import Progress
from sharding.batches import Batch

# If the first rows are NaN and this many, the model is broken.
MOST_BROKEN_ROWS = 64


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of a pass' rows, in tokens.

    of_rows: int64 (rows,), at full length. padded_to: the length that every row is padded to if the
    pooling sees padding; else None.
    """

    of_rows: np.ndarray
    padded_to: int | None

    def computed(self, batch: Batch) -> np.ndarray:
        """Return how many tokens of each row a batch computes: int64 (len(batch.rows),)."""
        lengths: np.ndarray = np.minimum(self.of_rows[list(batch.rows)], batch.shape.length)
        return lengths

    def is_cut(self, batch: Batch) -> np.ndarray:
        """Return which rows of a batch are truncated below their full length: bool (rows,)."""
        if self.padded_to is not None:
            return np.full(len(batch.rows), batch.shape.length < self.padded_to)
        is_longer: np.ndarray = self.of_rows[list(batch.rows)] > batch.shape.length
        return is_longer

    def count_longer(self, rows: Sequence[int], cap: int) -> int:
        """Return how many rows are truncated by a limit of `cap` tokens."""
        if self.padded_to is not None:
            return len(rows) if cap < self.padded_to else 0
        return int((self.of_rows[list(rows)] > cap).sum())


@dataclass(slots=True)
class Intake:
    """Keeps the answers of one pass.

    uncounted: the rows of the pass that have no answer yet. tally: counts of the answers so far.
    """

    ledger: Ledger
    progress: Progress
    lengths: Lengths
    uncounted: set[int]
    tally: Tally = field(default_factory=Tally)

    def take(self, result: BatchResult) -> None:
        """Keep the answers of a batch, on disk and in the table.

        Raises:
            WorkerError: all answers so far are NaN or infinity.
            JournalError: the answers cannot be saved.
        """
        batch, tally = result.batch, self.tally
        finite = result.finite
        cut, lengths = self.lengths.is_cut(batch), self.lengths.computed(batch)
        for how, chosen in ((PREDICTED, finite & ~cut), (SHORTENED, finite & cut)):
            rows = result.rows_where(chosen)
            if not rows:
                continue
            began = time.perf_counter()
            self.ledger.add(
                rows,
                result.probabilities[chosen],
                how=how,
                lengths=lengths[chosen],
                worker=str(result.replica),
            )
            tally.journal_s += time.perf_counter() - began
        tally.broken += result.rows_where(~finite)
        tally.answered += int(finite.sum())
        if not tally.answered and len(tally.broken) >= MOST_BROKEN_ROWS:
            raise WorkerError(
                f"The first {len(tally.broken)} rows came out as NaN or infinity. If the dtype is "
                "float16, try --dtype bfloat16 or float32; else look at the weights and the head."
            )
        tally.lengths.append(lengths)
        tally.real_tokens += int(lengths.sum())
        tally.padded_tokens += batch.shape.tokens
        new = self.uncounted.intersection(batch.rows)
        self.uncounted -= new
        self.progress.advance(rows=len(new), tokens=int(lengths.sum()))
