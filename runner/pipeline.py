"""The run as one sentence: read, render, tokenize, plan, predict, merge, write, report.

The only file that knows all stages.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from runner.accuracy import compare, reference_batch
from runner.config import RunConfig
from runner.dataset import read_examples
from runner.deadline import Deadline, lengths_to_cut_to
from runner.errors import (
    EXIT_DEADLINE,
    ArenaRunnerError,
    DataError,
    DeadlineError,
    WorkerError,
    first_line,
    list_ids,
)
from runner.extra_passes import in_waves, predict_swapped, rows_to_swap, swap
from runner.fingerprint import Fingerprint
from runner.guard import Guard
from runner.job import Job, compilation_cache, find_job, settle
from runner.journal import Journal
from runner.logs import LogEvent, RunLogs
from runner.merge import FILLED, PREDICTED, SHORTENED, SWAPPED, WIDER, Merger
from runner.metrics import Figures, Metrics
from runner.presets import Preset
from runner.progress import Progress
from runner.prompts import render_prompts
from runner.records import Examples, Faults, TokenTable
from runner.report import (
    make_report,
    say_summary,
    summarize,
    versions,
    what_happened,
    write_report,
    write_rows,
)
from runner.steering import Steering
from runner.strategy import Strategy, choose_strategy, tokens_per_batch
from runner.submission import check_writable, rehearse, write_submission
from runner.timeline import Event, Timeline
from runner.tokenization import tokenize
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan, plan_batches
from sharding.buckets import choose_buckets
from sharding.rates import COMPILING_TAKES, Rates
from sharding.topology import BUCKET_MULTIPLES

if TYPE_CHECKING:
    from runner.dispatch import RayReplicas
    from runner.single import InProcess

    Executor = RayReplicas | InProcess

T = TypeVar("T")

# What the run itself is at, in the words of its page.
STAGES = {"read": "reading", "tokenize": "tokenizing", "merge": "merging and writing"}
# Seconds in which the page must be drawn: no run ends later for it.
PAGE_WITHIN_S = 60.0
# Values that a page's charts are drawn from.
MOST_VALUES = 5_000_000
# Rows that are computed again in float32 at a time.
ROWS_IN_FLOAT = 8
# Numbers of a row that a message names.
MOST_NAMED = 8


def run(
    config: RunConfig,
    *,
    started: float | None = None,
    on_signals_taken: Callable[[], None] = lambda: None,
    owns_process: bool = False,
) -> dict[str, Any]:
    """Do what `config` asks for and return the report, which is also on disk then.

    Args:
        started: `time.monotonic()` of the process' start, for `seconds.total` and the limit.
        on_signals_taken: called when Ray has replaced the process' signal handlers.
        owns_process: whether this process is the command's, whose streams may be taken.

    Raises:
        ConfigError, DataError: the person's to mend; nothing was written.
        DeadlineError: the time is over and --on-deadline is fail; the journal is kept.
        WorkerError, MergeError, JournalError: the run failed; no submission was written. The
            message says what is safe in the journal.
    """
    started = time.monotonic() if started is None else started
    with (
        RunLogs(config.log_folder, takes_streams=owns_process, workers_too=config.verbose) as logs,
        Progress(
            started=started,
            stream=logs.terminal,
            log_format=config.log_format,
            record=logs.record,
        ) as progress,
        Metrics(config.metrics_port) as metrics,
    ):
        if metrics.url:
            progress.note(f"figures of this run: {metrics.url}", event="metrics", url=metrics.url)
        check_writable("--output", config.output)
        for path in (config.report_path, config.page_path, config.trace_path):
            check_writable("--report", path)
        check_writable("--journal", config.journal_path)
        logs.check()
        job = find_job(config, progress)
        config = settle(config, job.preset)
        this = _Run(config, job, progress, started, logs)
        progress.stage(f"reading {this.job.test_set.name}")
        with this.timed("read"):
            this.read()
        if not this.examples:
            progress.note(f"warning: {this.job.test_set} has no rows; the submission is a header.")
        is_json = config.log_format == "json"
        logs.open(
            None if is_json else progress.show,
            leaves_stdout=config.mode == "single" and not is_json,
        )
        with (
            this.open_executor() as executor,
            Guard(this.last_call(is_starting=True), lambda: this.end_without(executor)) as guard,
        ):
            metrics.watch(lambda: this.figures(executor))
            dtype = executor.open(config.dtype, compilation_cache()) if this.examples else ""
            dtype = this.job.dtype(config, dtype)
            on_signals_taken()
            with this.open_journal(dtype):
                if this.merger.unfinished() or this.rows_to_improve():
                    executor.start(this.job.spec(config, dtype))
                if this.merger.unfinished():
                    guard.postpone(this.last_call())
                    if tokens := this.tokens(this.examples, executor):
                        this.predict(executor, tokens)
                    this.repeat_broken_rows(executor)
                guard.call_off()
                this.fill(this.journal)
                progress.stage("merging and writing")
                this.write()
                this.improve(executor)
                quantization = this.measure_quantization(executor)
        report = this.write_reports(executor, quantization)
        logs.record(LogEvent("end", summarize(report, config)))
    print(say_summary(report, config), flush=True)
    return report


def plan_run(
    lengths: np.ndarray,
    config: RunConfig,
    preset: Preset,
    *,
    kind: str,
    replicas: int,
    rows: Sequence[int] | None = None,
    cap: int | None = None,
    known: Sequence[BatchShape] = (),
) -> Plan:
    """Return the batches for these rows on so many replicas on this kind of device.

    `padded-mean` averages over every position up to the sequence length, so every row is padded
    to it; the other poolings do not see padding, and rows get the shortest bucket.

    Args:
        lengths: int64 (rows,), tokens of each row.
        rows: those to plan, None for all.
        cap: the tokens that rows are cut to, where time is short.
        known: shapes that are compiled already, of which others are to be few.
    """
    shape = preset.shape
    chosen = np.arange(len(lengths)) if rows is None else np.asarray(rows, dtype=np.int64)
    limit = config.sequence_length if cap is None else min(cap, config.sequence_length)
    needed = np.minimum(lengths[chosen], limit)
    if config.pooling == "padded-mean":
        buckets: tuple[int, ...] = (limit,)
    elif known:
        buckets = tuple(sorted({one.length for one in known if one.length < limit} | {limit}))
    else:
        buckets = choose_buckets(
            needed,
            sequence_length=limit,
            cost=lambda length: shape.batch_flops(BatchShape(1, length)),
            cost_of_shape=shape.compile_flops(kind, replicas),
            multiple_of=BUCKET_MULTIPLES[kind],
        )
    budget = tokens_per_batch(config, preset, kind)
    return plan_batches(
        needed, buckets=buckets, max_tokens_per_batch=budget, rows=chosen, known=known
    )


class _Run:
    """One run's state between its stages."""

    def __init__(
        self, config: RunConfig, job: Job, progress: Progress, started: float, logs: RunLogs
    ) -> None:
        self.config = config
        self.job = job
        self.strategy: Strategy | None = choose_strategy(config, job.preset)
        self.seconds = dict.fromkeys(
            ("total", "read", "tokenize", "start_workers", "load", "compile", "predict", "merge"),
            0.0,
        )
        self.deadline = Deadline(config.time_limit, config.on_deadline)
        self.timeline = Timeline(started, clock=time.monotonic)
        self._progress = progress
        self._logs = logs
        self._started = started
        self._plan = Plan((), (), 0)
        self._steering: Steering | None = None
        self._stands_s = 0.0
        self._fingerprint: Fingerprint | None = None
        self._resumed = 0
        self._next_index = 0
        self._extra: dict[str, float] | None = None
        self._lengths = np.zeros(0, dtype=np.int64)
        if self.strategy is not None:
            progress.note(self.strategy.why)

    def read(self) -> None:
        """Read the test set and render its texts."""
        task, width = self.config.task, self.job.width(self.config.task)
        self.examples: Examples = read_examples(self.job.test_set, task)
        self._texts = self._render(self.examples)
        ids, kept = self.examples.ids, self.examples.kept
        self.merger = Merger(ids, width, task.head)
        self.deadline.rehearsed(
            rehearse(self.config.output, ids, task=task, width=width, kept=kept)
        )

    def tokens(self, examples: Examples, executor: "Executor") -> TokenTable | None:
        """Return the token ids of all rows, made while workers start; None where time is over."""
        texts = self._texts if examples is self.examples else self._render(examples)
        tokenizing = _in_background(lambda: self._tokenize(texts))
        while not tokenizing.done():
            executor.poll()
            time.sleep(0.05)
            if self.deadline.is_over(self.now()):
                return None
        return tokenizing.result()

    def _render(self, examples: Examples) -> list[str]:
        config = self.config
        return render_prompts(examples, text_format=config.text_format, task=config.task)

    def _tokenize(self, texts: list[str]) -> TokenTable:
        def count(rows: int) -> None:
            done = rows == len(texts)
            self._progress.stage(
                "starting, loading and compiling"
                if done
                else f"tokenizing {rows:,}/{len(texts):,} rows"
            )

        preset = self.job.preset
        with self.timed("tokenize"):
            tokens = tokenize(
                texts,
                preset.tokenizer,
                sequence_length=self.config.sequence_length,
                on_progress=count,
            )
        largest = int(tokens.values.max(initial=tokens.pad_id))
        if largest >= preset.shape.vocabulary_size:
            raise DataError(
                f"{preset.tokenizer.vocabulary} does not belong to the backbone: expected token "
                f"ids below {preset.shape.vocabulary_size}. Received: {largest}"
            )
        return tokens

    def open_executor(self) -> "Executor":
        config, progress = self.config, self._progress
        progress.stage("starting")
        if config.mode == "single" or not self.examples:
            from runner.single import InProcess

            return InProcess(verbose=config.verbose, progress=progress, timeline=self.timeline)
        from runner.dispatch import RayReplicas

        return RayReplicas(
            num_workers=config.num_workers,
            verbose=config.verbose,
            log_folder=self._logs.folder,
            progress=progress,
            timeline=self.timeline,
            strategy=self.strategy,
            group_size=config.members,
            family=self.job.preset.class_name,
            left_s=lambda: self.deadline.left_s(self.now()),
            address=config.address,
        )

    @contextmanager
    def open_journal(self, dtype: str) -> Iterator[None]:
        """Take up the journal or start one; errors within say what is safe in it."""
        config, examples = self.config, self.examples
        self._fingerprint = self.job.fingerprint(config, dtype, examples.ids, self._texts)
        journal = Journal.open(
            config.journal_path,
            fingerprint=self._fingerprint,
            ids=examples.ids,
            classes=self.job.width(config.task),
            resume=config.resume,
            head=config.task.head,
        )
        try:
            for note in journal.notes:
                self._progress.note(note)
            self._take_up(journal)
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted. {self._how_to_resume()}") from None
        except (WorkerError, DeadlineError) as error:
            raise type(error)(f"{error}\n{self._how_to_resume()}") from error
        except OSError as error:
            journal.check()
            raise ArenaRunnerError(
                f"{type(error).__name__}: {error}\n{self._how_to_resume()}"
            ) from error
        finally:
            journal.close(keep_empty=False)

    def _take_up(self, journal: Journal) -> None:
        """Take over the rows that are done."""
        self.journal, done = journal, journal.done()
        ways = np.array(done.how, dtype=object)
        for how in sorted(set(done.how) - {FILLED}):
            these = ways == how
            self.merger.add(
                done.rows[these].tolist(),
                done.probabilities[these],
                how=how,
                lengths=done.lengths[these],
            )
        self._resumed = len(self.examples) - len(self.merger.unfinished())

    def predict(self, executor: "Executor", tokens: TokenTable) -> None:
        """Predict the rows that have no full answer yet, for as long as there is time: where it
        may be short, first those that have none at all."""
        config, preset, lengths = self.config, self.job.preset, tokens.lengths
        self._lengths = lengths
        may_be_short = self.deadline.limit_s is not None and self.deadline.policy != "fail"
        rows = self.merger.missing() if may_be_short else self.merger.unfinished()
        self._plan = self._plan_rows(executor, lengths, rows)
        cost = preset.shape.batch_flops
        backlog = Backlog(self._plan.batches, cost=cost)
        rates = Rates(cost, compiling_takes=COMPILING_TAKES if executor.kind == "cpu" else 0.0)
        longest = int(lengths[self.merger.unfinished()].max(initial=1))
        sees_padding = config.pooling == "padded-mean"
        top = config.sequence_length if sees_padding else min(longest, config.sequence_length)
        floor = min(config.floor_length, top)
        self._steering = steering = Steering(
            backlog,
            rates,
            executor,
            merger=self.merger,
            journal=self.journal,
            progress=self._progress,
            deadline=self.deadline,
            lengths=lengths,
            replan=lambda rows, cap, shapes: self._plan_rows(
                executor, lengths, rows, cap=cap, known=[*self._plan.shapes, *shapes]
            ),
            caps=lengths_to_cut_to(
                floor,
                top,
                multiple_of=BUCKET_MULTIPLES[executor.kind],
                others=(shape.length for shape in self._plan.shapes),
            ),
            full_length=config.sequence_length if sees_padding else None,
            started=self._started,
            clock=time.monotonic,
        )
        self._progress.expect(rows=len(lengths), done=len(lengths) - len(rows))
        if not backlog:
            steering.improve()
        results = executor.run(backlog, tokens, rates=rates, ids=self.examples.ids)
        for result in results:
            if result is not None:
                steering.take(result)
            if not steering.tick():
                break
        results.close()
        self._next_index = backlog.next_index

    def _plan_rows(
        self,
        executor: "Executor",
        lengths: np.ndarray,
        rows: Sequence[int],
        *,
        cap: int | None = None,
        known: Sequence[BatchShape] = (),
    ) -> Plan:
        return plan_run(
            lengths,
            self.config,
            self.job.preset,
            kind=executor.kind,
            replicas=executor.replicas,
            rows=rows,
            cap=cap,
            known=known,
        )

    def repeat_broken_rows(self, executor: "Executor") -> None:
        """Predict rows that came out as NaN or infinity again, in float32."""
        broken = self._steering.broken if self._steering is not None else []
        if not broken:
            return
        executor.faults.nonfinite_rows += len(broken)
        named = list_ids(self.examples.ids, broken)
        self._progress.note(
            f"warning: {len(broken)} rows came out as NaN or infinity ({named}); "
            "predicted again in float32",
            event="fault",
            rows=len(broken),
        )
        self._progress.stage(f"predicting {len(broken)} rows again in float32")
        for start in range(0, len(broken), ROWS_IN_FLOAT):
            rows = broken[start : start + ROWS_IN_FLOAT]
            within_s = self.deadline.left_s(self.now())
            if within_s <= 0:
                return
            lengths = self._lengths[rows]
            length = int(lengths.max())
            if self.config.pooling == "padded-mean":
                length = self.config.sequence_length
            batch = Batch(0, tuple(rows), BatchShape(len(rows), max(1, length)))
            try:
                values = executor.predict_in_float(batch, within_s=within_s)
            except WorkerError as error:
                self._progress.note(f"warning: that failed: {error}")
                return
            finite = np.isfinite(values).all(axis=1)
            mended = [row for row, is_one in zip(rows, finite, strict=True) if is_one]
            if mended:
                said = lengths[finite].tolist()
                self.journal.add(mended, values[finite], how=WIDER, worker="", lengths=said)
                self.merger.add(mended, values[finite], how=WIDER, lengths=said, again=True)

    def fill(self, journal: Journal | None) -> None:
        """Give rows without an answer the fallback, or end the run where that is not wanted.

        Args:
            journal: takes them too, if it is there.

        Raises:
            DeadlineError: the time is over and --on-deadline is fail.
            WorkerError: no row at all has an answer though there was time.
        """
        missing = self.merger.missing()
        over = self.deadline.is_over(self.now())
        unfinished = self.merger.unfinished()
        if over and unfinished and self.deadline.policy == "fail":
            raise DeadlineError(
                f"The time limit came with {len(unfinished):,} of {len(self.examples):,} rows not "
                "predicted; --on-deadline fail writes no submission then."
            )
        if not missing:
            return
        if not over and len(missing) == len(self.examples):
            raise WorkerError(
                f"No row has an answer: all {len(missing):,} came out as NaN or infinity, or could "
                "not be computed. If the dtype is float16, try --dtype bfloat16 or float32; else "
                "look at the weights and the head."
            )
        fallback = self.config.fallback_probabilities
        values = np.asarray(fallback) if fallback is not None else self.merger.mean()
        table, none = np.tile(values, (len(missing), 1)), [0] * len(missing)
        if journal is not None:
            journal.add(missing, table, how=FILLED, worker="", lengths=none)
        self.merger.add(missing, table, how=FILLED, lengths=none, again=True)
        said = f"have no answer of the model and get the fallback {_some(values)}"
        if over:
            self.deadline.note(self.now(), f"{len(missing):,} rows {said}")
        named = list_ids(self.examples.ids, missing)
        self._progress.note(f"warning: {len(missing):,} rows ({named}) {said}")

    def write(self) -> None:
        """Write the submission as it is now, and note when it stood."""
        with self.timed("merge"):
            write_submission(
                self.config.output,
                self.examples.ids,
                self.merger.finish(),
                task=self.config.task,
                kept=self.examples.kept,
            )
        self._stands_s = self.now()

    def rows_to_improve(self) -> list[int]:
        """Return the rows that an extra pass is asked for, the most uncertain first."""
        return rows_to_swap(self.merger) if self.config.extra_passes == "swap" else []

    def improve(self, executor: "Executor") -> None:
        """Use the time that is left for an extra pass, and write what came of it, whatever ends
        it."""
        rows, began = self.rows_to_improve(), self.now()
        if not rows or self.deadline.is_over(began):
            return
        self._progress.stage("tokenizing rows with their responses swapped")
        task, predict_s = self.config.task, executor.predict_s
        tokens = self.tokens(swap(self.examples, task), executor)
        if tokens is None:
            return
        lengths, cost = tokens.lengths, self.job.preset.shape.batch_flops
        batches = in_waves(
            rows,
            lambda wave: self._plan_rows(executor, lengths, wave, known=self._plan.shapes),
        )
        try:
            predict_swapped(
                executor,
                tokens,
                list(batches),
                labels=task.swapped_labels,
                merger=self.merger,
                journal=self.journal,
                deadline=self.deadline,
                progress=self._progress,
                cost=cost,
                first_index=self._next_index,
                now=self.now,
                write=self.write,
            )
        finally:
            averaged = self.merger.how.count(SWAPPED)
            self._extra = {"rows": averaged, "seconds": round(self.now() - began, 4)}
            executor.predict_s = predict_s
            self.write()

    def measure_quantization(self, executor: "Executor") -> dict[str, Any] | None:
        """Return how far quantization moved the first rows, or what its preparation measured."""
        preset, mode = self.job.preset, self.job.quantization
        if preset.quantization is not None:
            return {"mode": preset.quantization, **preset.accuracy}
        if mode is None or self._steering is None:
            return None
        first = list(range(min(len(self.examples), ROWS_IN_FLOAT)))
        if self.deadline.limit_s is not None or any(
            self.merger.how[row] != PREDICTED for row in first
        ):
            return {"mode": mode, "measured": "not in this run: its time or its rows were cut"}
        self._progress.stage("the submission is written; comparing its first rows with float32")
        started = time.monotonic()
        batch = reference_batch(
            self._lengths,
            pooling=self.config.pooling,
            sequence_length=self.config.sequence_length,
        )
        try:
            reference = executor.predict_in_float(batch, within_s=float("inf"))
        except WorkerError as error:
            # The submission stands; a worker without memory for this costs the figure alone.
            return {"mode": mode, "measured": f"it failed: {first_line(error)}"}
        figures = compare(
            self.merger.probabilities(batch.rows),
            reference,
            seconds=time.monotonic() - started,
            head=self.config.task.head,
        )
        return {"mode": mode, **figures}

    def last_call(self, *, is_starting: bool = False) -> float | None:
        """Return when the run is ended whatever it does, by `time.monotonic()`."""
        last_call_s = self.deadline.last_call_s(is_starting=is_starting)
        return None if last_call_s is None else self._started + last_call_s

    def end_without(self, executor: "Executor") -> int:
        """Write the submission although the run is inside something that does not end; return the
        exit code. Runs in a thread of its own, after which the process ends."""
        self._logs.release()
        where = "the run had not come to its end and was ended"
        self._progress.note(f"deadline: {self.deadline.note(self.now(), where)}")
        try:
            self.fill(None)
        except DeadlineError as error:
            self._progress.note(f"error: {error}\n{self._how_to_resume()}", event="end")
            return EXIT_DEADLINE
        self.write()
        print(say_summary(self.write_reports(executor, None), self.config))
        return 0

    def write_reports(
        self, executor: "Executor", quantization: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Write the report and how each row was made; return the report."""
        report = self.report(executor, quantization)
        try:
            write_report(self.config.report_path, report)
            write_rows(self.config.rows_path, self.merger, id_column=self.config.task.id_column)
        except OSError as error:
            self._progress.note(f"warning: the submission stands; its report does not: {error}")
        for what, path, write in (
            ("trace", self.config.trace_path, self._write_trace),
            ("page", self.config.page_path, self._write_page),
        ):
            if failure := try_to_write(what, path, partial(write, path, report)):
                self._progress.note(f"warning: {failure}")
        return report

    def _write_trace(self, path: Path, report: dict[str, Any]) -> None:
        from runner.trace import make_trace, write_trace

        timeline = self.timeline
        events = make_trace(
            timeline.spans,
            timeline.stages,
            [
                *timeline.events,
                *(Event(float(one["at_s"]), str(one["what"])) for one in self.deadline.events),
            ],
            devices={
                (worker["replica"], worker["member"]): worker["device"]
                for worker in report["workers"]
            },
            noun="group" if self.strategy else "worker",
        )
        write_trace(path, events)

    def _write_page(self, path: Path, report: dict[str, Any]) -> None:
        from runner.report_page import Story, write_page  # matplotlib takes half a second

        own = [row for row, how in enumerate(self.merger.how) if how not in ("", FILLED)]
        columns = self.merger.probabilities([]).shape[1]
        # Embeddings have thousands of columns: some rows say what they look like.
        every = max(1, len(own) * columns // MOST_VALUES)
        story = Story(
            report=report,
            spans=self.timeline.spans,
            stages=self.timeline.stages,
            events=self.timeline.events,
            lengths=self._lengths if self._lengths.size else self.merger.lengths,
            values=self.merger.probabilities(own[::every]),
            every=every,
            # Of embeddings, the numbers by their places.
            labels=self.config.task.label_columns or [*map(str, range(columns))],
            summary=what_happened(report),
        )
        write_page(path, story)

    def report(self, executor: "Executor", quantization: dict[str, Any] | None) -> dict[str, Any]:
        """Return the run's report."""
        steering = self._steering
        self.seconds |= {
            "start_workers": executor.start_workers_s,
            "load": max((worker.load_s for worker in executor.stats), default=0.0),
            "compile": max((worker.compile_s for worker in executor.stats), default=0.0),
            "predict": executor.predict_s,
            "total": self.now(),
        }
        how = self.merger.how
        filled, shortened = how.count(FILLED), how.count(SHORTENED)
        resumed = self._resumed
        real = steering.real_tokens if steering else 0
        return make_report(
            self.config,
            fingerprint=self._fingerprint.digest if self._fingerprint else None,
            rows={
                "total": len(how),
                "predicted": len(how) - filled - shortened - resumed,
                "resumed": resumed,
                "shortened": shortened,
                "filled": filled,
            },
            real_tokens=real,
            padded_tokens=steering.padded_tokens if steering else 0,
            answered=steering.answered if steering else 0,
            model_flops=_model_flops(self.job.preset, steering.lengths_done) if steering else 0.0,
            seconds=self.seconds,
            info=executor.info,
            workers=executor.stats if self.examples and executor.info else [],
            faults=executor.faults if executor.info else Faults(),
            plan=self._describe(executor),
            strategy=self.strategy,
            quantization=quantization,
            deadline={
                "limit_s": self.deadline.limit_s,
                "finished_s": round(self._stands_s, 4),
                "slack_s": None
                if self.deadline.limit_s is None
                else round(self.deadline.limit_s - self._stands_s, 4),
                "events": self.deadline.events,
            },
            forecasts=steering.forecasts if steering else [],
            extra_passes=self._extra,
            journal={
                "path": str(self.config.journal_path),
                "seconds": round(steering.journal_s, 4) if steering else 0.0,
            },
        )

    def figures(self, executor: "Executor") -> Figures:
        """Return how the run stands, from any thread."""
        how, steering = self.merger.how, self._steering
        return Figures(
            build=versions() | {"mode": self.config.mode},
            standing=self._progress.standing(),
            rows={
                "total": len(how),
                "done": len(how) - how.count(""),
                "resumed": self._resumed,
                "shortened": how.count(SHORTENED),
                "filled": how.count(FILLED),
            },
            real_tokens=steering.real_tokens if steering else 0,
            padded_tokens=steering.padded_tokens if steering else 0,
            workers=executor.stats,
            faults=executor.faults,
        )

    def now(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self._started

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self.timeline.stage(STAGES.get(name, name)):
            yield
        self.seconds[name] += time.monotonic() - started

    def _describe(self, executor: "Executor") -> dict[str, Any]:
        plan = self._plan
        return {
            "batches": len(plan.batches),
            "predicted_padding": 1 - plan.real_tokens / plan.padded_tokens
            if plan.batches
            else None,
            "shapes": [asdict(shape) for shape in plan.shapes],
            "copied_batches": executor.copied_batches,
        }

    def _how_to_resume(self) -> str:
        if not len(self.journal):
            return "No row is done yet; the same command goes on from the start."
        return (
            f"{len(self.journal):,} of {len(self.examples):,} rows are safe in "
            f"{self.config.journal_path}; the same command goes on from there."
        )


def try_to_write(what: str, path: Path, write: Callable[[], None]) -> str | None:
    """Write a file that no run is to fail for, or wait for long; return what went wrong."""
    try:
        _in_background(write, name=what).result(timeout=PAGE_WITHIN_S)
    except Exception as error:  # whatever it is, the answers are there
        why = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        with suppress(OSError):
            path.unlink(missing_ok=True)  # an older run's would be taken for this one's
        return f"the submission stands; its {what} does not: {why}"
    return None


def _in_background(work: Callable[[], T], name: str = "tokenize") -> "Future[T]":
    """Run `work` in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True, name=name).start()
    return future


def _some(values: np.ndarray) -> str:
    """Name the first of a row's numbers: an embedding has thousands."""
    named = ", ".join(f"{value:.4f}" for value in values[:MOST_NAMED])
    return named + (", ..." if len(values) > MOST_NAMED else "")


def _model_flops(preset: Preset, lengths: np.ndarray) -> float:
    """FLOPs that the real tokens need, padding left out."""
    shape = preset.shape
    per_token = float(lengths.sum()) * shape.flops_per_token
    return per_token + float((lengths.astype(float) ** 2).sum()) * shape.attention_flops(1)
