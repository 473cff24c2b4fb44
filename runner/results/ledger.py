"""Answers -> the journal and then the table: a row that is in the table is on the disk.

Does not know how rows are predicted, nor what is written of them.
"""

from collections.abc import Sequence

import numpy as np

from runner.results.journal import Journal
from runner.results.table import FILLED, Merger


class Ledger:
    """The rows that are done, of a run whose journal is open.

    Attributes:
        table: the same rows in memory.
    """

    def __init__(self, table: Merger, journal: Journal) -> None:
        self.table = table
        self._journal = journal

    def take_up(self) -> int:
        """Take over the rows that an earlier run has done; return how many need no more work."""
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
        """Keep rows with their values, (len(rows), classes), in place of those that are there.

        Args:
            how: a word of `table.py` on how they were made. lengths: the tokens of each.

        Raises:
            JournalError: they cannot be kept.
        """
        counts = [int(length) for length in lengths]
        self._journal.add(rows, values, how=how, worker=worker, lengths=counts)
        self.table.add(rows, values, how=how, lengths=counts, again=True)
