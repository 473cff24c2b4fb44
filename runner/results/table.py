"""Answers in any order -> one complete, checked table in the order of the test set.

Does not know the journal, or where the answers come from.
"""

from collections.abc import Sequence

import numpy as np

from runner.common.errors import MergeError, list_ids

# How a row was made. PREDICTED: as configured. SHORTENED: truncated, or with `padded-mean` padded,
# to fewer tokens than configured. WIDER: in float32, since the run's dtype gave NaN or infinity.
# SWAPPED: averaged with a prediction for swapped responses. FILLED: with the fallback.
PREDICTED, SHORTENED, WIDER = "predicted", "shortened", "wider"
SWAPPED, FILLED = "swapped", "filled"

# Float32 softmax sums to one within a few units in the last place.
SUM_TOLERANCE = 1e-4
# The value for rows without an answer if no row has one; 1 / classes for other heads.
KNOWING_NOTHING = {"sigmoid": 0.5, "regression": 0.0, "none": 0.0}


class Merger:
    """Collects a head's numbers by row, and rejects whatever would make the submission wrong.

    The numbers are called probabilities, as they are in the contest.

    Args:
        classes: numbers per row. head: one of `task.HEADS`, which decides what is valid.

    Attributes:
        how: of each row, how it was made; empty if it has no answer yet.
        lengths: int64 (rows,), tokens of each row.
    """

    def __init__(self, ids: Sequence[str], classes: int, head: str = "softmax") -> None:
        self.ids = ids
        self._head = head
        self._probabilities = np.zeros((len(ids), classes), dtype=table_dtype(head))
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
        """Add the probabilities of rows, (len(rows), classes).

        Args:
            how: how they were made. lengths: tokens of each row.
            again: whether rows may replace earlier ones.

        Raises:
            MergeError: a row is outside the test set or repeated, or the shape is wrong.
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
        """Return the rows that have no answer, or one of fewer tokens than configured."""
        return [row for row, how in enumerate(self.how) if how in ("", SHORTENED, FILLED)]

    def probabilities(self, rows: Sequence[int]) -> np.ndarray:
        """Return the probabilities of rows so far, (len(rows), classes); 0 without an answer."""
        return self._probabilities[list(rows)]

    def mean(self) -> np.ndarray:
        """Return the mean of all predictions, float64 (classes,); a constant if there are none."""
        done = [row for row, how in enumerate(self.how) if how not in ("", FILLED)]
        if done:
            mean: np.ndarray = self._probabilities[done].mean(axis=0, dtype=np.float64)
            return mean
        classes = self._probabilities.shape[1]
        return np.full(classes, KNOWING_NOTHING.get(self._head, 1 / classes))

    def finish(self) -> np.ndarray:
        """Return the complete table, (rows, classes).

        For a softmax it is float64 with rows normalized to sum to one; else float32 as predicted.

        Raises:
            MergeError: rows are missing, not finite or not valid for the head; names them.
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
        wrong = np.flatnonzero(unsound(table, self._head))
        if wrong.size:
            raise MergeError(
                f"This is a bug: {wrong.size} rows are not probabilities: {self._name(wrong)}"
            )
        return table / table.sum(axis=1)[:, None] if self._head == "softmax" else table

    def _name(self, rows: Sequence[int] | np.ndarray) -> str:
        return list_ids(self.ids, [int(row) for row in rows])


def table_dtype(head: str) -> type[np.floating]:
    """Return the dtype of a head's table: float64 if rows must sum to one, else float32."""
    return np.float64 if head == "softmax" else np.float32


def unsound(table: np.ndarray, head: str) -> np.ndarray:
    """Return which rows are invalid for a head, bool (rows,).

    Valid rows are finite, for a sigmoid from 0 to 1, for a softmax probabilities that sum to one.
    """
    sound = np.isfinite(table).all(axis=1)
    if head in ("softmax", "sigmoid"):
        sound &= (table >= 0).all(axis=1) & (table <= 1 + SUM_TOLERANCE).all(axis=1)
    if head == "softmax":
        with np.errstate(invalid="ignore"):
            sums = table.sum(axis=1, dtype=np.float64)
            sound &= np.abs(sums - 1) <= SUM_TOLERANCE
    wrong: np.ndarray = ~sound
    return wrong
