"""Answers -> the journal first, then the table, so that every row in the table is on the disk.

Does not know how rows are predicted, or the format of the submission.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.results.journal import Journal
from runner.results.table import FILLED, Merger


@dataclass(frozen=True, slots=True)
class Ledger:
    """The finished rows of a run: in memory, and in its open journal."""

    table: Merger
    journal: Journal

    def take_up(self) -> int:
        """Load the journal's rows into the table; return how many rows need no more work."""
        done = self.journal.done()
        ways = np.array(done.how, dtype=object)
        for how in sorted(set(done.how) - {FILLED}):
            these = ways == how
            self.table.add(
                done.rows[these].tolist(),
                done.probabilities[these],
                how=how,
                lengths=done.lengths[these],
            )
        return len(self.table.ids) - len(self.table.unfinished())

    def add(
        self,
        rows: Sequence[int],
        values: np.ndarray,
        *,
        how: str,
        lengths: Sequence[int] | np.ndarray,
        worker: str = "",
    ) -> None:
        """Save rows with their values, (len(rows), classes), replacing any earlier ones.

        Args:
            how: how they were made, a word of `table.py`. lengths: tokens of each row.

        Raises:
            JournalError: they cannot be saved.
        """
        counts = [int(length) for length in lengths]
        self.journal.add(rows, values, how=how, worker=worker, lengths=counts)
        self.table.add(rows, values, how=how, lengths=counts, again=True)
