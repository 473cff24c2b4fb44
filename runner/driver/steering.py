"""Answers as they come -> the journal and the table; the clock -> which rows are cut or given up.

Stands between an executor and the rest of the run while rows are predicted. Does not know Ray, JAX
or files.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from runner.common.errors import WorkerError
from runner.common.records import BatchResult, Tally
from runner.driver.deadline import (
    BRIDGE_SHARE,
    COMPILE_SHARE,
    FLOOR_SHARE,
    LAST_BATCH_SHARE,
    PATIENCE,
    STEP_BACK,
    Deadline,
    longest_that_fits,
    spread,
)
from runner.executors.executor import Executor
from runner.results.ledger import Ledger
from runner.results.table import PREDICTED, SHORTENED
from runner.telemetry.progress import Progress
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.forecast import seconds_left, seconds_of, work_of
from sharding.rates import Rates

# Rows that may come out as no numbers before one comes out well: more, and the model is broken.
MOST_BROKEN_ROWS = 64
# Seconds between forecasts, and how many times as long as one took: a large test set has many
# batches to look at. At most this share of the time that is left.
FORECAST_S, FORECAST_TIMES, FORECAST_SHARE = 0.5, 20.0, 0.05
# Forecasts kept for the report.
MOST_FORECASTS = 400


class Steering:
    """One pass over the rows of a run.

    Args:
        lengths: int64 (rows,), tokens of each row at full length.
        replan: (rows, cap, shapes) -> their plan where none is longer than cap tokens, and shapes
            are those that there are programs for.
        caps: the lengths that rows may be cut to, ascending, the last for not at all.
        full_length: what every row is padded to, where the pooling sees padding; else None.
        started: of the process, by `clock`.

    Attributes:
        tally: what was counted so far.
        cap: the length that rows are cut to now, None for none.
    """

    def __init__(
        self,
        backlog: Backlog,
        rates: Rates,
        executor: Executor,
        *,
        ledger: Ledger,
        progress: Progress,
        deadline: Deadline,
        lengths: np.ndarray,
        replan: Callable[[Sequence[int], int, Iterable[BatchShape]], Plan],
        caps: Sequence[int],
        full_length: int | None,
        started: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backlog = backlog
        self._rates = rates
        self._executor = executor
        self._ledger = ledger
        self._progress = progress
        self._deadline = deadline
        self._lengths = lengths
        self._replan = replan
        self._caps = list(caps)
        self._full_length = full_length
        self._started = started
        self._clock = clock
        self._cheapest_first = False
        self._uncounted = set(backlog.rows_left)
        self._first_forecast_at: float | None = None
        self._forecast_next = self._decided_at = float("-inf")
        self._improving = self._is_bridging = False
        self.tally = Tally()
        self.cap: int | None = None

    def take(self, result: BatchResult) -> None:
        """Keep the answers of a batch, on disk and in the table.

        Raises:
            WorkerError: nothing but NaN and infinity comes out.
            JournalError: they cannot be kept.
        """
        batch, tally = result.batch, self.tally
        finite = result.finite
        cut = self._is_cut(batch)
        lengths = np.minimum(self._lengths[list(batch.rows)], batch.shape.length)
        for how, chosen in ((PREDICTED, finite & ~cut), (SHORTENED, finite & cut)):
            rows = result.rows_where(chosen)
            if not rows:
                continue
            began = time.perf_counter()
            self._ledger.add(
                rows,
                result.probabilities[chosen],
                how=how,
                lengths=lengths[chosen],
                worker=str(result.replica),
            )
            tally.journal_s += time.perf_counter() - began
        tally.broken += result.rows_where(~finite)
        tally.answered += int(finite.sum())
        if not tally.answered and len(tally.broken) >= MOST_BROKEN_ROWS:
            raise WorkerError(
                f"The first {len(tally.broken)} rows came out as NaN or infinity. If the dtype is "
                "float16, try --dtype bfloat16 or float32; else look at the weights and the head."
            )
        tally.lengths.append(lengths)
        tally.real_tokens += int(lengths.sum())
        tally.padded_tokens += batch.shape.tokens
        new = self._uncounted.intersection(batch.rows)
        self._uncounted -= new
        self._progress.advance(rows=len(new), tokens=int(lengths.sum()))

    def tick(self) -> bool:
        """Look at the clock, forecast, and decide; return whether to go on."""
        now = self._clock() - self._started
        if self._deadline.is_over(now):
            return False
        if self._is_done_but_for_length():
            self.improve()
        if now < self._forecast_next:
            return True
        self._forecast(now)
        took = self._clock() - self._started - now
        pause_s = min(FORECAST_TIMES * took, FORECAST_SHARE * self._deadline.left_s(now))
        self._forecast_next = now + max(FORECAST_S, pause_s)
        return True

    def _forecast(self, now: float) -> None:
        self._leave_the_bridge()
        left = seconds_left(self._backlog, self._rates, self._executor.paces())
        if left is None:
            return
        if self._first_forecast_at is None:
            self._first_forecast_at = now
        self._keep(now, left)
        slack = None if self._deadline.limit_s is None else self._deadline.left_s(now) - left
        self._progress.forecast(left_s=left, slack_s=slack)
        if slack is not None and now - self._decided_at >= self._deadline.decide_every_s(now):
            self._decide(now, left)

    def improve(self) -> None:
        """Where nothing waits and time is left, predict rows again that were cut, whole: as many
        as fit, the shortest first. They have an answer already, whatever comes of it."""
        if self._deadline.policy == "fail":
            return
        now = self._clock() - self._started
        rows = [
            row for row, how in enumerate(self._ledger.table.how)
            if how == SHORTENED and row not in self._backlog.rows_left
        ]  # fmt: skip
        if not rows:
            return
        before = seconds_left(self._backlog, self._rates, self._executor.paces()) or 0.0
        available = self._deadline.aim_s(now)
        chosen: list[Batch] = []
        work, shapes = 0.0, set()
        for batch in self._plan(rows, self._caps[-1]).batches[::-1]:
            work += self._rates.work(batch.shape)
            shapes.add(batch.shape)
            took = seconds_of(work, self._executor.paces(shapes)) or 0.0
            if before + took > available:
                break
            chosen.append(batch)
        if not chosen:
            return
        self._backlog.add(chosen)
        if not self._improving:
            self._improving = True
            self._say(
                now,
                f"{_seconds(self._deadline.left_s(now))} are left over: rows that were cut are "
                "predicted again at their full length, the shortest first, while there is time",
            )

    def _is_done_but_for_length(self) -> bool:
        """Whether nothing waits, and what is computed now are rows that have an answer."""
        backlog = self._backlog
        return not backlog.counts() and all(
            self._ledger.table.how[row] for row in backlog.rows_left
        )

    def _decide(self, now: float, left: float) -> None:
        """Give up no more than the time asks for, and take back what it does not."""
        deadline = self._deadline
        needed = left + self._last_batch_s(now)
        less = deadline.needs_less(needed, now)
        if deadline.policy == "fail":
            if less and not deadline.events and self._is_sure(now):
                self._say(
                    now,
                    f"{_work_for(left, deadline.left_s(now))}: it will not fit, and then this run "
                    "ends without a submission, its rows kept in the journal",
                )
        elif deadline.policy == "fill":
            # No row is lost by the order: there is no need to be sure.
            if less and not self._cheapest_first:
                self._order_cheapest_first(now, left)
        elif (less or (self.cap is not None and deadline.has_room(needed, now))) and self._is_sure(
            now
        ):
            self._cut(now, left)

    def _last_batch_s(self, now: float) -> float:
        """Return the seconds of the largest batch on the slowest replica: it may come last, and
        must come."""
        shapes = self._backlog.counts()
        speeds = [pace.speed for pace in self._executor.paces(()) if pace.speed]
        largest = max(map(self._rates.work, shapes), default=0.0)
        seconds = largest / min(speeds) if speeds else 0.0
        return min(seconds, LAST_BATCH_SHARE * self._deadline.left_s(now))

    def _is_sure(self, now: float) -> bool:
        """Whether the forecast rests on measured batches, or there is no time to wait for them."""
        assert self._first_forecast_at is not None, "this is a bug: a decision without a forecast"
        if self._executor.is_measured():
            return True
        since = self._first_forecast_at
        return now - since > PATIENCE * self._deadline.left_s(since)

    def _cut(self, now: float, left: float) -> None:
        """Cut the rows that wait to the longest length at which all still fit."""
        backlog, rates, executor = self._backlog, self._rates, self._executor
        waiting = [batch for batch in backlog.waiting() if not backlog.is_suspect(batch)]
        rows = self._unanswered(waiting)
        if not rows:
            return
        self._decided_at = now
        available = self._deadline.aim_s(now) - self._last_batch_s(now)
        compile_s = executor.compile_s()
        compiled = {shape.length for shape in executor.warm()}
        bridge = self._bridge(waiting, min(compile_s, BRIDGE_SHARE * available))
        stays = {batch.index for batch in bridge}
        after_bridge = self._unanswered(batch for batch in waiting if batch.index not in stays)
        others = [*backlog.under_way(), *filter(backlog.is_suspect, backlog.waiting())]

        def forecast(cap: int) -> float:
            plan = self._plan(rows if cap in compiled else after_bridge, cap)
            batches = [*others, *plan.batches, *(() if cap in compiled else bridge)]
            work = work_of(batches, rates)
            return seconds_of(work, executor.paces(plan.shapes)) or 0.0

        def worth_going_back_to(cap: int) -> bool:
            if cap == self._caps[-1] or cap in compiled:
                return True
            return cap >= now_cut_to * (1 + STEP_BACK) and compile_s <= COMPILE_SHARE * available

        known = [cap for cap in self._caps if cap in compiled or cap == self._caps[-1]]
        new = spread([cap for cap in self._caps if cap not in compiled], compile_s / available)
        fits = [
            cap for caps in (known, new)
            if (cap := longest_that_fits(caps, forecast, available)) is not None
        ]  # fmt: skip
        cap, now_cut_to = max(fits, default=self._caps[0]), self.cap or self._caps[-1]
        if not fits and cap not in compiled and compile_s > FLOOR_SHARE * available:
            cap = min([now_cut_to, *known])  # there is no time to compile the shortest
        affected = self._longer(rows if cap in compiled else after_bridge, min(cap, now_cut_to))
        if cap != now_cut_to and affected and (cap < now_cut_to or worth_going_back_to(cap)):
            self._cut_to(cap, now, left, bridge if cap not in compiled else ())
        if not fits and not self._cheapest_first:
            self._order_cheapest_first(now, left)

    def _cut_to(self, cap: int, now: float, left: float, bridge: Sequence[Batch]) -> None:
        withdrawn = self._withdraw(bridge)
        self._backlog.add(self._in_order(self._plan(withdrawn, cap)))
        self._is_bridging = bool(bridge)
        self.cap = cap if cap < self._caps[-1] else None
        longer = self._longer(withdrawn, cap)
        if not self.cap:
            what = "the rows that are left are no longer cut"
        elif self._full_length is not None:
            what = f"the {len(withdrawn):,} rows that wait are cut and padded to {cap} tokens"
        else:
            what = (
                f"of the {len(withdrawn):,} rows that wait, the {longer:,} that are longer are cut "
                f"to {cap} tokens"
            )
        self._say(now, f"{_work_for(left, self._deadline.left_s(now))}: {what}")

    def _bridge(self, waiting: Iterable[Batch], seconds: float) -> list[Batch]:
        """Return the batches that go on as they are for so many seconds, while a new length is
        compiled: without them the replicas would wait for it."""
        warm, paces = self._executor.warm(), self._executor.paces(())
        work = seconds * sum(pace.speed for pace in paces)
        work -= sum(self._rates.work(batch.shape) for batch in self._backlog.under_way())
        chosen: list[Batch] = []
        for batch in waiting:
            if work <= 0:
                break
            if batch.shape in warm:
                chosen.append(batch)
                work -= self._rates.work(batch.shape)
        return chosen

    def _leave_the_bridge(self) -> None:
        """Cut the rows that were kept as they are until there is a program for the new length."""
        cap = self.cap or self._caps[-1]
        if self._is_bridging and any(shape.length == cap for shape in self._executor.warm()):
            self._is_bridging = False
            self._backlog.add(self._in_order(self._plan(self._withdraw(), cap)))

    def _order_cheapest_first(self, now: float, left: float) -> None:
        """What does not fit is then the fewest rows."""
        self._cheapest_first = True
        withdrawn = self._withdraw()
        self._backlog.add(self._in_order(self._plan(withdrawn, self.cap or self._caps[-1])))
        self._decided_at = now
        self._say(
            now,
            f"{_work_for(left, self._deadline.left_s(now))}: the shortest rows come first, and "
            "those that there is no time for get the fallback",
        )

    def _withdraw(self, kept: Iterable[Batch] = ()) -> list[int]:
        """Take back the rows that wait; those that have an answer already stand with it."""
        return [row for row in self._backlog.withdraw(kept) if not self._ledger.table.how[row]]

    def _unanswered(self, batches: Iterable[Batch]) -> list[int]:
        return [row for batch in batches for row in batch.rows if not self._ledger.table.how[row]]

    def _longer(self, rows: Sequence[int], cap: int) -> int:
        """Return how many rows a cut makes shorter."""
        if self._full_length is not None:
            return len(rows) if cap < self._full_length else 0
        return int((self._lengths[list(rows)] > cap).sum())

    def _plan(self, rows: Sequence[int], cap: int) -> Plan:
        return self._replan(rows, cap, self._executor.warm())

    def _in_order(self, plan: Plan) -> list[Batch]:
        batches = list(plan.batches)
        return batches[::-1] if self._cheapest_first else batches

    def _is_cut(self, batch: Batch) -> np.ndarray:
        """Whether each row of a batch is made from less than the run asked for."""
        if self._full_length is not None:
            return np.full(len(batch.rows), batch.shape.length < self._full_length)
        return self._lengths[list(batch.rows)] > batch.shape.length

    def _keep(self, now: float, left: float) -> None:
        forecasts = self.tally.forecasts
        if len(forecasts) >= MOST_FORECASTS:
            del forecasts[1::2]
        forecasts.append((round(now, 2), round(now + left, 2)))

    def _say(self, now: float, what: str) -> None:
        self._progress.note(f"deadline: {self._deadline.note(now, what)}")


def _work_for(work_s: float, left_s: float) -> str:
    return f"{_seconds(work_s)} of work are left for {_seconds(left_s)} of time"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
