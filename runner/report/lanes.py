"""Overlapping spans -> the state of each worker at each moment, and where all their time went.

Pure arithmetic on the records of `timeline.py`. Does not know drawings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from runner.telemetry.timeline import COMPILING, LOADING, LOST, PREDICTING, STARTING, Span

IDLE, ENDING = "idle", "ending"
# If spans overlap, the worker is in the state that comes last here.
STATES = (ENDING, IDLE, LOADING, STARTING, COMPILING, LOST, PREDICTING)


@dataclass(frozen=True, slots=True)
class Lane:
    """The states of one worker, from the start of the run to its end.

    edges: float64 (n + 1,), ascending, in seconds. states: int64 (n,), for each stretch between two
    edges an index into STATES.
    """

    replica: int
    member: int
    edges: np.ndarray
    states: np.ndarray

    def seconds(self) -> dict[str, float]:
        """Return the seconds in each state; they sum to the length of the run."""
        sums = np.bincount(self.states, weights=np.diff(self.edges), minlength=len(STATES))
        return dict(zip(STATES, sums.tolist(), strict=True))

    def runs(self, cells: int) -> list[tuple[str, float, float]]:
        """Return consecutive stretches, (state, start, end).

        The run is cut into `cells` equal cells. Each has the state that takes most of it, and
        neighbours in the same state are joined.
        """
        grid = np.linspace(self.edges[0], self.edges[-1], cells + 1)
        spent = np.zeros((len(STATES), cells))
        lengths = np.diff(self.edges)
        for place in np.unique(self.states):
            until = np.concatenate([[0.0], np.cumsum(lengths * (self.states == place))])
            spent[place] = np.diff(np.interp(grid, self.edges, until))
        states = spent.argmax(axis=0)
        firsts = np.flatnonzero(np.diff(states, prepend=-1))
        ends = np.append(firsts[1:], cells)
        return [
            (STATES[states[first]], float(grid[first]), float(grid[end]))
            for first, end in zip(firsts, ends, strict=True)
        ]


def make_lanes(
    spans: Sequence[Span], workers: Iterable[tuple[int, int]], *, end_s: float
) -> list[Lane]:
    """Return a lane for each worker, (replica, member).

    A worker is starting before its first span, ending after the last answer of all workers, and
    otherwise idle when it has no span.

    Args:
        end_s: the end of the run, in seconds since the process started.
    """
    last_answer_s = max((span.end_s for span in spans if span.what == PREDICTING), default=end_s)
    by_worker: dict[tuple[int, int], list[Span]] = {worker: [] for worker in workers}
    for span in spans:
        if (span.replica, span.member) in by_worker:
            by_worker[span.replica, span.member].append(span)
    return [
        _lane(worker, own, last_answer_s=last_answer_s, end_s=end_s)
        for worker, own in by_worker.items()
    ]


def _lane(
    worker: tuple[int, int], spans: list[Span], *, last_answer_s: float, end_s: float
) -> Lane:
    starts = np.array([span.start_s for span in spans]).clip(0.0, end_s)
    ends = np.array([span.end_s for span in spans]).clip(0.0, end_s)
    last_answer_s = min(last_answer_s, end_s)
    first_s = float(starts.min(initial=end_s))
    edges = np.unique(np.concatenate([[0.0, first_s, last_answer_s, end_s], starts, ends]))
    states = np.full(len(edges) - 1, STATES.index(IDLE))
    states[edges[:-1] >= last_answer_s] = STATES.index(ENDING)
    states[edges[:-1] < first_s] = STATES.index(STARTING)
    lows, highs = np.searchsorted(edges, starts), np.searchsorted(edges, ends)
    whats = np.array([STATES.index(span.what) for span in spans], dtype=np.int64)
    for place in np.argsort(whats, kind="stable"):
        states[lows[place] : highs[place]] = whats[place]
    return Lane(*worker, edges, states)


# Parts of all workers' time, in the order in which they are drawn.
WORKING, SLOWER, PADDING = "at the matmul rate", "slower than that", "padding"
PARTS = (WORKING, SLOWER, PADDING, IDLE, COMPILING, LOADING, STARTING, LOST, ENDING)


def shares(lanes: Sequence[Lane], *, padding: float, limit_s: float | None) -> dict[str, float]:
    """Return the share of each part in all workers' time; the shares sum to one.

    Args:
        padding: the share of padding and filler in the predicted tokens.
        limit_s: worker seconds that the model FLOPs of real tokens take at the rate of a large
            matmul; None if unknown: then SLOWER is all of predicting except padding.
    """
    total_s = sum(float(lane.edges[-1] - lane.edges[0]) for lane in lanes)
    if not total_s:
        return {}
    seconds = {state: sum(lane.seconds()[state] for lane in lanes) for state in STATES}
    predicting_s = seconds.pop(PREDICTING)
    padding_s = padding * predicting_s
    working_s = min(limit_s or 0.0, predicting_s - padding_s)
    seconds |= {
        WORKING: working_s,
        SLOWER: predicting_s - padding_s - working_s,
        PADDING: padding_s,
    }
    return {part: seconds[part] / total_s for part in PARTS}


def rate_over_time(spans: Sequence[Span], amounts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the amount per second between each pair of edges, float64 (len(edges) - 1,).

    Args:
        amounts: (spans,), each spread evenly over the time of its span.
    """
    done = np.zeros(len(edges))
    for span, amount in zip(spans, amounts, strict=True):
        took = max(span.seconds, 1e-6)
        done += amount * np.clip((edges - (span.end_s - took)) / took, 0.0, 1.0)
    return np.diff(done) / np.diff(edges)


def real_tokens(spans: Sequence[Span], lengths: np.ndarray) -> np.ndarray:
    """Return the real tokens in each span's batch, without padding: int64 (spans,).

    Args:
        lengths: (rows,), tokens of each row at full length.
    """
    return np.array(
        [
            np.minimum(lengths[list(span.batch.rows)], span.batch.shape.length).sum()
            if span.batch is not None
            else 0
            for span in spans
        ],
        dtype=np.int64,
    )


def answers(spans: Sequence[Span], *, copies: bool = False) -> list[Span]:
    """Return the span of each answered batch on the last member, which sends the answer.

    Args:
        copies: whether to include answers to batches that another replica had already answered.
    """
    last = {span.replica: 0 for span in spans}
    for span in spans:
        last[span.replica] = max(last[span.replica], span.member)
    return [
        span
        for span in spans
        if span.what == PREDICTING
        and (copies or not span.is_copy)
        and span.member == last[span.replica]
    ]
