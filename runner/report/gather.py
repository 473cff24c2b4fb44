"""The outcome of a run -> its report, page and trace on disk, and its figures at any moment.

The driver updates an `Outcome` during the run. Facts about the executor and the deadline arrive as
plain records.
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
from runner.common.records import Computed, Faults, Tally, WorkerStats
from runner.common.versions import versions
from runner.config.run_config import RunConfig
from runner.report.facts import what_happened, write_report, write_rows
from runner.results.table import FILLED, SHORTENED, Merger
from runner.telemetry.metrics import Figures
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Event, Timeline
from sharding.batches import Plan
from sharding.costs import ModelShape
from sharding.strategies import Strategy

SCHEMA = 1
# The most seconds that a run waits for the trace, and for the page.
PAGE_WITHIN_S = 60.0
# The most numbers that a page's charts are drawn from.
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

    seconds: of each phase of the driver. limit_s, events: of the deadline; `events` grows during
    the run. now: returns the seconds since the process started.
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
        """Write the report, the table of rows, the trace and the page; return the report.

        A file that cannot be written causes only a warning.
        """
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

    def report(
        self, computed: Computed, quantization: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the report of the run so far. Durations are in seconds.

        `forecasts` are pairs: seconds since the start, and the total seconds forecast then.
        """
        config, outcome, strategy = self.config, self.outcome, self.strategy
        tally, rows, info = outcome.tally, self._rows(), computed.info
        workers = computed.stats if rows["total"] and info else []
        self.seconds.update(
            start_workers=computed.start_workers_s,
            load=max((worker.load_s for worker in computed.stats), default=0.0),
            compile=max((worker.compile_s for worker in computed.stats), default=0.0),
            predict=computed.predict_s,
            total=self.now(),
        )
        unlike = rows["resumed"] + rows["shortened"] + rows["filled"]
        return {
            "schema": SCHEMA,
            "config": config.as_json(),
            "versions": versions(),
            "fingerprint": outcome.fingerprint,
            "mode": config.mode,
            "strategy": strategy.name if strategy else None,
            "rows": {"total": rows["total"], "predicted": rows["total"] - unlike, **rows},
            "tokens": {"real": tally.real_tokens, "padded": tally.padded_tokens},
            "seconds": {key: round(value, 4) for key, value in self.seconds.items()},
            "rates": self._rates(computed, len(workers)),
            "workers": [asdict(worker) for worker in workers],
            "faults": asdict(computed.faults if info else Faults()),
            "deadline": self._describe_deadline(),
            "forecasts": tally.forecasts,
            "extra_passes": outcome.extra_passes,
            "journal": {"path": str(config.journal_path), "seconds": round(tally.journal_s, 4)},
            "model": asdict(info) if info else None,
            "quantization": quantization,
            "plan": self._describe_plan(computed),
            "group": _describe_group(strategy, workers) if strategy and workers else None,
        }

    def _rows(self) -> dict[str, int]:
        how = self.table.how
        return {
            "total": len(how),
            "resumed": self.outcome.resumed,
            "shortened": how.count(SHORTENED),
            "filled": how.count(FILLED),
        }

    def _rates(self, computed: Computed, workers: int) -> dict[str, float | None]:
        """Return rates over the seconds of predicting, of the rows answered in this run.

        `mfu` divides the model FLOPs of real tokens by what all workers' devices reached in a large
        matmul, measured in this run.
        """
        tally, predict_s, info = self.outcome.tally, computed.predict_s, computed.info
        if not predict_s:
            return dict.fromkeys(("rows_per_s", "tokens_per_s", "model_flops_per_s", "mfu"))
        flops_per_s = self.shape.rows_flops(tally.lengths_done) / predict_s
        peak = info.matmul_flops_per_s * workers if info else 0.0
        return {
            "rows_per_s": tally.answered / predict_s,
            "tokens_per_s": tally.real_tokens / predict_s,
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / peak if flops_per_s and peak else None,
        }

    def _describe_deadline(self) -> dict[str, Any]:
        limit_s, stands_s = self.limit_s, self.outcome.stands_s
        return {
            "limit_s": limit_s,
            "finished_s": round(stands_s, 4),
            "slack_s": None if limit_s is None else round(limit_s - stands_s, 4),
            "events": self.events,
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


def _describe_group(strategy: Strategy, workers: Sequence[WorkerStats]) -> dict[str, Any]:
    """Return why this strategy, what its members exchange, and how idle they were."""
    alive_s = sum(worker.busy_s + worker.idle_s for worker in workers)
    return {
        "why": strategy.why,
        "stages": [asdict(stage) for stage in strategy.stages],
        "bytes_between_members_per_token": strategy.bytes_per_token,
        "idle_share": sum(worker.idle_s for worker in workers) / alive_s if alive_s else None,
    }


def try_to_write(what: str, path: Path, write: Callable[[], None]) -> str | None:
    """Write an optional file; return what went wrong, if anything. Never fails the run, and delays
    it by `PAGE_WITHIN_S` at most."""
    try:
        in_background(write, name=what).result(timeout=PAGE_WITHIN_S)
    except Exception as error:  # whatever it is, the submission is already written
        why = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        with suppress(OSError):
            path.unlink(missing_ok=True)  # a file of an older run would be misleading
        return f"{NOT_WRITTEN.format(what)}: {why}"
    return None
