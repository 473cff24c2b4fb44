"""Answers as they come -> the journal and the table; the clock -> which rows are cut or given up.

Stands between an executor and the rest of the run while rows are predicted. Does not know Ray, JAX
or files.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from runner.deadline import Deadline, longest_that_fits
from runner.errors import WorkerError
from runner.journal import Journal
from runner.merge import PREDICTED, SHORTENED, Merger
from runner.progress import Progress
from runner.records import BatchResult
from sharding.backlog import Backlog
from sharding.batches import Batch, Plan
from sharding.forecast import seconds_left
from sharding.rates import Rates

# Rows that may come out as no numbers before one comes out well: more, and the model is broken.
MOST_BROKEN_ROWS = 64
# Seconds between forecasts.
FORECAST_S = 0.5
# Forecasts kept for the report.
MOST_FORECASTS = 400


class Executor(Protocol):
    """What steering asks of the executor that runs a backlog."""

    replicas: int

    def speed(self) -> float: ...

    def compile_s(self) -> float: ...


class Steering:
    """One pass over the rows of a run.

    Args:
        lengths: int64 (rows,), tokens of each row at full length.
        replan: (rows, cap) -> their plan where none is longer than cap tokens.
        caps: the lengths that rows may be cut to, ascending; empty where they must not be.
        full_length: what every row is padded to, where the pooling sees padding; else None.
        started: `time.monotonic()` of the process' start.

    Attributes:
        broken: rows that came out as no numbers. answered: how many came out well.
        cap: the length that rows are cut to now, None for none.
    """

    def __init__(
        self,
        backlog: Backlog,
        rates: Rates,
        executor: Executor,
        *,
        merger: Merger,
        journal: Journal,
        progress: Progress,
        deadline: Deadline,
        lengths: np.ndarray,
        replan: Callable[[Sequence[int], int], Plan],
        caps: Sequence[int],
        full_length: int | None,
        started: float,
    ) -> None:
        self._backlog = backlog
        self._rates = rates
        self._executor = executor
        self._merger = merger
        self._journal = journal
        self._progress = progress
        self._deadline = deadline
        self._lengths = lengths
        self._replan = replan
        self._caps = list(caps)
        self._full_length = full_length
        self._started = started
        self._cheapest_first = False
        self.answered = 0
        self._lengths_done: list[np.ndarray] = []
        self._forecast_at = self._decided_at = 0.0
        self.broken: list[int] = []
        self.cap: int | None = None
        self.forecasts: list[tuple[float, float]] = []
        self.real_tokens = self.padded_tokens = 0
        self.journal_s = 0.0

    @property
    def lengths_done(self) -> np.ndarray:
        """Tokens of the rows that were answered: int64 (rows,)."""
        none = [np.zeros(0, dtype=np.int64)]
        return np.concatenate(self._lengths_done or none)

    def take(self, result: BatchResult) -> None:
        """Keep the answers of a batch, on disk and in the table.

        Raises:
            WorkerError: nothing but NaN and infinity comes out.
            JournalError: they cannot be kept.
        """
        batch = result.batch
        finite = np.isfinite(result.probabilities).all(axis=1)
        cut = self._is_cut(batch)
        lengths = np.minimum(self._lengths[list(batch.rows)], batch.shape.length)
        for how, chosen in ((PREDICTED, finite & ~cut), (SHORTENED, finite & cut)):
            rows = [row for row, is_one in zip(batch.rows, chosen, strict=True) if is_one]
            if not rows:
                continue
            began = time.perf_counter()
            self._journal.add(
                rows,
                result.probabilities[chosen],
                how=how,
                worker=str(result.replica),
                lengths=lengths[chosen].tolist(),
            )
            self.journal_s += time.perf_counter() - began
            self._merger.add(
                rows, result.probabilities[chosen], how=how, lengths=lengths[chosen], again=True
            )
        self.broken += [row for row, is_one in zip(batch.rows, ~finite, strict=True) if is_one]
        self.answered += int(finite.sum())
        if not self.answered and len(self.broken) >= MOST_BROKEN_ROWS:
            raise WorkerError(
                f"The first {len(self.broken)} rows came out as NaN or infinity. If the dtype is "
                "float16, try --dtype bfloat16 or float32; else look at the weights and the head."
            )
        self._lengths_done.append(lengths)
        self.real_tokens += int(lengths.sum())
        self.padded_tokens += batch.shape.tokens
        self._progress.advance(rows=len(batch.rows), tokens=int(lengths.sum()))

    def tick(self) -> bool:
        """Look at the clock, forecast, and decide; return whether to go on."""
        now = time.monotonic() - self._started
        if self._deadline.is_over(now):
            return False
        if now - self._forecast_at < FORECAST_S:
            return True
        self._forecast_at = now
        left = seconds_left(
            self._backlog, self._rates, self._executor.speed(), self._executor.replicas
        )
        if left is None:
            return True
        self._keep(now, left)
        slack = None if self._deadline.limit_s is None else self._deadline.left_s(now) - left
        self._progress.forecast(left_s=left, slack_s=slack)
        if slack is not None and now - self._decided_at >= self._deadline.decide_every_s():
            self._decided_at = now
            self._decide(now, left)
        return True

    def _decide(self, now: float, left: float) -> None:
        """Give up no more than the time asks for, and take back what it does not."""
        deadline = self._deadline
        less = deadline.needs_less(left, now)
        if deadline.policy == "fail":
            if less and not deadline.events:
                self._say(
                    now,
                    f"{left:.0f} s of work are left for {deadline.left_s(now):.0f} s: it will not "
                    "fit, and then this run ends without a submission",
                )
        elif deadline.policy == "fill" or not self._caps:
            if less and not self._cheapest_first:
                self._order_cheapest_first(now, left)
        elif less or (self.cap is not None and deadline.has_room(left, now)):
            self._cut(now, left)

    def _cut(self, now: float, left: float) -> None:
        """Cut the rows that wait to the longest length at which all still fit."""
        rows = [row for batch in self._backlog.waiting() for row in batch.rows
                if not self._backlog.is_suspect(batch)]  # fmt: skip
        if not rows:
            return
        speed, compile_s = self._executor.speed(), self._executor.compile_s()
        waiting = sum(self._rates.work(batch.shape) for batch in self._backlog.waiting())
        others = max(0.0, left - waiting / speed)
        known = set(self._known_shapes())

        def forecast(cap: int) -> float:
            plan = self._replan(rows, cap)
            work = sum(self._rates.work(batch.shape) for batch in plan.batches)
            unknown = len(set(plan.shapes) - known)
            return work / speed + others + unknown * compile_s

        available = self._deadline.left_s(now)
        cap = longest_that_fits(self._caps, forecast, available)
        floor = cap is None
        cap = cap if cap is not None else self._caps[0]
        if cap == (self.cap or self._caps[-1]):
            if floor and not self._cheapest_first:
                self._order_cheapest_first(now, left)
            return
        withdrawn = self._backlog.withdraw()
        self._backlog.add(self._in_order(self._replan(withdrawn, cap)))
        self.cap = cap if cap < self._caps[-1] else None
        needed = int((self._lengths[list(withdrawn)] > cap).sum())
        self._say(
            now,
            f"{left:.0f} s of work for {available:.0f} s: "
            + (
                f"{len(withdrawn):,} rows are cut to {cap} tokens ({needed:,} of them are longer)"
                if self.cap
                else f"{len(withdrawn):,} rows are no longer cut"
            ),
        )
        if floor and not self._cheapest_first:
            self._order_cheapest_first(now, left)

    def _order_cheapest_first(self, now: float, left: float) -> None:
        """What does not fit is then the fewest rows."""
        self._cheapest_first = True
        cap = self.cap or (self._caps[-1] if self._caps else int(self._lengths.max(initial=1)))
        withdrawn = self._backlog.withdraw()
        self._backlog.add(self._in_order(self._replan(withdrawn, cap)))
        self._say(
            now,
            f"{left:.0f} s of work for {self._deadline.left_s(now):.0f} s: the shortest rows come "
            "first, and those that do not fit get the fallback",
        )

    def _in_order(self, plan: Plan) -> list[Batch]:
        batches = list(plan.batches)
        return batches[::-1] if self._cheapest_first else batches

    def _known_shapes(self) -> list[object]:
        batches = [*self._backlog.waiting(), *self._backlog.under_way()]
        return [*{batch.shape for batch in batches}, *self._rates.shapes()]

    def _is_cut(self, batch: Batch) -> np.ndarray:
        """Whether each row of a batch is made from less than the run asked for."""
        if self._full_length is not None:
            return np.full(len(batch.rows), batch.shape.length < self._full_length)
        return self._lengths[list(batch.rows)] > batch.shape.length

    def _keep(self, now: float, left: float) -> None:
        if len(self.forecasts) >= MOST_FORECASTS:
            self.forecasts = self.forecasts[::2]
        self.forecasts.append((round(now, 2), round(now + left, 2)))

    def _say(self, now: float, what: str) -> None:
        self._progress.note(f"deadline: {self._deadline.note(now, what)}")
