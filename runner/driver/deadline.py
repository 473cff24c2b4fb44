"""A time limit and a forecast -> what is given up, and when to stop.

Pure: times are seconds since the process started, and nothing here reads a clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# Shares of the time that is left. Since forecasts err, rows are truncated so that they take `AIM`
# of it, truncated again if they take more than `TOO_MUCH`, and less if they take less than
# `TOO_LITTLE`. Time that is left at the end goes to predicting truncated rows at full length.
TOO_MUCH, AIM, TOO_LITTLE = 0.99, 0.95, 0.85
# While a length compiles, rows are computed as they are for at most this share of the time.
BRIDGE_SHARE = 0.25
# If compiling the shortest length would take more of the time than this, it is not used.
FLOOR_SHARE = 0.6
# At most this share is also kept for the last batch.
LAST_BATCH_SHARE = 0.1
# The margin for merging and writing: this many times what a rehearsal took, these seconds, and a
# share of the limit, up to a maximum.
MARGIN_FACTOR = 3.0
MARGIN_S = 1.0
MARGIN_SHARE, MOST_MARGIN_S = 0.005, 4.0
# A run that has not stopped is ended when this share of the margin is left. During the start it is
# ended when all of it is left: no answer is lost, and a starting Ray delays other threads.
LAST_CALL = 0.5
# At least these seconds, and this share of the time that is left, pass between decisions.
DECIDE_S = 0.5
DECIDE_SHARE = 0.03
# A first decision waits for measured batches, but no longer than this share of the time.
PATIENCE = 0.1
# Lengths that rows are truncated to differ by at least this much, and by this many times the share
# of the time that a compile takes.
STEP, STEP_FOR_A_COMPILE = 0.02, 2.0
# Rows are made longer again in steps of at least this much, and to a length that must be compiled
# only if that takes no more than this share of the time: the end of the run makes up for the rest.
STEP_BACK, COMPILE_SHARE = 0.08, 0.1


@dataclass(slots=True)
class Deadline:
    """The time limit of a run, and the decisions that it led to.

    limit_s: None for no limit. policy: a choice of --on-deadline. margin_s: see `rehearsed`.
    """

    limit_s: float | None
    policy: str
    margin_s: float = MARGIN_S
    events: list[dict[str, float | str]] = field(default_factory=list)

    def rehearsed(self, seconds: float) -> None:
        """Set the margin by the seconds that writing a submission of this size took."""
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
        """Return whether the remaining work does not fit."""
        return forecast_s > TOO_MUCH * self.left_s(now_s)

    def has_room(self, forecast_s: float, now_s: float) -> bool:
        """Return whether enough time would be left for longer rows."""
        return forecast_s < TOO_LITTLE * self.left_s(now_s)

    def aim_s(self, now_s: float) -> float:
        """Return the seconds that the remaining work should take."""
        return AIM * self.left_s(now_s)

    def note(self, now_s: float, what: str) -> str:
        """Keep a decision for the report, and return it."""
        self.events.append({"at_s": round(now_s, 3), "what": what})
        return what


def longest_that_fits(
    lengths: Sequence[int], forecast_s: Callable[[int], float], within_s: float
) -> int | None:
    """Return the longest length at which all rows fit, None if there is none.

    Args:
        lengths: those to choose from, ascending.
        forecast_s: length -> the seconds that all rows take if truncated to it; must grow with it.
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
    """Return the lengths that rows may be truncated to, ascending: `floor`, `top` for full length,
    and the multiples and others between them."""
    first = floor + multiple_of - floor % multiple_of
    between = [*range(first, top, multiple_of), *others]
    return sorted({floor, top, *(length for length in between if floor < length < top)})


def spread(lengths: Sequence[int], share: float) -> list[int]:
    """Return ascending lengths without those that differ too little from the one before: each costs
    a compile, which takes this share of the time that is left."""
    step, chosen = 1 + max(STEP, STEP_FOR_A_COMPILE * share), list(lengths[:1])
    for length in lengths[1:]:
        if length >= chosen[-1] * step:
            chosen.append(length)
    return chosen
