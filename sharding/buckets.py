"""Token lengths -> the few padded lengths that batches are compiled for.

Does not know batches.
"""

from collections.abc import Callable

import numpy as np

# This many shapes are used whatever they cost to compile; any test set has enough rows for them.
FREE_BUCKETS = 8
# More shapes save almost nothing: the best 16 leave 3.3 % padding at 1,024 tokens.
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

    Each length fits a bucket. Candidates are multiples of `multiple_of`, which suit vector units,
    and `sequence_length` itself. For each number of buckets, dynamic programming over the histogram
    of lengths finds the cheapest choice in O(max_buckets * candidates^2). `FREE_BUCKETS` are always
    used, more only if they save more than compiling their shapes costs.

    Args:
        lengths: (rows,) token counts, each at most `sequence_length`.
        sequence_length: the largest padded length.
        cost: padded length -> the cost of a row; by default its padded tokens.
        cost_of_shape: the cost of a shape beyond `FREE_BUCKETS`, in the same unit.
        max_buckets: the maximum number of buckets.

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
    # The shortest candidate for each row; no other candidate can be optimal.
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
    """Return the least cost for 1, 2, ... buckets, and the candidates that are the buckets.

    The last candidate is always a bucket. best[j] is the least cost of all rows up to candidate j
    if j is a bucket; each pass allows one more bucket.

    Args:
        costs: (candidates,), of a row padded to each. counts: (candidates,), rows that need each.
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
