"""What a run has come to -> its report, page and trace on disk, and its figures at any moment.

The driver fills in an `Outcome` as the run goes on. Does not know who computed, nor a deadline's
rules: both come as plain facts.
"""

from collections.abc import Callable, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.background import in_background
from runner.common.errors import first_line
from runner.common.records import Faults, Tally, WorkerInfo, WorkerStats
from runner.common.versions import versions
from runner.config.run_config import RunConfig
from runner.report.facts import make_report, what_happened, write_report, write_rows
from runner.results.table import FILLED, SHORTENED, Merger
from runner.telemetry.metrics import Figures
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Event, Timeline
from sharding.batches import Plan
from sharding.costs import ModelShape
from sharding.strategies import Strategy

# Seconds in which the page must be drawn: no run ends later for it.
PAGE_WITHIN_S = 60.0
# Values that a page's charts are drawn from.
MOST_VALUES = 5_000_000


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run has come to so far: true at any moment, and read from any thread.

    rows: in all. lengths: int64 (rows,), tokens of each, none before they are counted. in_journal:
    as many rows as are safe on disk. stands_s: when the submission was written last, since the
    process started.
    """

    rows: int
    fingerprint: str | None = None
    resumed: int = 0
    in_journal: Sized = ()
    plan: Plan = field(default_factory=lambda: Plan((), (), 0))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tally: Tally = field(default_factory=Tally)
    extra_passes: dict[str, float] | None = None
    stands_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What an executor has to say of itself."""

    info: WorkerInfo | None
    stats: Sequence[WorkerStats]
    faults: Faults
    copied_batches: int
    start_workers_s: float
    predict_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """The reports of one run, from when its rows are read.

    seconds: of the run's own stages. limit_s, events: of the deadline; events are added to.
    now: seconds since the process started.
    """

    config: RunConfig
    strategy: Strategy | None
    shape: ModelShape
    table: Merger
    outcome: Outcome
    seconds: dict[str, float]
    timeline: Timeline
    progress: Progress
    limit_s: float | None
    events: Sequence[dict[str, float | str]]
    now: Callable[[], float]

    def figures(self, computed: Computed) -> Figures:
        """Return how the run stands, from any thread."""
        how, tally = self.table.how, self.outcome.tally
        return Figures(
            build=versions() | {"mode": self.config.mode},
            standing=self.progress.standing(),
            rows={
                "total": len(how),
                "done": len(how) - how.count(""),
                "resumed": self.outcome.resumed,
                "shortened": how.count(SHORTENED),
                "filled": how.count(FILLED),
            },
            real_tokens=tally.real_tokens,
            padded_tokens=tally.padded_tokens,
            workers=computed.stats,
            faults=computed.faults,
        )

    def write(
        self, computed: Computed, quantization: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the report and how each row was made; return the report."""
        config, note = self.config, self.progress.note
        report = self.report(computed, quantization)
        try:
            write_report(config.report_path, report)
            write_rows(config.rows_path, self.table, id_column=config.task.id_column)
        except OSError as error:
            note(f"warning: the submission stands; its report does not: {error}")
        for what, path, write in (
            ("trace", config.trace_path, self._write_trace),
            ("page", config.page_path, self._write_page),
        ):
            if failure := try_to_write(what, path, partial(write, path, report)):
                note(f"warning: {failure}")
        return report

    def report(self, computed: Computed, quantization: dict[str, Any] | None) -> dict[str, Any]:
        """Return the run's report, as of now."""
        outcome, how, stats = self.outcome, self.table.how, computed.stats
        tally, limit_s = outcome.tally, self.limit_s
        self.seconds.update(
            start_workers=computed.start_workers_s,
            load=max((worker.load_s for worker in stats), default=0.0),
            compile=max((worker.compile_s for worker in stats), default=0.0),
            predict=computed.predict_s,
            total=self.now(),
        )
        filled, shortened = how.count(FILLED), how.count(SHORTENED)
        return make_report(
            self.config,
            fingerprint=outcome.fingerprint,
            rows={
                "total": len(how),
                "predicted": len(how) - filled - shortened - outcome.resumed,
                "resumed": outcome.resumed,
                "shortened": shortened,
                "filled": filled,
            },
            real_tokens=tally.real_tokens,
            padded_tokens=tally.padded_tokens,
            answered=tally.answered,
            model_flops=_model_flops(self.shape, tally.lengths_done),
            seconds=self.seconds,
            info=computed.info,
            workers=list(stats) if how and computed.info else [],
            faults=computed.faults if computed.info else Faults(),
            plan=self._describe_plan(computed),
            strategy=self.strategy,
            quantization=quantization,
            deadline={
                "limit_s": limit_s,
                "finished_s": round(outcome.stands_s, 4),
                "slack_s": None if limit_s is None else round(limit_s - outcome.stands_s, 4),
                "events": self.events,
            },
            forecasts=tally.forecasts,
            extra_passes=outcome.extra_passes,
            journal={
                "path": str(self.config.journal_path),
                "seconds": round(tally.journal_s, 4),
            },
        )

    def _describe_plan(self, computed: Computed) -> dict[str, Any]:
        plan = self.outcome.plan
        return {
            "batches": len(plan.batches),
            "predicted_padding": 1 - plan.real_tokens / plan.padded_tokens
            if plan.batches
            else None,
            "shapes": [asdict(shape) for shape in plan.shapes],
            "copied_batches": computed.copied_batches,
        }

    def _write_trace(self, path: Path, report: dict[str, Any]) -> None:
        from runner.report.trace import make_trace, write_trace

        timeline = self.timeline
        decisions = (Event(float(one["at_s"]), str(one["what"])) for one in self.events)
        events = make_trace(
            timeline.spans,
            timeline.stages,
            [*timeline.events, *decisions],
            devices={
                (worker["replica"], worker["member"]): worker["device"]
                for worker in report["workers"]
            },
            noun="group" if self.strategy else "worker",
        )
        write_trace(path, events)

    def _write_page(self, path: Path, report: dict[str, Any]) -> None:
        from runner.report.page import Story, write_page  # matplotlib takes half a second

        table, lengths = self.table, self.outcome.lengths
        own = [row for row, how in enumerate(table.how) if how not in ("", FILLED)]
        columns = table.probabilities([]).shape[1]
        # Embeddings have thousands of columns: some rows say what they look like.
        every = max(1, len(own) * columns // MOST_VALUES)
        story = Story(
            report=report,
            spans=self.timeline.spans,
            stages=self.timeline.stages,
            events=self.timeline.events,
            lengths=lengths if lengths.size else table.lengths,
            values=table.probabilities(own[::every]),
            every=every,
            # Of embeddings, the numbers by their places.
            labels=self.config.task.label_columns or [*map(str, range(columns))],
            summary=what_happened(report),
        )
        write_page(path, story)


def try_to_write(what: str, path: Path, write: Callable[[], None]) -> str | None:
    """Write a file that no run is to fail for, or wait for long; return what went wrong."""
    try:
        in_background(write, name=what).result(timeout=PAGE_WITHIN_S)
    except Exception as error:  # whatever it is, the answers are there
        why = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        with suppress(OSError):
            path.unlink(missing_ok=True)  # an older run's would be taken for this one's
        return f"the submission stands; its {what} does not: {why}"
    return None


def _model_flops(shape: ModelShape, lengths: np.ndarray) -> float:
    """FLOPs that the real tokens need, padding left out."""
    per_token = float(lengths.sum()) * shape.flops_per_token
    return per_token + float((lengths.astype(float) ** 2).sum()) * shape.attention_flops(1)
