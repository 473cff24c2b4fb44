"""The report and its few lines, of runs that ended early."""

from pathlib import Path

import pytest

from runner.common.records import Faults, WorkerInfo, WorkerStats
from runner.config.run_config import RunConfig
from runner.report.facts import make_report, say_summary
from sharding.strategies import Strategy

INFO = WorkerInfo("cpu", "cpu, cores 0", "float32", 9_000_000, 400_000_000, 5.0, 1e11, "chunked")


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (None, "10 rows have no answer"),
        (Strategy("pipeline", "as asked", 256), "pipeline: the members hold 0, 0 MB of weights"),
        (Strategy("tensor", "as asked", 256), "tensor: the members hold 0, 0 MB of weights"),
    ],
)
@pytest.mark.parametrize("loaded", [False, True], ids=["starting", "loaded"])
def test_time_over_before_the_first_batch(strategy, said, loaded):
    """However far the workers had come when the limit was there, the run ends with its summary."""
    config = RunConfig(mode="model-parallel" if strategy else "data-parallel", output=Path("s.csv"))
    report = make_report(
        config,
        fingerprint="0" * 64,
        rows={"total": 10, "predicted": 0, "resumed": 0, "shortened": 0, "filled": 10},
        answered=0,
        real_tokens=0,
        padded_tokens=0,
        model_flops=0.0,
        seconds={"total": 30.0, "predict": 0.0, "merge": 0.1},
        info=INFO if loaded else None,
        workers=[WorkerStats(replica=0), WorkerStats(replica=1)] if loaded else [],
        faults=Faults(),
        plan={"batches": 2, "predicted_padding": 0.1, "shapes": [], "copied_batches": 0},
        deadline={"limit_s": 31.0, "finished_s": 30.0, "slack_s": 1.0, "events": []},
        forecasts=[],
        extra_passes=None,
        journal={"path": "s.csv.journal", "seconds": 0.0},
        strategy=strategy,
        quantization=None,
    )
    text = say_summary(report, config)
    assert "10 rows -> s.csv in 30.0 s" in text
    if loaded or strategy is None:
        assert said in text
