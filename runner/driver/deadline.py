"""A time limit, a forecast and a clock -> what is given up, and when to stop.

Pure: times are seconds since the process started, and nothing here looks at a clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# Shares of the time that is left. Forecasts err: rows are cut so that they take `AIM` of it, cut
# again if they take more than `TOO_MUCH`, and cut less if they take less than `TOO_LITTLE`.
# What is left over in the end makes cut rows whole again.
TOO_MUCH, AIM, TOO_LITTLE = 0.99, 0.95, 0.85
# While a length is compiled, rows are computed as they are for so much of the time at most.
BRIDGE_SHARE = 0.25
# If the shortest length has yet to be compiled and that takes more of the time than this, as
# many rows are done without it.
FLOOR_SHARE = 0.6
# Kept for the last batch besides, at most.
LAST_BATCH_SHARE = 0.1
# Kept for merging and writing: so many times what a rehearsal took, so many seconds, and for long
# limits a share of them, up to a most.
MARGIN_FACTOR = 3.0
MARGIN_S = 1.0
MARGIN_SHARE, MOST_MARGIN_S = 0.005, 4.0
# A run that has not stopped is ended when so much of the margin is left. While it starts all of it
# is: nothing is lost by that, and starting Ray keeps other threads from running.
LAST_CALL = 0.5
# Between decisions at least so many seconds, and at least so much of the time that is left.
DECIDE_S = 0.5
DECIDE_SHARE = 0.03
# A first decision waits for measured batches, but not for more than this of the time there is.
PATIENCE = 0.1
# Lengths that rows are cut to differ by so much at least, and by so many times the share of the
# time that is left which a compile takes.
STEP, STEP_FOR_A_COMPILE = 0.02, 2.0
# A cut is taken back by steps of so much at least, and to a length that must be compiled only if
# that takes no more than this share of the time: what is cut too much is made good in the end.
STEP_BACK, COMPILE_SHARE = 0.08, 0.1


@dataclass(slots=True)
class Deadline:
    """The limit of a run, what was decided because of it, and why.

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
        """Return the seconds in which rows can still be predicted."""
        if self.limit_s is None:
            return float("inf")
        return self.limit_s - self.margin_s - now_s

    def is_over(self, now_s: float) -> bool:
        return self.left_s(now_s) <= 0

    def last_call_s(self, *, is_starting: bool = False) -> float | None:
        """Return when a run that has not stopped by itself must be ended, None for never."""
        if self.limit_s is None:
            return None
        return self.limit_s - (1.0 if is_starting else LAST_CALL) * self.margin_s

    def decide_every_s(self, now_s: float) -> float:
        return max(DECIDE_S, DECIDE_SHARE * self.left_s(now_s))

    def needs_less(self, forecast_s: float, now_s: float) -> bool:
        """Whether what is left to do does not fit."""
        return forecast_s > TOO_MUCH * self.left_s(now_s)

    def has_room(self, forecast_s: float, now_s: float) -> bool:
        """Whether so much time would be left over that rows could be longer."""
        return forecast_s < TOO_LITTLE * self.left_s(now_s)

    def aim_s(self, now_s: float) -> float:
        """Return what all that is left should take."""
        return AIM * self.left_s(now_s)

    def note(self, now_s: float, what: str) -> str:
        """Keep a decision for the report; return it as a sentence for the user."""
        self.events.append({"at_s": round(now_s, 3), "what": what})
        return what


def longest_that_fits(
    lengths: Sequence[int], forecast_s: Callable[[int], float], within_s: float
) -> int | None:
    """Return the longest length at which everything fits, None if it does at none.

    Args:
        lengths: those to choose from, ascending.
        forecast_s: the seconds that all rows take if they are cut to a length; grows with it.
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
    """Return the lengths that rows may be cut to, ascending: `floor`, `top` for not at all, and
    between them the multiples and others."""
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
