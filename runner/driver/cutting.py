"""Waiting rows and the time that is left -> truncated rows, or the shortest rows first.

Decides how far rows are truncated; `steering.py` decides when. Does not know Ray, JAX or files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from runner.common.units import seconds_text
from runner.driver.deadline import (
    BRIDGE_SHARE,
    COMPILE_SHARE,
    FLOOR_SHARE,
    STEP_BACK,
    Deadline,
    longest_that_fits,
    spread,
)
from runner.driver.intake import Lengths
from runner.executors.executor import Executor
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.forecast import seconds_of, work_of
from sharding.rates import Rates


@dataclass(slots=True, kw_only=True)
class Cutter:
    """Plans waiting rows again, truncated to another length or in another order.

    has_answer: whether a row already has an answer, truncated or not. replan: returns the plan of
    rows truncated to a length; shapes are those that have a program. caps: the lengths that rows
    may be truncated to, ascending; the last is full length. say: (seconds, sentence) tells the user
    about a decision. cap: the length that rows are truncated to now, None for full length.
    is_cheapest_first: whether the shortest rows come first.
    """

    backlog: Backlog
    rates: Rates
    executor: Executor
    deadline: Deadline
    lengths: Lengths
    has_answer: Callable[[int], bool]
    replan: Callable[[Sequence[int], int, Iterable[BatchShape]], Plan]
    caps: Sequence[int]
    say: Callable[[float, str], None]
    cap: int | None = None
    is_cheapest_first: bool = False
    _is_bridging: bool = False

    def cut(self, now: float, left: float, available: float) -> bool:
        """Truncate waiting rows to the longest length at which all fit; return whether any wait.

        Args:
            left: seconds of the work as planned. available: seconds that it may take.
        """
        backlog, rates, executor = self.backlog, self.rates, self.executor
        waiting = [batch for batch in backlog.waiting() if not backlog.is_suspect(batch)]
        rows = self._unanswered(waiting)
        if not rows:
            return False
        compile_s = executor.compile_s()
        compiled = {shape.length for shape in executor.warm()}
        bridge = self._bridge(waiting, min(compile_s, BRIDGE_SHARE * available))
        stays = {batch.index for batch in bridge}
        after_bridge = self._unanswered(batch for batch in waiting if batch.index not in stays)
        others = [*backlog.in_flight(), *filter(backlog.is_suspect, backlog.waiting())]

        def forecast(cap: int) -> float:
            plan = self._plan(rows if cap in compiled else after_bridge, cap)
            batches = [*others, *plan.batches, *(() if cap in compiled else bridge)]
            work = work_of(batches, rates)
            return seconds_of(work, executor.paces(plan.shapes)) or 0.0

        def worth_going_back_to(cap: int) -> bool:
            if cap == self._whole or cap in compiled:
                return True
            return cap >= now_cut_to * (1 + STEP_BACK) and compile_s <= COMPILE_SHARE * available

        known = [cap for cap in self.caps if cap in compiled or cap == self._whole]
        new = spread([cap for cap in self.caps if cap not in compiled], compile_s / available)
        fits = [
            cap for caps in (known, new)
            if (cap := longest_that_fits(caps, forecast, available)) is not None
        ]  # fmt: skip
        cap, now_cut_to = max(fits, default=self.caps[0]), self.cap or self._whole
        if not fits and cap not in compiled and compile_s > FLOOR_SHARE * available:
            cap = min([now_cut_to, *known])  # there is no time to compile the shortest length
        affected = self.lengths.count_longer(
            rows if cap in compiled else after_bridge, min(cap, now_cut_to)
        )
        if cap != now_cut_to and affected and (cap < now_cut_to or worth_going_back_to(cap)):
            self._cut_to(cap, now, left, bridge if cap not in compiled else ())
        if not fits:
            self.order_cheapest_first(now, left)
        return True

    def order_cheapest_first(self, now: float, left: float) -> None:
        """Put the shortest rows first, so that the fewest rows do not fit."""
        if self.is_cheapest_first:
            return
        self.is_cheapest_first = True
        self._add(self._withdraw(), self.cap or self._whole)
        self.say(
            now,
            f"{work_for(left, self.deadline.left_s(now))}: the shortest rows come first, and "
            "those that there is no time for get the fallback",
        )

    def leave_the_bridge(self) -> None:
        """Truncate the rows that were kept as they were, once the new length is compiled."""
        cap = self.cap or self._whole
        if self._is_bridging and any(shape.length == cap for shape in self.executor.warm()):
            self._is_bridging = False
            self._add(self._withdraw(), cap)

    def plan_whole(self, rows: Sequence[int]) -> Sequence[Batch]:
        """Return batches of rows at full length, the shortest first."""
        return self._plan(rows, self._whole).batches[::-1]

    def _cut_to(self, cap: int, now: float, left: float, bridge: Sequence[Batch]) -> None:
        withdrawn = self._withdraw(bridge)
        self._add(withdrawn, cap)
        self._is_bridging = bool(bridge)
        self.cap = cap if cap < self._whole else None
        longer = self.lengths.count_longer(withdrawn, cap)
        if not self.cap:
            what = "the rows that are left are no longer cut"
        elif self.lengths.padded_to is not None:
            what = f"the {len(withdrawn):,} rows that wait are cut and padded to {cap} tokens"
        else:
            what = (
                f"of the {len(withdrawn):,} rows that wait, the {longer:,} that are longer are cut "
                f"to {cap} tokens"
            )
        self.say(now, f"{work_for(left, self.deadline.left_s(now))}: {what}")

    def _bridge(self, waiting: Iterable[Batch], seconds: float) -> list[Batch]:
        """Return batches that take this many seconds as they are: the replicas compute them while a
        new length compiles, instead of waiting."""
        warm, paces = self.executor.warm(), self.executor.paces(())
        work = seconds * sum(pace.speed for pace in paces)
        work -= sum(self.rates.work(batch.shape) for batch in self.backlog.in_flight())
        chosen: list[Batch] = []
        for batch in waiting:
            if work <= 0:
                break
            if batch.shape in warm:
                chosen.append(batch)
                work -= self.rates.work(batch.shape)
        return chosen

    def _withdraw(self, kept: Iterable[Batch] = ()) -> list[int]:
        """Take back waiting rows; return those without an answer."""
        return [row for row in self.backlog.withdraw(kept) if not self.has_answer(row)]

    def _unanswered(self, batches: Iterable[Batch]) -> list[int]:
        return [row for batch in batches for row in batch.rows if not self.has_answer(row)]

    def _plan(self, rows: Sequence[int], cap: int) -> Plan:
        return self.replan(rows, cap, self.executor.warm())

    def _add(self, rows: Sequence[int], cap: int) -> None:
        """Plan rows and add their batches to the backlog."""
        batches = self._plan(rows, cap).batches
        self.backlog.add(batches[::-1] if self.is_cheapest_first else batches)

    @property
    def _whole(self) -> int:
        return self.caps[-1]


def work_for(work_s: float, left_s: float) -> str:
    return f"{seconds_text(work_s)} of work are left for {seconds_text(left_s)} of time"
