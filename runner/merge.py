"""Results in any order -> one table in the order of the test set, complete and checked."""

from collections.abc import Sequence

import numpy as np

from runner.errors import MergeError, list_ids
from runner.records import BatchResult

# Float32 softmax sums to one within a few units in the last place.
SUM_TOLERANCE = 1e-4


class Merger:
    """Collects probabilities by row; says no to what would make a wrong submission."""

    def __init__(self, ids: Sequence[str], classes: int) -> None:
        self._ids = ids
        self._probabilities = np.zeros((len(ids), classes))
        self._filled = np.zeros(len(ids), dtype=bool)

    def add(self, result: BatchResult) -> None:
        """Take a batch's probabilities, whichever batch it is.

        Raises:
            MergeError: rows outside the test set or given before, or another shape.
        """
        rows = np.asarray(result.rows, dtype=np.int64)
        expected = (rows.size, self._probabilities.shape[1])
        if result.probabilities.shape != expected:
            raise MergeError(
                f"This is a bug: batch {result.batch} must have probabilities of shape {expected}. "
                f"Received: {result.probabilities.shape}"
            )
        if rows.size and (rows.min() < 0 or rows.max() >= len(self._ids)):
            raise MergeError(f"This is a bug: batch {result.batch} names rows that are not there.")
        again = rows[self._filled[rows]]
        if again.size or np.unique(rows).size != rows.size:
            raise MergeError(
                f"This is a bug: batch {result.batch} repeats rows. Received: {self._name(again)}"
            )
        self._probabilities[rows] = result.probabilities
        self._filled[rows] = True

    def finish(self) -> np.ndarray:
        """Return float64 (rows, classes) that sum to one exactly, or as near as float64 can.

        Raises:
            MergeError: rows are missing, not finite, negative or do not sum to one; names them.
        """
        if missing := np.flatnonzero(~self._filled).tolist():
            raise MergeError(f"{len(missing)} rows have no result: {self._name(missing)}")
        table = self._probabilities
        broken = np.flatnonzero(~np.isfinite(table).all(axis=1)).tolist()
        if broken:
            raise MergeError(
                f"{len(broken)} rows came out as NaN or infinity: {self._name(broken)}. "
                "If the dtype is float16, try --dtype bfloat16 or float32."
            )
        sums = table.sum(axis=1)
        wrong = np.flatnonzero((np.abs(sums - 1) > SUM_TOLERANCE) | (table < 0).any(axis=1))
        if wrong.size:
            raise MergeError(
                f"This is a bug: {wrong.size} rows are no probabilities: {self._name(wrong)}"
            )
        return table / sums[:, None]

    def _name(self, rows: Sequence[int] | np.ndarray) -> str:
        return list_ids(self._ids, [int(row) for row in rows])
