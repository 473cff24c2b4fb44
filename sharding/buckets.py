"""Token lengths -> the few padded lengths that batches are compiled for.

Does not know what a batch is, nor which rows share one.
"""

import numpy as np


def choose_buckets(
    lengths: np.ndarray,
    *,
    sequence_length: int,
    max_buckets: int = 8,
    multiple_of: int = 16,
) -> tuple[int, ...]:
    """Return the padded lengths, ascending, that waste the fewest padded tokens.

    Every length has a bucket at least as long. Candidates are the multiples of `multiple_of`
    (vector units like even shapes) and `sequence_length` itself. Among all choices of at most
    `max_buckets` candidates the one with the smallest sum of padded lengths is taken, found by
    dynamic programming over the length histogram in O(max_buckets * candidates^2).

    Args:
        lengths: (rows,) token counts, each at most `sequence_length`.
        sequence_length: the longest padded length there may be.

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
    return tuple(int(candidates[i]) for i in _best_subset(candidates, counts, max_buckets))


def bucket_of(lengths: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Return the shortest bucket that holds each length: (rows,) -> (rows,)."""
    return np.asarray(buckets, dtype=np.int64)[np.searchsorted(buckets, lengths, side="left")]


def _best_subset(candidates: np.ndarray, counts: np.ndarray, max_buckets: int) -> list[int]:
    """Indices of the candidates to keep; the last is always kept.

    best[j] is the least padded tokens of all rows up to candidate j when j is a bucket; one pass
    over j for each further bucket allowed.
    """
    rows_up_to = np.concatenate([[0], np.cumsum(counts)])
    size = len(candidates)
    best = rows_up_to[1:] * candidates
    previous = [np.full(size, -1)]
    for _ in range(min(max_buckets, size) - 1):
        # through[i, j]: candidates up to i solved with one bucket fewer, i+1..j padded to j.
        through = best[:, None] + (rows_up_to[None, 1:] - rows_up_to[1:, None]) * candidates[None]
        through = np.where(np.tri(size, k=-1, dtype=bool).T, through, np.iinfo(np.int64).max)
        choice = np.argmin(through, axis=0)
        improved = through[choice, np.arange(size)]
        previous.append(np.where(improved < best, choice, -1))
        best = np.minimum(best, improved)
    chosen = [size - 1]
    for step in reversed(previous):
        if step[chosen[-1]] >= 0:
            chosen.append(int(step[chosen[-1]]))
    return chosen[::-1]
