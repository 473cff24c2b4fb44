"""A clock and a forecast -> when rows are truncated, given up, or predicted again at full length.

Connects an executor to the rest of the run while rows are predicted: `intake.py` keeps the answers,
`cutting.py` decides how far rows are truncated. Does not know Ray, JAX or files.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from runner.common.records import BatchResult
from runner.common.units import seconds_text
from runner.driver.cutting import Cutter, work_for
from runner.driver.deadline import LAST_BATCH_SHARE, PATIENCE, Deadline
from runner.driver.intake import Intake, Lengths
from runner.executors.executor import Executor
from runner.results.ledger import Ledger
from runner.results.table import SHORTENED
from runner.telemetry.progress import Progress
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.forecast import seconds_left, seconds_of
from sharding.rates import Rates

# Between forecasts pass these seconds, or this many times as long as a forecast took, which is long
# for a large test set; but at most this share of the time that is left.
FORECAST_S, FORECAST_TIMES, FORECAST_SHARE = 0.5, 20.0, 0.05
# The report keeps at most this many forecasts.
MOST_FORECASTS = 400


class Steering:
    """One pass over the rows of a run.

    Args:
        lengths: int64 (rows,), tokens of each row at full length.
        replan, caps: as for `Cutter`.
        full_length: the length that every row is padded to if the pooling sees padding; else None.
        started: of the process, by `clock`.

    Attributes:
        tally: counts of the answers so far.
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
        self._table = ledger.table
        self._progress = progress
        self._deadline = deadline
        self._started = started
        self._clock = clock
        in_tokens = Lengths(lengths, full_length)
        self._intake = Intake(ledger, progress, in_tokens, set(backlog.rows_left))
        self._cutter = Cutter(
            backlog=backlog,
            rates=rates,
            executor=executor,
            deadline=deadline,
            lengths=in_tokens,
            has_answer=lambda row: bool(ledger.table.how[row]),
            replan=replan,
            caps=caps,
            say=self._say,
        )
        self._first_forecast_at: float | None = None
        self._forecast_next = self._decided_at = float("-inf")
        self._improving = False
        self.tally = self._intake.tally

    @property
    def cap(self) -> int | None:
        """The length that rows are truncated to now, None for full length."""
        return self._cutter.cap

    def take(self, result: BatchResult) -> None:
        """Keep the answers of a batch; see `Intake.take`."""
        self._intake.take(result)

    def tick(self) -> bool:
        """Read the clock, forecast, and decide; return whether to go on."""
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
        self._cutter.leave_the_bridge()
        left = seconds_left(self._backlog, self._rates, self._executor.paces())
        if left is None:
            return
        if self._first_forecast_at is None:
            self._first_forecast_at = now
        forecasts = self.tally.forecasts
        if len(forecasts) >= MOST_FORECASTS:
            del forecasts[1::2]
        forecasts.append((round(now, 2), round(now + left, 2)))
        slack = None if self._deadline.limit_s is None else self._deadline.left_s(now) - left
        self._progress.forecast(left_s=left, slack_s=slack)
        if slack is not None and now - self._decided_at >= self._deadline.decide_every_s(now):
            self._decide(now, left)

    def improve(self) -> None:
        """If nothing waits and time is left, predict truncated rows again at full length: as many
        as fit, the shortest first. A row keeps its answer until the new one is there."""
        if self._deadline.policy == "fail":
            return
        now = self._clock() - self._started
        rows = [
            row for row, how in enumerate(self._table.how)
            if how == SHORTENED and row not in self._backlog.rows_left
        ]  # fmt: skip
        if not rows:
            return
        before = seconds_left(self._backlog, self._rates, self._executor.paces()) or 0.0
        available = self._deadline.aim_s(now)
        chosen: list[Batch] = []
        work, shapes = 0.0, set()
        for batch in self._cutter.plan_whole(rows):
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
                f"{seconds_text(self._deadline.left_s(now))} are left over: rows that were cut are "
                "predicted again at full length, the shortest first, while there is time",
            )

    def _is_done_but_for_length(self) -> bool:
        """Return whether nothing waits, and all rows that are computed now have an answer."""
        backlog = self._backlog
        return not backlog.counts() and all(self._table.how[row] for row in backlog.rows_left)

    def _decide(self, now: float, left: float) -> None:
        """Give up as little as the time requires, and take back what it no longer requires."""
        deadline = self._deadline
        needed = left + self._last_batch_s(now)
        less = deadline.needs_less(needed, now)
        if deadline.policy == "fail":
            if less and not deadline.events and self._is_sure(now):
                self._say(
                    now,
                    f"{work_for(left, deadline.left_s(now))}: it will not fit, so this run "
                    "will end without a submission, with its rows kept in the journal",
                )
        elif deadline.policy == "fill":
            # The order costs no row, so the forecast need not be sure.
            if less and not self._cutter.is_cheapest_first:
                self._cutter.order_cheapest_first(now, left)
                self._decided_at = now
        elif less or (self.cap is not None and deadline.has_room(needed, now)):
            available = deadline.aim_s(now) - self._last_batch_s(now)
            if self._is_sure(now) and self._cutter.cut(now, left, available):
                self._decided_at = now

    def _last_batch_s(self, now: float) -> float:
        """Return the seconds of the largest batch on the slowest replica, which may be the last."""
        shapes = self._backlog.counts()
        speeds = [pace.speed for pace in self._executor.paces(()) if pace.speed]
        largest = max(map(self._rates.work, shapes), default=0.0)
        seconds = largest / min(speeds) if speeds else 0.0
        return min(seconds, LAST_BATCH_SHARE * self._deadline.left_s(now))

    def _is_sure(self, now: float) -> bool:
        """Return whether the forecast is by measured batches, or cannot wait for them."""
        assert self._first_forecast_at is not None, "this is a bug: a decision without a forecast"
        if self._executor.is_measured():
            return True
        since = self._first_forecast_at
        return now - since > PATIENCE * self._deadline.left_s(since)

    def _say(self, now: float, what: str) -> None:
        self._progress.note(f"deadline: {self._deadline.note(now, what)}")
