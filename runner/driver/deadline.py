"""A time limit, a forecast and a clock -> what to give up, and when to stop.

Pure: times are seconds since the process started, and nothing here reads a clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# Shares of the time left. Forecasts err: rows are truncated so that they take `AIM` of it, further
# if they would take more than `TOO_MUCH`, and less if they would take less than `TOO_LITTLE`.
# Time left at the end is used to predict truncated rows at full length.
TOO_MUCH, AIM, TOO_LITTLE = 0.99, 0.95, 0.85
# While a new length compiles, rows keep their length for at most this share of the time.
BRIDGE_SHARE = 0.25
# If compiling the shortest length takes more than this share of the time, it is not used.
FLOOR_SHARE = 0.6
# The most that is reserved for the last batch.
LAST_BATCH_SHARE = 0.1
# Reserved for merging and writing: a multiple of what a rehearsal took, some seconds, and a share
# of the limit, up to a maximum.
MARGIN_FACTOR = 3.0
MARGIN_S = 1.0
MARGIN_SHARE, MOST_MARGIN_S = 0.005, 4.0
# A run that has not stopped is ended when this share of the margin is left. While it starts, the
# whole margin is left: nothing is lost, and Ray's start keeps other threads from running.
LAST_CALL = 0.5
# Between decisions: at least so many seconds, and this share of the time left.
DECIDE_S = 0.5
DECIDE_SHARE = 0.03
# The first decision waits for measured batches, but at most this share of the time.
PATIENCE = 0.1
# Truncated lengths differ by at least this share, and by so many times the share of the time left
# that compiling takes.
STEP, STEP_FOR_A_COMPILE = 0.02, 2.0
# Lengths grow again in steps of at least this share, and to a length that must be compiled only if
# that takes at most this share of the time: rows truncated too far are predicted again at the end.
STEP_BACK, COMPILE_SHARE = 0.08, 0.1


@dataclass(slots=True)
class Deadline:
    """A run's time limit and the decisions that it forced, with reasons.

    limit_s: None if there is none. policy: a choice of --on-deadline. margin_s: see `rehearsed`.
    """

    limit_s: float | None
    policy: str
    margin_s: float = MARGIN_S
    events: list[dict[str, float | str]] = field(default_factory=list)

    def rehearsed(self, seconds: float) -> None:
        """Learn the margin from how long writing a submission of this size took."""
        share = min(MARGIN_SHARE * (self.limit_s or 0.0), MOST_MARGIN_S)
        self.margin_s = MARGIN_S + share + MARGIN_FACTOR * seconds

    def left_s(self, now_s: float) -> float:
        """Return the seconds left for predicting."""
        if self.limit_s is None:
            return float("inf")
        return self.limit_s - self.margin_s - now_s

    def is_over(self, now_s: float) -> bool:
        return self.left_s(now_s) <= 0

    def last_call_s(self, *, is_starting: bool = False) -> float | None:
        """Return when to end a run that has not stopped by itself, None for never."""
        if self.limit_s is None:
            return None
        return self.limit_s - (1.0 if is_starting else LAST_CALL) * self.margin_s

    def decide_every_s(self, now_s: float) -> float:
        return max(DECIDE_S, DECIDE_SHARE * self.left_s(now_s))

    def needs_less(self, forecast_s: float, now_s: float) -> bool:
        """Whether the remaining work does not fit."""
        return forecast_s > TOO_MUCH * self.left_s(now_s)

    def has_room(self, forecast_s: float, now_s: float) -> bool:
        """Whether enough time would be left for longer rows."""
        return forecast_s < TOO_LITTLE * self.left_s(now_s)

    def aim_s(self, now_s: float) -> float:
        """Return the seconds that the remaining work should take."""
        return AIM * self.left_s(now_s)

    def note(self, now_s: float, what: str) -> str:
        """Record a decision for the report; return it as a sentence for the user."""
        self.events.append({"at_s": round(now_s, 3), "what": what})
        return what


def longest_that_fits(
    lengths: Sequence[int], forecast_s: Callable[[int], float], within_s: float
) -> int | None:
    """Return the longest length at which everything fits, None if there is none.

    Args:
        lengths: the choices, ascending.
        forecast_s: length -> seconds that all rows take, truncated to it; grows with the length.
    """
    low, high = 0, len(lengths)
    while low < high:
        middle = (low + high) // 2
        if forecast_s(lengths[middle]) <= within_s:
            low = middle + 1
        else:
            high = middle
    return lengths[low - 1] if low else None


def lengths_to_cut_to(
    floor: int, top: int, *, multiple_of: int, others: Iterable[int] = ()
) -> list[int]:
    """Return the lengths that rows may be truncated to, ascending: `floor`, the multiples and
    others between, and `top`, which truncates none."""
    first = floor + multiple_of - floor % multiple_of
    between = [*range(first, top, multiple_of), *others]
    return sorted({floor, top, *(length for length in between if floor < length < top)})


def spread(lengths: Sequence[int], share: float) -> list[int]:
    """Leave out lengths, of ascending ones, that differ too little from those before: each that is
    taken costs a compile, which is this share of the time that is left."""
    step, chosen = 1 + max(STEP, STEP_FOR_A_COMPILE * share), list(lengths[:1])
    for length in lengths[1:]:
        if length >= chosen[-1] * step:
            chosen.append(length)
    return chosen
