"""Answers -> the journal first, then the table, so that every row in the table is on the disk.

Does not know how rows are predicted, nor the format of the submission.
"""

from collections.abc import Sequence

import numpy as np

from runner.results.journal import Journal
from runner.results.table import FILLED, Merger


class Ledger:
    """The finished rows of a run whose journal is open.

    Attributes:
        table: the same rows in memory.
    """

    def __init__(self, table: Merger, journal: Journal) -> None:
        self.table = table
        self._journal = journal

    def take_up(self) -> int:
        """Load the rows of an earlier run into the table; return how many need no more work."""
        done = self._journal.done()
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
        """Save rows with their values, (len(rows), classes); replaces those that are there.

        Args:
            how: how they were made, a word of `table.py`. lengths: tokens of each row.

        Raises:
            JournalError: they cannot be saved.
        """
        counts = [int(length) for length in lengths]
        self._journal.add(rows, values, how=how, worker=worker, lengths=counts)
        self.table.add(rows, values, how=how, lengths=counts, again=True)
