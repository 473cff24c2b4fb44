"""The outcome of a run -> its report, page and trace on disk, and its figures at any moment.

The driver updates an `Outcome` during the run. What the executor and the deadline have to say
arrives as plain facts.
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
from runner.common.records import Computed, Faults, Tally
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

# Seconds that the trace and the page may each take; a run waits no longer for them.
PAGE_WITHIN_S = 60.0
# Numbers that a page's charts are drawn from, at most.
MOST_VALUES = 5_000_000
NOT_WRITTEN = "the submission was written, but its {} was not"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The state of a run: valid at any moment, readable from any thread.

    rows: of the test set. lengths: int64 (rows,), tokens of each row; empty until they are counted.
    in_journal: its length is the number of rows that are safe on disk. stands_s: when the
    submission was last written, in seconds since the process started.
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
class Reports:
    """Writes the reports of one run; made once its rows are read.

    seconds: of each phase of the driver. limit_s, events: of the deadline, whose list of events
    grows during the run. now: returns the seconds since the process started.
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
        """Return the current figures; callable from any thread."""
        tally, rows = self.outcome.tally, self._rows()
        return Figures(
            build=versions() | {"mode": self.config.mode},
            status=self.progress.status(),
            rows=rows | {"done": rows["total"] - self.table.how.count("")},
            real_tokens=tally.real_tokens,
            padded_tokens=tally.padded_tokens,
            workers=computed.stats,
            faults=computed.faults,
        )

    def write(
        self, computed: Computed, quantization: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the report, the table of rows, the trace and the page; return the report. If a file
        cannot be written, say so."""
        config, note = self.config, self.progress.note
        report = self.report(computed, quantization)
        try:
            what = "report"
            write_report(config.report_path, report)
            what = "table of rows"
            write_rows(config.rows_path, self.table, id_column=config.task.id_column)
        except OSError as error:
            note(f"warning: {NOT_WRITTEN.format(what)}: {error}")
        for what, path, write in (
            ("trace", config.trace_path, self._write_trace),
            ("page", config.page_path, self._write_page),
        ):
            if failure := try_to_write(what, path, partial(write, path, report)):
                note(f"warning: {failure}")
        return report

    def report(self, computed: Computed, quantization: dict[str, Any] | None) -> dict[str, Any]:
        """Return the report of the run so far."""
        outcome, limit_s, rows = self.outcome, self.limit_s, self._rows()
        stats, tally = computed.stats, outcome.tally
        self.seconds.update(
            start_workers=computed.start_workers_s,
            load=max((worker.load_s for worker in stats), default=0.0),
            compile=max((worker.compile_s for worker in stats), default=0.0),
            predict=computed.predict_s,
            total=self.now(),
        )
        unlike = rows["resumed"] + rows["shortened"] + rows["filled"]
        return make_report(
            self.config,
            fingerprint=outcome.fingerprint,
            rows={"total": rows["total"], "predicted": rows["total"] - unlike, **rows},
            tally=tally,
            model_flops=self.shape.rows_flops(tally.lengths_done),
            seconds=self.seconds,
            info=computed.info,
            workers=list(stats) if rows["total"] and computed.info else [],
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
            extra_passes=outcome.extra_passes,
        )

    def _rows(self) -> dict[str, int]:
        how = self.table.how
        return {
            "total": len(how),
            "resumed": self.outcome.resumed,
            "shortened": how.count(SHORTENED),
            "filled": how.count(FILLED),
        }

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
            timeline.phases,
            [*timeline.events, *decisions],
            devices={
                (worker["replica"], worker["member"]): worker["device"]
                for worker in report["workers"]
            },
            noun="group" if self.strategy else "worker",
        )
        write_trace(path, events)

    def _write_page(self, path: Path, report: dict[str, Any]) -> None:
        from runner.report.page import Story, write_page  # matplotlib: half a second

        table, lengths = self.table, self.outcome.lengths
        own = [row for row, how in enumerate(table.how) if how not in ("", FILLED)]
        columns = table.probabilities([]).shape[1]
        # Embeddings have thousands of columns: a sample of the rows is enough for charts.
        every = max(1, len(own) * columns // MOST_VALUES)
        story = Story(
            report=report,
            spans=self.timeline.spans,
            phases=self.timeline.phases,
            events=self.timeline.events,
            lengths=lengths if lengths.size else table.lengths,
            values=table.probabilities(own[::every]),
            every=every,
            # Columns of embeddings have no names, only numbers.
            labels=self.config.task.label_columns or [*map(str, range(columns))],
            summary=what_happened(report),
        )
        write_page(path, story)


def try_to_write(what: str, path: Path, write: Callable[[], None]) -> str | None:
    """Write an optional file; return what went wrong. The run neither fails nor waits long."""
    try:
        in_background(write, name=what).result(timeout=PAGE_WITHIN_S)
    except Exception as error:  # whatever it is, the submission is there
        why = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        with suppress(OSError):
            path.unlink(missing_ok=True)  # a file of an older run would be misleading
        return f"{NOT_WRITTEN.format(what)}: {why}"
    return None
