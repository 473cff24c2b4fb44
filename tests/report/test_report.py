"""The report and its summary, of runs that ended early, that had faults, that were late."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from runner.common.records import Computed, Faults, WorkerInfo, WorkerStats
from runner.config.run_config import RunConfig
from runner.report.facts import describe_devices, say_summary, what_happened
from runner.report.gather import Outcome, Reports
from runner.results.table import FILLED, Merger
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline
from sharding.costs import ModelShape
from sharding.strategies import Strategy
from tests.support import stories

INFO = WorkerInfo("cpu", "cpu, cores 0", "float32", 9_000_000, 400_000_000, 5.0, 1e11, "chunked")
SHAPE = ModelShape(
    vocabulary_size=256, num_layers=2, hidden_dim=8, num_query_heads=1, num_key_value_heads=1,
    head_dim=8, intermediate_dim=16,
)  # fmt: skip
NO_PREDICTION = "The fallback fills 10 rows without a prediction."


def early_report(config, strategy=None, *, loaded=False):
    """Return the report of a run whose time was over before its first batch."""
    table = Merger([str(row) for row in range(10)], 3)
    table.add(range(10), np.full((10, 3), 1 / 3), how=FILLED, lengths=[0] * 10)
    workers = [WorkerStats(replica=0), WorkerStats(replica=1)]
    reports = Reports(
        config=config,
        strategy=strategy,
        shape=SHAPE,
        table=table,
        outcome=Outcome(rows=10, fingerprint="0" * 64, stands_s=30.0),
        seconds={"merge": 0.1},
        timeline=Timeline(),
        progress=Progress(),
        limit_s=31.0,
        events=[],
        now=lambda: 30.0,
    )
    return reports.report(Computed(info=INFO, stats=workers) if loaded else Computed())


@pytest.mark.parametrize("strategy", [None, "pipeline", "tensor"])
@pytest.mark.parametrize("loaded", [False, True], ids=["starting", "loaded"])
def test_time_over_before_the_first_batch(strategy, loaded):
    """However far the workers had come when the limit was there, the run ends with its summary."""
    config = RunConfig(mode="model-parallel" if strategy else "data-parallel", output=Path("s.csv"))
    chosen = Strategy(strategy, "as asked", 256) if strategy else None
    report = early_report(config, chosen, loaded=loaded)
    lines = say_summary(report, config).splitlines()
    group = f"{strategy}: the members hold 0, 0 MB of weights"
    assert lines[0] == (
        "10 rows -> s.csv in 30.0 s (predicting 0.0 s, merging 0.1 s, all else 29.9 s)"
    )
    assert lines[1:-2] == [
        *([group] if strategy and loaded else []),
        NO_PREDICTION,
        "The submission was written 1.0 s before the time limit of 31 s.",
    ]
    counts = {"total": 10, "predicted": 0, "resumed": 0, "shortened": 0, "filled": 10}
    assert report["rows"] == counts
    assert report["deadline"]["slack_s"] == 1.0
    assert (report["group"] is not None) == (strategy is not None and loaded)
    assert report["rates"] == dict.fromkeys(report["rates"]), "no rate of no prediction"


def test_the_summary_as_json():
    config = RunConfig(log_format="json", output=Path("s.csv"))
    said = json.loads(say_summary(early_report(config), config))
    assert NO_PREDICTION in said["message"]
    assert (said["output"], said["rows"]["filled"]) == ("s.csv", 10)


def test_the_journal_in_the_report():
    config = RunConfig(output=Path("s.csv"))
    assert early_report(config)["journal"] == {"path": str(config.journal_path), "seconds": 0.0}


class TestWhatHappened:
    def about(self, *, pooling="mean", limit_s=None, slack_s=None, extra=None, rows=(), faults=()):
        report = stories.make_report()
        report["config"]["pooling"] = pooling
        report["rows"] = {"resumed": 0, "shortened": 0, "filled": 0} | dict(rows)
        report["deadline"] = {"limit_s": limit_s, "slack_s": slack_s}
        return what_happened(
            report | {"extra_passes": extra, "faults": asdict(Faults()) | dict(faults)}
        )

    def test_nothing(self):
        assert self.about() == []

    def test_rows(self):
        assert self.about(rows={"resumed": 1, "shortened": 1200, "filled": 1}) == [
            "The journal already had 1 finished row.",
            "1,200 rows used fewer tokens than asked for.",
            "The fallback fills 1 row without a prediction.",
        ]

    def test_shortened_rows_that_are_pooled_over_the_padding(self):
        (said,) = self.about(rows={"shortened": 2}, pooling="padded-mean")
        assert said.endswith("so pooling used a length that the head was not trained with.")

    @pytest.mark.parametrize(
        ("slack_s", "said"), [(2.0, "2.0 s before"), (0.0, "0.0 s before"), (-3.5, "3.5 s after")]
    )
    def test_a_submission_that_is_late_is_not_called_early(self, slack_s, said):
        assert self.about(limit_s=60.0, slack_s=slack_s) == [
            f"The submission was written {said} the time limit of 60 s."
        ]

    def test_extra_passes_count_rows_of_earlier_runs(self):
        (said,) = self.about(extra={"rows": 5, "seconds": 2.0})
        assert said == (
            "Averaged 5 rows with predictions for swapped responses; this run spent 2.0 s on it."
        )

    def test_faults(self):
        """Batches that did not fit are among those retried, and are not counted twice."""
        found = {"worker_deaths": 1, "hangs": 2, "retried_batches": 3, "memory_splits": 2}
        again = "their rows were queued again unless given up."
        assert self.about(faults=found) == [
            "1 worker died; the run went on.",
            "2 workers hung; the run went on.",
            f"1 batch failed; {again}",
            f"2 batches did not fit in device memory; {again}",
        ]

    def test_batches_that_did_not_fit_are_no_others(self):
        (said,) = self.about(faults={"retried_batches": 2, "memory_splits": 2})
        assert "device memory" in said

    def test_rows_that_could_not_be_computed(self):
        assert self.about(faults={"nonfinite_rows": 2, "quarantined_rows": 1}) == [
            "2 rows came out as NaN or infinity at first.",
            "1 row could not be computed; warnings during the run name them.",
        ]


def test_devices_of_a_mixed_cluster_are_all_named():
    workers = [{"device": device} for device in ("A100, 0", "H100, 0", "A100, 1", "")]
    assert describe_devices(workers) == "2 x A100 and 1 x H100"
