"""A time limit, a forecast and a clock -> what is given up, and when it is time to stop.

Pure: times are seconds since the process started, and nothing here looks at a clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

# Forecasts err: what fits must fit with so much to spare, and shortening is taken back only where
# so much of the time left over is not needed.
SAFETY = 0.02
UNUSED = 0.06
# Kept for merging and writing: so many times what a rehearsal took, and so many seconds.
MARGIN_FACTOR = 3.0
MARGIN_S = 1.0
# Between decisions at least so many seconds, and at most so much of the limit.
DECIDE_S = 0.5
DECIDE_SHARE = 0.01


@dataclass(slots=True)
class Deadline:
    """The limit of a run, what was decided because of it, and why.

    limit_s: None where there is none. policy: a choice of --on-deadline. margin_s: see `rehearsed`.
    """

    limit_s: float | None
    policy: str
    margin_s: float = MARGIN_S
    events: list[dict[str, float | str]] = field(default_factory=list)

    def rehearsed(self, seconds: float) -> None:
        """Learn the margin from how long writing a submission of this size took."""
        self.margin_s = MARGIN_S + MARGIN_FACTOR * seconds

    def left_s(self, now_s: float) -> float:
        """Return the seconds in which rows can still be predicted."""
        if self.limit_s is None:
            return float("inf")
        return self.limit_s - self.margin_s - now_s

    def is_over(self, now_s: float) -> bool:
        return self.left_s(now_s) <= 0

    def decide_every_s(self) -> float:
        return max(DECIDE_S, DECIDE_SHARE * (self.limit_s or 0.0))

    def needs_less(self, forecast_s: float, now_s: float) -> bool:
        """Whether what is left to do does not fit."""
        return forecast_s * (1 + SAFETY) > self.left_s(now_s)

    def has_room(self, forecast_s: float, now_s: float) -> bool:
        """Whether so much time would be left over that rows could be longer."""
        left = self.left_s(now_s)
        return forecast_s < left * (1 - UNUSED)

    def note(self, now_s: float, what: str) -> str:
        """Keep a decision for the report; return it as a sentence for the person."""
        self.events.append({"at_s": round(now_s, 3), "what": what})
        return what


def longest_that_fits(
    lengths: list[int], forecast_s: Callable[[int], float], left_s: float
) -> int | None:
    """Return the longest length at which everything fits, None if it does at none.

    Args:
        lengths: those to choose from, ascending.
        forecast_s: the seconds that all rows take if they are cut to a length; grows with it.
    """
    low, high = 0, len(lengths)
    while low < high:
        middle = (low + high) // 2
        if forecast_s(lengths[middle]) * (1 + SAFETY) <= left_s:
            low = middle + 1
        else:
            high = middle
    return lengths[low - 1] if low else None
