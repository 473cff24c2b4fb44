"""Answers in any order -> one table in the order of the test set, complete and checked."""

from collections.abc import Sequence

import numpy as np

from runner.errors import MergeError, list_ids

# How a row was made: whole; cut to fewer tokens than it has, or padded to fewer than the model was
# trained with; in float32 where the run's dtype came to no number; averaged with a prediction of
# its responses swapped; or not at all, with the fallback in its place.
PREDICTED, SHORTENED, WIDER, SWAPPED, FILLED = (
    "predicted",
    "shortened",
    "wider",
    "swapped",
    "filled",
)

# Float32 softmax sums to one within a few units in the last place.
SUM_TOLERANCE = 1e-4


class Merger:
    """Collects probabilities by row; says no to what would make a wrong submission.

    Attributes:
        how: a word for each row on how it was made; empty where it has no answer yet.
        lengths: int64 (rows,), the tokens that each was made from.
    """

    def __init__(self, ids: Sequence[str], classes: int) -> None:
        self.ids = ids
        self._probabilities = np.zeros((len(ids), classes))
        self.how: list[str] = [""] * len(ids)
        self.lengths = np.zeros(len(ids), dtype=np.int64)

    def add(
        self,
        rows: Sequence[int],
        probabilities: np.ndarray,
        *,
        how: str,
        lengths: Sequence[int] | np.ndarray,
        again: bool = False,
    ) -> None:
        """Take the probabilities of rows, (len(rows), classes).

        Args:
            again: whether they replace those that are there, as better ones do.

        Raises:
            MergeError: rows outside the test set or given before, or another shape.
        """
        place = np.asarray(rows, dtype=np.int64)
        expected = (place.size, self._probabilities.shape[1])
        if probabilities.shape != expected:
            raise MergeError(
                f"This is a bug: rows must have probabilities of shape {expected}. "
                f"Received: {probabilities.shape}"
            )
        if place.size and (place.min() < 0 or place.max() >= len(self.ids)):
            raise MergeError("This is a bug: an answer names rows that are not there.")
        repeated = [row for row in rows if self.how[row]] if not again else []
        if repeated or np.unique(place).size != place.size:
            raise MergeError(
                f"This is a bug: an answer repeats rows. Received: {self._name(repeated)}"
            )
        self._probabilities[place] = probabilities
        self.lengths[place] = lengths
        for row in rows:
            self.how[row] = how

    def missing(self) -> list[int]:
        """Return the rows that have no answer."""
        return [row for row, how in enumerate(self.how) if not how]

    def unfinished(self) -> list[int]:
        """Return the rows that have no answer, or less than one of full length."""
        return [row for row, how in enumerate(self.how) if how in ("", SHORTENED, FILLED)]

    def probabilities(self, rows: Sequence[int]) -> np.ndarray:
        """Return what rows have so far, float64 (len(rows), classes)."""
        return self._probabilities[list(rows)]

    def mean(self) -> np.ndarray:
        """Return the mean of what was predicted, float64 (classes,), even where nothing was."""
        done = [row for row, how in enumerate(self.how) if how not in ("", FILLED)]
        classes = self._probabilities.shape[1]
        return self._probabilities[done].mean(axis=0) if done else np.full(classes, 1 / classes)

    def finish(self) -> np.ndarray:
        """Return float64 (rows, classes) that sum to one exactly, or as near as float64 can.

        Raises:
            MergeError: rows are missing, not finite, negative or do not sum to one; names them.
        """
        if missing := self.missing():
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
        return list_ids(self.ids, [int(row) for row in rows])
