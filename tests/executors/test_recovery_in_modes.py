"""Rows and batches that fail, in every mode: what `test_faults.py` does with processes, simulated.

The faults are those of `runner/model/injected_faults.py`, struck in the real actor shells; the
answers are worked out by hand.
"""

import re

import numpy as np
import pytest

from runner.common.errors import WorkerError
from tests.conftest import TOLERANCE
from tests.support.simulated_ray import Command, Job, SimulatedReplica

MODES = {
    "single": ("--mode", "single"),
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline"),
    "tensor": ("--mode", "model-parallel", "--strategy", "tensor"),
}
# Where a worker is a process of its own.
WITH_WORKERS = ("data-parallel", "pipeline", "tensor")
# Of the test set's 40: neither the longest nor the shortest, and both in one batch with others.
ROW, OTHER = 7, 9


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def command(job, tmp_path, monkeypatch, capsys):
    return Command(job, tmp_path, monkeypatch, capsys)


@pytest.fixture
def struck(command):
    """Run in a mode with faults; return what it left, which must have every row."""

    def run(mode, *faults, flags=()):
        done = command(*MODES[mode], "--max-tokens-per-batch", "4096", *flags, faults=faults)
        assert done.code == 0, done.err
        assert done.ids == command.job.ids
        assert sum(done.report["rows"][how] for how in ("predicted", "filled")) == 40
        return done

    return run


def mean_but(job, row):
    return np.delete(job.answers, row, axis=0).mean(axis=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_answers_are_those_worked_out_by_hand(struck, job, mode):
    done = struck(mode)
    assert done.differing(job.answers) == []
    assert done.faults == {}
    assert done.err.count("\n") == (mode in ("pipeline", "tensor")), "the strategy, and no warning"
    assert set(done.rows["how"]) == {"predicted"}
    assert done.rows["tokens"].tolist() == job.lengths.tolist()
    members = 1 if mode == "single" else 2
    assert len(done.report["workers"]) == members
    whole = 40 * (members if mode in ("pipeline", "tensor") else 1)
    assert sum(worker["rows"] for worker in done.report["workers"]) == whole


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_is_short_makes_batches_smaller(struck, job, mode):
    done = struck(mode, {"kind": "memory", "tokens": 2100})
    assert done.differing(job.answers) == []
    found = done.faults
    assert found.pop("retried_batches") >= found.pop("memory_splits") >= 1
    assert not found
    assert "1,024 tokens a batch from now on" in done.err
    assert done.report["rows"]["predicted"] == 40


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_fits_no_device_is_left_out(struck, job, mode):
    done = struck(mode, {"kind": "memory", "rows": [ROW]})
    assert done.differing(job.answers) == [ROW]
    assert done.faults["quarantined_rows"] == 1
    assert done.report["rows"]["filled"] == 1
    assert f"the row of id {job.ids[ROW]} is left out: it does not fit" in done.err
    assert np.abs(done.values[ROW] - mean_but(job, ROW)).max() < TOLERANCE


@pytest.mark.parametrize("mode", WITH_WORKERS)
def test_a_row_that_kills_whoever_takes_it(struck, job, mode):
    done = struck(mode, {"kind": "kill", "rows": [ROW]},
                  flags=("--fallback-probabilities", "0.5,0.25,0.25"))  # fmt: skip
    assert done.differing(job.answers) == [ROW]
    assert done.faults["quarantined_rows"] == 1
    assert done.faults["worker_deaths"] >= 2
    assert done.report["rows"] == {
        "total": 40, "predicted": 39, "resumed": 0, "shortened": 0, "filled": 1,
    }  # fmt: skip
    assert f"the row of id {job.ids[ROW]} is left out: its worker died" in done.err
    assert done.values[ROW].tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_ends_in_an_error(struck, job, mode):
    done = struck(mode, {"kind": "error", "rows": [ROW]})
    assert done.differing(job.answers) == [ROW]
    assert done.faults.pop("quarantined_rows") == 1
    assert "worker_deaths" not in done.faults
    assert "RuntimeError: a fault on purpose" in done.err
    assert done.report["rows"]["filled"] == 1


@pytest.mark.parametrize("mode", MODES)
def test_an_error_that_comes_once_costs_nothing(struck, job, tmp_path, mode):
    done = struck(mode, {"kind": "error", "rows": [ROW], "once": str(tmp_path / "once")})
    assert done.differing(job.answers) == []
    assert done.faults == {"retried_batches": 1}
    assert done.err.count("tried again") == 1


@pytest.mark.parametrize("mode", WITH_WORKERS)
def test_a_worker_that_hangs(struck, job, tmp_path, mode):
    row = int(job.lengths.argmin())  # the last to be computed: what a batch takes is known
    done = struck(mode, {"kind": "hang", "rows": [row], "once": str(tmp_path / "hung")})
    assert done.differing(job.answers) == []
    assert done.report["faults"]["hangs"] + done.report["plan"]["copied_batches"] >= 1
    assert done.report["faults"]["worker_deaths"] == 0
    assert done.report["faults"]["quarantined_rows"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_no_numbers_are_predicted_in_float32(struck, job, mode):
    done = struck(mode, {"kind": "nan", "rows": [ROW, OTHER]})
    assert done.differing(job.answers) == []
    assert done.faults == {"nonfinite_rows": 2}
    assert done.report["rows"]["predicted"] == 40
    assert [row for row, how in enumerate(done.rows["how"]) if how == "wider"] == [ROW, OTHER]


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_stay_no_numbers_get_the_fallback(struck, job, mode):
    done = struck(mode, {"kind": "nan", "rows": [ROW], "wide": True})
    assert done.differing(job.answers) == [ROW]
    assert done.faults == {"nonfinite_rows": 1}
    assert done.report["rows"]["filled"] == 1
    assert np.abs(done.values[ROW] - mean_but(job, ROW)).max() < TOLERANCE
    assert f"id {job.ids[ROW]}" in done.err


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_errors_ends_the_run(command, tmp_path, mode):
    done = command(*MODES[mode], "--max-tokens-per-batch", "4096", faults=[{"kind": "error"}])
    assert done.code == 1
    assert "3 batches failed, the last one batch" in done.err
    assert "RuntimeError: a fault on purpose" in done.err
    assert "No row is done yet" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.glob("s.csv*")) == [tmp_path / "s.csv.logs"]


def test_a_batch_whose_replica_says_why_is_named(command, monkeypatch):
    """In single mode; `test_dispatch.py` has the others."""

    def predict(self, batch):
        raise WorkerError("the device is gone")

    monkeypatch.setattr(SimulatedReplica, "predict", predict)
    done = command(*MODES["single"], "--max-tokens-per-batch", "4096")
    assert done.code == 1
    named = r"batch \d+ \(3 rows: id \d+, \d+, \d+\)"
    assert re.search(rf"error: Worker 0 failed at {named}: the device is gone\n", done.err)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_nan_ends_the_run(command, tmp_path, mode):
    done = command(*MODES[mode], faults=[{"kind": "nan", "wide": True}])
    assert done.code == 1
    assert "error: No row has an answer: all 40 came out as NaN or infinity" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.glob("s.csv*")) == [tmp_path / "s.csv.logs"]
