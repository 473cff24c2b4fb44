"""Rows -> answers: a pass over all rows, one over broken answers, and extra passes.

Each pass plans its rows, lets the executor compute them, and keeps the answers. Does not know what
becomes of the answers, nor how an executor computes.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from runner.common.background import in_background
from runner.common.errors import WorkerError, first_line, list_ids
from runner.common.poolings import POOLINGS, padded_length
from runner.common.records import TokenTable
from runner.data.inputs import render, to_tokens
from runner.driver.deadline import lengths_to_cut_to
from runner.driver.ending import write
from runner.driver.setting import Rows, Setting
from runner.driver.steering import Steering
from runner.driver.swap_pass import in_waves, predict_swapped, rows_to_swap, swap
from runner.executors.executor import Executor
from runner.model.accuracy import compare, reference_batch
from runner.preset.auto import plan_run, tokens_per_batch
from runner.report.gather import Outcome
from runner.results.ledger import Ledger
from runner.results.table import PREDICTED, SWAPPED, WIDER
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.kinds import KINDS
from sharding.rates import COMPILING_TAKES, Rates

# This many rows are computed in float32 at a time.
ROWS_IN_FLOAT = 8


class Passes:
    """The passes over the rows of a run, once its executor and its ledger are open."""

    def __init__(
        self,
        setting: Setting,
        rows: Rows,
        outcome: Outcome,
        executor: Executor,
        ledger: Ledger,
    ) -> None:
        self._setting, self._config = setting, setting.config
        self._preset = preset = setting.job.preset
        self._rows, self._table = rows, rows.table
        self._outcome = outcome
        self._executor = executor
        self._ledger = ledger
        # The most tokens of a batch, asked once since it looks at the devices.
        self._budget = (
            tokens_per_batch(setting.config, preset, executor.kind, executor.memory_bytes)
            if rows.examples
            else 0
        )
        self._next_index = 0

    def predict(self) -> None:
        """Predict the rows that have no answer at full length, while there is time. Under a time
        limit, only rows without any answer come first."""
        tokens = self._tokens(self._rows.texts)
        if tokens is None:
            return
        setting, executor = self._setting, self._executor
        outcome, lengths = self._outcome, tokens.lengths
        outcome.lengths = lengths
        may_be_short = setting.deadline.limit_s is not None and setting.deadline.policy != "fail"
        rows = self._table.missing() if may_be_short else self._table.unfinished()
        outcome.plan = plan = self._plan(lengths, rows)
        cost, is_host = self._preset.shape.batch_flops, KINDS[executor.kind].is_host
        backlog = Backlog(plan.batches, cost=cost)
        rates = Rates(cost, compiling_takes=COMPILING_TAKES if is_host else 0.0)
        steering = self._steer(backlog, rates, plan, lengths)
        outcome.tally = steering.tally
        setting.progress.expect(rows=len(lengths), done=len(lengths) - len(rows))
        if not backlog:
            steering.improve()
        results = executor.run(backlog, tokens, rates=rates, ids=self._rows.examples.ids)
        for result in results:
            if result is not None:
                steering.take(result)
            if not steering.tick():
                break
        results.close()
        self._next_index = backlog.next_index

    def _steer(self, backlog: Backlog, rates: Rates, plan: Plan, lengths: np.ndarray) -> Steering:
        setting, config, executor = self._setting, self._config, self._executor
        longest = int(lengths[self._table.unfinished()].max(initial=1))
        sees_padding = POOLINGS[config.pooling].sees_padding
        top = config.sequence_length if sees_padding else min(longest, config.sequence_length)
        return Steering(
            backlog,
            rates,
            executor,
            ledger=self._ledger,
            progress=setting.progress,
            deadline=setting.deadline,
            lengths=lengths,
            replan=lambda rows, cap, shapes: self._plan(
                lengths, rows, cap=cap, known=[*plan.shapes, *shapes]
            ),
            caps=lengths_to_cut_to(
                min(config.floor_length, top),
                top,
                multiple_of=KINDS[executor.kind].bucket_multiple,
                others=(shape.length for shape in plan.shapes),
            ),
            full_length=config.sequence_length if sees_padding else None,
            started=setting.started,
            clock=time.monotonic,
        )

    def repeat_broken_rows(self) -> None:
        """Predict rows again, in float32, if they came out as NaN or infinity."""
        broken, progress = self._outcome.tally.broken, self._setting.progress
        if not broken:
            return
        self._executor.computed.faults.nonfinite_rows += len(broken)
        progress.note(
            f"warning: {len(broken)} rows came out as NaN or infinity "
            f"({list_ids(self._rows.examples.ids, broken)}); predicted again in float32",
            event="fault",
            rows=len(broken),
        )
        progress.phase(f"predicting {len(broken)} rows again in float32")
        config = self._config
        for start in range(0, len(broken), ROWS_IN_FLOAT):
            rows = broken[start : start + ROWS_IN_FLOAT]
            within_s = self._setting.deadline.left_s(self._setting.now())
            if within_s <= 0:
                return
            lengths = self._outcome.lengths[rows]
            length = padded_length(config.pooling, int(lengths.max()), config.sequence_length)
            batch = Batch(0, tuple(rows), BatchShape(len(rows), length))
            try:
                values = self._executor.predict_in_float(batch, within_s=within_s)
            except WorkerError as error:
                progress.note(f"warning: that failed: {error}")
                return
            finite = np.isfinite(values).all(axis=1)
            mended = [row for row, is_one in zip(rows, finite, strict=True) if is_one]
            if mended:
                self._ledger.add(mended, values[finite], how=WIDER, lengths=lengths[finite])

    def rows_to_improve(self) -> list[int]:
        """Return the rows for an extra pass, the most uncertain first."""
        return rows_to_swap(self._table) if self._config.extra_passes == "swap" else []

    def improve(self) -> None:
        """Use the time that is left for an extra pass, and write its result however it ends."""
        setting, task, executor = self._setting, self._config.task, self._executor
        rows, began = self.rows_to_improve(), setting.now()
        if not rows or setting.deadline.is_over(began):
            return
        setting.progress.phase("tokenizing rows with their responses swapped")
        predict_s = executor.computed.predict_s
        tokens = self._tokens(render(swap(self._rows.examples, task), self._config))
        if tokens is None:
            return
        known = self._outcome.plan.shapes
        batches = in_waves(rows, lambda wave: self._plan(tokens.lengths, wave, known=known))
        try:
            predict_swapped(
                setting,
                executor,
                self._ledger,
                tokens,
                list(batches),
                first_index=self._next_index,
                write=lambda: write(setting, self._rows, self._outcome),
            )
        finally:
            self._outcome.extra_passes = {
                "rows": self._table.how.count(SWAPPED),
                "seconds": round(setting.now() - began, 4),
            }
            executor.computed.predict_s = predict_s
            write(setting, self._rows, self._outcome)

    def measure_quantization(self) -> dict[str, Any] | None:
        """Return how far quantization moved the first rows, or what `prepare` measured."""
        setting, config = self._setting, self._config
        preset, mode = self._preset, setting.job.quantization
        if preset.quantization is not None:
            return {"mode": preset.quantization, **preset.accuracy}
        if mode is None or not self._outcome.lengths.size:
            return None
        first = list(range(min(len(self._rows.examples), ROWS_IN_FLOAT)))
        if setting.deadline.limit_s is not None or any(
            self._table.how[row] != PREDICTED for row in first
        ):
            return {"mode": mode, "measured": "not in this run: its time or its rows were cut"}
        setting.progress.phase("the submission is written; comparing its first rows with float32")
        started = time.monotonic()
        batch = reference_batch(
            self._outcome.lengths,
            pooling=config.pooling,
            sequence_length=config.sequence_length,
        )
        try:
            reference = self._executor.predict_in_float(batch, within_s=float("inf"))
        except WorkerError as error:
            # The submission is written: a worker without memory for this costs only the figure.
            return {"mode": mode, "measured": f"it failed: {first_line(error)}"}
        figures = compare(
            self._table.probabilities(batch.rows),
            reference,
            seconds=time.monotonic() - started,
            head=config.task.head,
        )
        return {"mode": mode, **figures}

    def _tokens(self, texts: list[str]) -> TokenTable | None:
        """Tokenize all rows while workers start, and return the tokens; None if time is over."""
        tokenizing = in_background(lambda: self._tokenize(texts), name="tokenize")
        while not tokenizing.done():
            self._executor.poll()
            time.sleep(0.05)
            if self._setting.is_over():
                return None
        return tokenizing.result()

    def _tokenize(self, texts: list[str]) -> TokenTable:
        def count(rows: int) -> None:
            done = rows == len(texts)
            self._setting.progress.phase(
                "starting, loading and compiling"
                if done
                else f"tokenizing {rows:,}/{len(texts):,} rows"
            )

        with self._setting.timed("tokenize"):
            return to_tokens(
                texts,
                self._preset,
                sequence_length=self._config.sequence_length,
                on_progress=count,
            )

    def _plan(
        self,
        lengths: np.ndarray,
        rows: Sequence[int],
        *,
        cap: int | None = None,
        known: Sequence[BatchShape] = (),
    ) -> Plan:
        return plan_run(
            lengths,
            self._config,
            self._preset,
            kind=self._executor.kind,
            replicas=self._executor.replicas,
            budget=self._budget,
            rows=rows,
            cap=cap,
            known=known,
        )
