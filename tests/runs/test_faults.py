"""Whatever fails, finished rows stay finished and the answers are those of an undisturbed run.

Faults are struck on purpose in real processes (`runner/model/injected_faults.py`), kills are real
signals.
"""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from runner.model.injected_faults import VARIABLE
from tests.conftest import LENGTH, REAL_ROWS, SLOW, TOLERANCE, assert_calm

MODES = {
    "single": ("--mode", "single"),
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline"),
    "tensor": ("--mode", "model-parallel", "--strategy", "tensor"),
}
# Where a worker is a process of its own: in single mode it would be the driver that dies, and
# nothing but a time limit leaves a call that hangs.
WITH_WORKERS = ("data-parallel", "pipeline", "tensor")
# Of the test set's 23: neither the longest nor the shortest.
ROW = 7


def slow_but(*fast, modes=tuple(MODES)):
    """All modes, those not named here only in `make test-all`: `make test` has the same faults in
    all modes, struck in a simulation (test_recovery_in_modes.py, test_dispatch.py)."""
    return pytest.mark.parametrize(
        "mode", [mode if mode in fast else pytest.param(mode, marks=pytest.mark.slow)
                 for mode in modes]
    )  # fmt: skip


@pytest.fixture
def struck(models, test_set, predict, reference):
    """Run with faults; return its answer and the undisturbed one, the notebook loop's."""

    def run(mode, *faults, flags=()):
        common = [*models["gemma2"].flags(), "--input", str(test_set), "--pooling", "mean",
                  "--sequence-length", str(LENGTH), "--max-tokens-per-batch", "384"]  # fmt: skip
        ids = pd.read_csv(test_set, dtype=str)["id"].tolist()
        calm = SimpleNamespace(ids=ids, probabilities=reference(models["gemma2"])["raw mean"])
        hit = predict(*MODES[mode], *common, *flags, **{VARIABLE: json.dumps(faults)})
        assert hit.ids == calm.ids
        return hit, calm

    return run


def differing(hit, calm):
    """Rows whose answers are not those of the undisturbed run."""
    far = np.abs(hit.probabilities - calm.probabilities).max(axis=1) > TOLERANCE
    return np.flatnonzero(far).tolist()


def faults_of(answer):
    return {name: count for name, count in answer.report["faults"].items() if count}


def mean_but(calm, row):
    return np.delete(calm.probabilities, row, axis=0).mean(axis=0)


@slow_but("single")
def test_memory_that_is_short_makes_batches_smaller(struck, mode):
    hit, calm = struck(mode, {"kind": "memory", "tokens": 200})
    assert differing(hit, calm) == []
    found = faults_of(hit)
    assert found.pop("retried_batches") >= found.pop("memory_splits") >= 1
    assert not found
    assert "tokens a batch from now on" in hit.stderr
    assert hit.report["rows"]["predicted"] == len(calm.ids)


@slow_but()
def test_a_row_that_fits_no_device_is_left_out(struck, mode):
    hit, calm = struck(mode, {"kind": "memory", "rows": [ROW]})
    assert differing(hit, calm) in ([ROW], [])
    assert hit.report["faults"]["quarantined_rows"] == 1
    assert hit.report["rows"]["filled"] == 1
    assert f"the row of id {calm.ids[ROW]} is left out" in hit.stderr
    assert np.abs(hit.probabilities[ROW] - mean_but(calm, ROW)).max() < TOLERANCE


@slow_but(modes=WITH_WORKERS)
def test_a_row_that_kills_whoever_takes_it(struck, mode):
    hit, calm = struck(mode, {"kind": "kill", "rows": [ROW]},
                       flags=("--fallback-probabilities", "0.5,0.25,0.25"))  # fmt: skip
    assert differing(hit, calm) == [ROW]
    assert hit.report["faults"]["quarantined_rows"] == 1
    assert hit.report["faults"]["worker_deaths"] >= 2
    assert hit.report["rows"] == {
        "total": 23, "predicted": 22, "resumed": 0, "shortened": 0, "filled": 1,
    }  # fmt: skip
    assert f"the row of id {calm.ids[ROW]} is left out: its worker died" in hit.stderr
    assert hit.probabilities[ROW].tolist() == [0.5, 0.25, 0.25]


@slow_but()
def test_a_row_that_ends_in_an_error(struck, mode):
    hit, calm = struck(mode, {"kind": "error", "rows": [ROW]})
    assert differing(hit, calm) in ([ROW], [])
    assert hit.report["faults"]["quarantined_rows"] == 1
    assert "a fault on purpose" in hit.stderr
    assert hit.report["rows"]["filled"] == 1


@slow_but("data-parallel", modes=WITH_WORKERS)
def test_a_worker_that_hangs(struck, tmp_path, mode):
    # The last row to be computed: by then it is known what a batch takes.
    patience = {"kind": "patience", "seconds": 3}
    hang = {"kind": "hang", "rows": [20], "once": str(tmp_path / "hung")}
    hit, calm = struck(mode, hang, patience)
    assert differing(hit, calm) == []
    assert hit.report["faults"]["hangs"] + hit.report["plan"]["copied_batches"] >= 1
    assert hit.report["faults"]["worker_deaths"] == 0


@slow_but("single")
def test_rows_that_are_no_numbers_are_predicted_in_float32(struck, mode):
    hit, calm = struck(mode, {"kind": "nan", "rows": [ROW, 9]})
    assert differing(hit, calm) == []
    assert faults_of(hit) == {"nonfinite_rows": 2}
    assert hit.report["rows"]["predicted"] == len(calm.ids)


@slow_but()
def test_rows_that_stay_no_numbers_get_the_fallback(struck, mode):
    hit, calm = struck(mode, {"kind": "nan", "rows": [ROW], "wide": True})
    assert faults_of(hit) == {"nonfinite_rows": 1}
    assert hit.report["rows"]["filled"] == 1
    assert np.abs(hit.probabilities[ROW] - mean_but(calm, ROW)).max() < TOLERANCE
    assert f"id {calm.ids[ROW]}" in hit.stderr


@pytest.mark.slow
def test_nothing_but_errors_ends_the_run(cli, models, test_set, tmp_path):
    done = cli(
        *(*MODES["single"], *models["gemma2"].flags(), "--input", str(test_set)),
        *("--output", str(tmp_path / "s.csv"), "--max-tokens-per-batch", "600"),
        **{VARIABLE: json.dumps([{"kind": "error"}])},
    )
    assert done.returncode == 1
    assert "batches failed, the last one batch" in done.stderr
    assert "a fault on purpose" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv.logs"]


class TestResume:
    """Runs that end early, and what goes on from them."""

    @pytest.mark.parametrize(
        ("first", "number", "second"),
        [
            pytest.param("data-parallel", signal.SIGKILL, "pipeline", marks=pytest.mark.slow),
            ("single", signal.SIGTERM, "data-parallel"),
            pytest.param("pipeline", signal.SIGKILL, "single", marks=pytest.mark.slow),
            pytest.param("tensor", signal.SIGINT, "data-parallel", marks=pytest.mark.slow),
        ],
    )
    def test_another_mode_goes_on(
        self, start, cli, real_job, calm, tmp_path, first, number, second
    ):
        job = [*real_job, "--output", str(tmp_path / "s.csv")]
        run = start(*MODES[first], *job, **{VARIABLE: json.dumps([SLOW])})
        run.wait_for_batches(tmp_path / "s.csv")
        run.process.send_signal(number)
        code, _, err = run.finish()
        assert code == (-9 if number == signal.SIGKILL else 130), err
        run.assert_nothing_is_left()
        assert not (tmp_path / "s.csv").exists()
        done = cli(*MODES[second], *job, "--resume", "require")
        assert done.returncode == 0, done.stderr
        assert "resuming" in done.stderr
        report = assert_calm(tmp_path / "s.csv", calm)
        assert report["rows"]["resumed"] > 0
        again = cli(*MODES[second], *job)
        assert again.returncode == 0, again.stderr
        report = assert_calm(tmp_path / "s.csv", calm)
        assert report["rows"]["resumed"] == REAL_ROWS, "nothing is computed twice"
        assert report["workers"] == []

    def test_what_differs_is_said(self, cli, models, test_set, tmp_path):
        flags = [*MODES["single"], *models["gemma2"].flags(), "--input", str(test_set),
                 "--sequence-length", str(LENGTH), "--output", str(tmp_path / "s.csv")]  # fmt: skip
        required = cli(*flags, "--resume", "require")
        assert required.returncode == 2
        assert "--resume require needs a journal" in required.stderr
        assert list(tmp_path.iterdir()) == []
        assert cli(*flags).returncode == 0
        other = cli(*flags, "--pooling", "last")
        assert other.returncode == 0
        assert "pooling was padded-mean, is last" in other.stderr
        assert (tmp_path / "s.csv.journal.1").is_file()
        required = cli(*flags, "--resume", "require")
        assert required.returncode == 2
        assert "pooling was last, is padded-mean" in required.stderr

    def test_files_are_the_owners_alone(self, cli, models, test_set, tmp_path):
        done = cli(*MODES["single"], *models["gemma2"].flags(), "--input", str(test_set),
                   "--output", str(tmp_path / "s.csv"))  # fmt: skip
        assert done.returncode == 0, done.stderr
        modes = {path.name: path.stat().st_mode & 0o77 for path in tmp_path.iterdir()}
        assert modes.pop("s.csv") != 0
        assert set(modes) == {
            *("s.csv.journal", "s.csv.logs", "s.csv.rows.csv", "s.csv.trace.json"),
            *("s.csv.report.json", "s.csv.report.html"),
        }
        assert set(modes.values()) == {0}


@pytest.mark.slow
def test_a_folder_that_vanishes_leaves_a_copy(start, real_job, calm, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    job = [*real_job, *MODES["data-parallel"]]
    run = start(*job, "--output", folder / "s.csv", **{VARIABLE: json.dumps([SLOW])})
    run.wait_for_batches(folder / "s.csv")
    folder.rename(tmp_path / "elsewhere")
    code, _, err = run.finish()
    assert code == 1
    assert "is no longer there" in err
    assert "Traceback" not in err
    run.assert_nothing_is_left()
    copy = err.split("--journal ")[1].split()[0]
    again = start(*job, "--output", tmp_path / "s.csv", "--journal", copy, "--resume", "require")
    code, _, err = again.finish()
    assert code == 0, err
    assert_calm(tmp_path / "s.csv", calm)
