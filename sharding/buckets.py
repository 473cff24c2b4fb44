"""Token lengths -> the few padded lengths that batches are compiled for.

Does not know what a batch is, nor which rows share one.
"""

from collections.abc import Callable

import numpy as np

# So many shapes are taken whatever they cost to compile: a test set has rows enough for them.
FREE_BUCKETS = 8
# More shapes than this save next to nothing: the optimum of 16 leaves 3.3 % of padding at 1,024.
MOST_BUCKETS = 16


def choose_buckets(
    lengths: np.ndarray,
    *,
    sequence_length: int,
    cost: Callable[[int], float] = float,
    cost_of_shape: float = float("inf"),
    max_buckets: int = MOST_BUCKETS,
    multiple_of: int = 16,
) -> tuple[int, ...]:
    """Return the padded lengths, ascending, that cost the least.

    Every length has a bucket at least as long. Candidates are the multiples of `multiple_of`
    (vector units like even shapes) and `sequence_length` itself. For each number of buckets the
    choice with the smallest sum of costs is found by dynamic programming over the length
    histogram, in O(max_buckets * candidates^2). Up to `FREE_BUCKETS` are taken as they are, more
    only if they save more than the compiles of their shapes cost.

    Args:
        lengths: (rows,) token counts, each at most `sequence_length`.
        sequence_length: the longest padded length there may be.
        cost: of a row padded to a length; padded tokens if none is given.
        cost_of_shape: what a shape beyond `FREE_BUCKETS` costs, in the same unit.
        max_buckets: the most there may be.

    Raises:
        ValueError: a length exceeds `sequence_length`, or a limit is not positive.
    """
    if max_buckets < 1 or multiple_of < 1 or sequence_length < 1:
        raise ValueError(
            "max_buckets, multiple_of and sequence_length must be positive. Received: "
            f"max_buckets={max_buckets}, multiple_of={multiple_of}, "
            f"sequence_length={sequence_length}"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        return ()
    if lengths.max() > sequence_length:
        raise ValueError(
            f"No row may be longer than sequence_length={sequence_length}. "
            f"Received: longest={lengths.max()}"
        )
    # The shortest candidate for each row; only candidates that some row needs can be optimal.
    needed = np.minimum(-(-lengths // multiple_of) * multiple_of, sequence_length)
    candidates, counts = np.unique(np.maximum(needed, min(multiple_of, sequence_length)),
                                   return_counts=True)  # fmt: skip
    costs = np.array([cost(int(length)) for length in candidates], dtype=float)
    choices = _best_subsets(costs, counts, max_buckets)
    best, chosen = choices[:FREE_BUCKETS][-1]
    for number, (total, more) in enumerate(choices[FREE_BUCKETS:], start=1):
        if total + number * cost_of_shape < best:
            best, chosen = total + number * cost_of_shape, more
    return tuple(int(candidates[i]) for i in chosen)


def bucket_of(lengths: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Return the shortest bucket that holds each length: (rows,) -> (rows,)."""
    return np.asarray(buckets, dtype=np.int64)[np.searchsorted(buckets, lengths, side="left")]


def _best_subsets(
    costs: np.ndarray, counts: np.ndarray, max_buckets: int
) -> list[tuple[float, list[int]]]:
    """Return for 1, 2, ... buckets the least cost and the candidates that are then buckets.

    The last candidate is always one. best[j] is the least cost of all rows up to candidate j when
    j is a bucket; one pass over j for each further bucket allowed.

    costs, counts: (candidates,), of a row padded to each, and rows that need each.
    """
    rows_up_to = np.concatenate([[0], np.cumsum(counts)])
    size = len(costs)
    best = rows_up_to[1:] * costs
    previous = [np.full(size, -1)]
    found = [(float(best[-1]), [size - 1])]
    for _ in range(min(max_buckets, size) - 1):
        # through[i, j]: candidates up to i solved with one bucket fewer, i+1..j padded to j.
        through = best[:, None] + (rows_up_to[None, 1:] - rows_up_to[1:, None]) * costs[None]
        through = np.where(np.tri(size, k=-1, dtype=bool).T, through, np.inf)
        choice = np.argmin(through, axis=0)
        improved = through[choice, np.arange(size)]
        previous.append(np.where(improved < best, choice, -1))
        best = np.minimum(best, improved)
        chosen = [size - 1]
        for step in reversed(previous):
            if step[chosen[-1]] >= 0:
                chosen.append(int(step[chosen[-1]]))
        found.append((float(best[-1]), chosen[::-1]))
    return found
