"""Answers in any order -> one table in the order of the test set, complete and checked."""

from collections.abc import Sequence

import numpy as np

from runner.common.errors import MergeError, list_ids

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
# What a row gets that has no answer where no other has one either.
KNOWING_NOTHING = {"sigmoid": 0.5, "regression": 0.0, "none": 0.0}


class Merger:
    """Collects a head's numbers by row; says no to what would make a wrong submission.

    They are called probabilities, which those of the contest are.

    Args:
        classes: numbers a row. head: of `task.HEADS`, what they must be.

    Attributes:
        how: a word for each row on how it was made; empty where it has no answer yet.
        lengths: int64 (rows,), the tokens that each was made from.
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
        """Return what rows have so far, (len(rows), classes)."""
        return self._probabilities[list(rows)]

    def mean(self) -> np.ndarray:
        """Return the mean of what was predicted, float64 (classes,), even where nothing was."""
        done = [row for row, how in enumerate(self.how) if how not in ("", FILLED)]
        if done:
            mean: np.ndarray = self._probabilities[done].mean(axis=0, dtype=np.float64)
            return mean
        classes = self._probabilities.shape[1]
        return np.full(classes, KNOWING_NOTHING.get(self._head, 1 / classes))

    def finish(self) -> np.ndarray:
        """Return the table, (rows, classes): of a softmax float64 rows that sum to one exactly, or
        as near as float64 can; else float32, as the model said.

        Raises:
            MergeError: rows are missing, not finite, or not what the head's numbers must be; names
                them.
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
                f"This is a bug: {wrong.size} rows are no probabilities: {self._name(wrong)}"
            )
        return table / table.sum(axis=1)[:, None] if self._head == "softmax" else table

    def _name(self, rows: Sequence[int] | np.ndarray) -> str:
        return list_ids(self.ids, [int(row) for row in rows])


def table_dtype(head: str) -> type[np.floating]:
    """Return the dtype in which a table of a head's numbers is kept and written: float64 where
    rows are to sum to one, else that in which the model says them."""
    return np.float64 if head == "softmax" else np.float32


def unsound(table: np.ndarray, head: str) -> np.ndarray:
    """Say of each row, bool (rows,), whether it is not what a head's numbers must be: finite, of a
    sigmoid from 0 to 1, of a softmax probabilities that sum to one."""
    sound = np.isfinite(table).all(axis=1)
    if head in ("softmax", "sigmoid"):
        sound &= (table >= 0).all(axis=1) & (table <= 1 + SUM_TOLERANCE).all(axis=1)
    if head == "softmax":
        with np.errstate(invalid="ignore"):
            sums = table.sum(axis=1, dtype=np.float64)
            sound &= np.abs(sums - 1) <= SUM_TOLERANCE
    wrong: np.ndarray = ~sound
    return wrong
