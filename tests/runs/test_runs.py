"""Whole runs as a person has them: what is shown, what is left behind, what survives."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from runner.model.injected_faults import VARIABLE
from tests.conftest import (
    LENGTH,
    REAL_ROWS,
    ROOT,
    SLOW,
    TOLERANCE,
    assert_calm,
    environment,
    slow_until,
)

COLUMNS = ["id", "prompt", "response_a", "response_b"]
SUBMISSION_HEADER = "id,winner_model_a,winner_model_b,winner_tie\n"


@pytest.fixture
def slowly(start, real_job):
    """Start `real_job` on slow devices, so that something can befall it in its midst."""

    def run(*flags, **options):
        return start(*real_job, *flags, **{VARIABLE: json.dumps([SLOW])} | options)

    return run


@pytest.mark.parametrize("mode", ["single", "data-parallel"])
def test_no_rows_make_a_header(cli, models, tmp_path, mode):
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(COLUMNS) + "\n")
    output = tmp_path / "s.csv"
    done = cli("--mode", mode, *models["gemma2"].flags(), *("--input", str(empty)),
               *("--output", str(output)))  # fmt: skip
    assert done.returncode == 0
    assert "no rows" in done.stderr
    assert output.read_text() == SUBMISSION_HEADER
    report = json.loads((tmp_path / "s.csv.report.json").read_text())
    assert report["rows"]["total"] == 0


@pytest.mark.slow
def test_nothing_but_nan_ends_the_run(cli, models, test_set, tmp_path):
    output = tmp_path / "s.csv"
    done = cli(
        *("--mode", "single", *models["gemma2"].flags(), "--input", str(test_set)),
        *("--output", str(output)),
        **{VARIABLE: json.dumps([{"kind": "nan", "wide": True}])},
    )
    assert done.returncode == 1
    assert "error: No row has an answer: all 23 came out as NaN or infinity" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv.logs"]


def test_the_demo_says_where_it_cannot_be_kept(cli, tmp_path):
    done = cli("--output", str(tmp_path / "s.csv"), XDG_CACHE_HOME="/proc")
    assert done.returncode == 2
    assert "XDG_CACHE_HOME" in done.stderr


def test_the_demo_runs_with_few_flags(predict):
    """Preset, LoRA, head and rows are made on first use and read like any others."""
    answer = predict("--sequence-length", "64", "--pooling", "mean")
    assert answer.report["rows"]["total"] == 600
    assert answer.probabilities.std(axis=0).min() > 0.01
    assert answer.report["config"]["preset"] is None


@pytest.mark.slow
def test_one_long_row_and_three_workers(models, predict, tmp_path):
    """Fewer rows than workers, a row longer than the sequence and than the budget."""
    path = tmp_path / "one.parquet"
    row = (2**40, '["' + "long words " * 5000 + '"]', None, "")
    pd.DataFrame([row], columns=COLUMNS).to_parquet(path)
    flags = [*models["gemma2"].flags(), "--input", str(path), "--sequence-length", str(LENGTH)]
    answer = predict("--num-workers", "3", "--max-tokens-per-batch", "5", *flags)
    assert answer.ids == [str(2**40)]
    alone = predict("--mode", "single", *flags)
    assert np.abs(answer.probabilities - alone.probabilities).max() < TOLERANCE
    assert answer.report["tokens"] == {"real": LENGTH, "padded": LENGTH}


def test_report_holds_the_contract(models, test_set, predict, cache_without_shapes, tmp_path):
    flags = (*models["gemma2"].flags(), "--input", str(test_set), "--pooling", "mean",
             "--sequence-length", "64", "--max-tokens-per-batch", "256")  # fmt: skip
    fresh = str(cache_without_shapes(models["gemma2"], tmp_path / "cache"))
    first = predict("--num-workers", "2", *flags, XDG_CACHE_HOME=fresh)
    report = first.report
    keys = "schema config versions fingerprint mode strategy rows tokens seconds rates workers"
    assert {*keys.split(), "faults", "deadline"} <= set(report)
    assert set(report["seconds"]) == {
        "total", "read", "tokenize", "start_workers", "load", "compile", "predict", "merge",
    }  # fmt: skip
    assert all(report["seconds"][name] > 0 for name in report["seconds"])
    assert set(report["rates"]) == {"rows_per_s", "tokens_per_s", "model_flops_per_s", "mfu"}
    assert 0 < report["rates"]["mfu"] < 1.5
    for worker in report["workers"]:
        assert {"replica", "member", "device", "rows", "batches", "busy_s", "idle_s"} <= set(worker)
        assert {"peak_rss_bytes", "restarts"} <= set(worker)
    assert set(report["faults"].values()) == {0}
    assert set(report["deadline"]) == {"limit_s", "finished_s", "slack_s", "events"}
    assert report["mode"] == "data-parallel"

    shapes = len(report["plan"]["shapes"])
    assert 1 < shapes <= 8
    compiled = sum(worker["compiled_shapes"] for worker in report["workers"])
    assert compiled == shapes, "each shape is compiled by one worker, the other reads the cache"
    again = predict("--num-workers", "2", *flags, XDG_CACHE_HOME=fresh)
    assert sum(worker["compiled_shapes"] for worker in again.report["workers"]) == 0
    assert again.report["fingerprint"] == report["fingerprint"]
    other = predict("--mode", "single", *flags)
    assert other.report["fingerprint"] == report["fingerprint"], "modes do not change answers"
    changed = predict("--mode", "single", *flags, "--pooling", "last")
    assert changed.report["fingerprint"] != report["fingerprint"]


@pytest.mark.slow
def test_processes_keep_to_their_part(slowly, tmp_path):
    """The driver starts no JAX, workers no TensorFlow; each has a core; memory is bounded."""
    output = tmp_path / "s.csv"
    probed = tmp_path / "probed"
    run = slowly("--num-workers", "2", "--output", output, cold=True, **slow_until(probed))
    workers = run.wait_for_workers(".predict", count=2)

    def libraries(process):
        return {os.path.basename(entry.path) for entry in process.memory_maps()}

    driver = psutil.Process(run.process.pid)
    assert not any("jaxlib" in entry.path for entry in driver.memory_maps())
    assert any("sentencepiece" in name for name in libraries(driver))
    for worker in workers:
        paths = [entry.path for entry in worker.memory_maps()]
        assert any("jaxlib" in path for path in paths)
        assert not any("tensorflow" in path for path in paths)
    cores = [tuple(worker.cpu_affinity()) for worker in workers]
    if (os.cpu_count() or 1) >= 2:
        assert not set(cores[0]) & set(cores[1])
    probed.touch()
    code, _, err = run.finish()
    assert code == 0, err
    run.assert_nothing_is_left()
    report = json.loads((tmp_path / "s.csv.report.json").read_text())
    for worker in report["workers"]:
        # 410 MB of imports; compiling eight shapes takes most of the rest where nothing is cached.
        assert worker["peak_rss_bytes"] <= 1e9 + 2 * report["model"]["weight_bytes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything(slowly, tmp_path, number):
    output = tmp_path / "s.csv"
    run = slowly("--num-workers", "2", "--output", output, cold=number == signal.SIGINT)
    run.wait_for_workers(".predict" if number == signal.SIGINT else "")
    run.process.send_signal(number)
    code, _, err = run.finish()
    assert code == 130, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"interrupted(\. ([\d,]+ of {REAL_ROWS} rows are safe in \S+|No row is done yet);"
        r" the same command goes on from (there|the start)\.)?",
        last,
    )
    run.assert_nothing_is_left()
    assert not output.exists()
    left = {path.name for path in tmp_path.iterdir()} - {"s.csv.logs"}
    assert left == ({"s.csv.journal"} if "are safe" in last else set())


def test_an_interrupt_of_single_mode(slowly, tmp_path):
    run = slowly("--mode", "single", "--output", tmp_path / "s.csv")
    run.wait_for_batches(tmp_path / "s.csv")
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish()
    assert code == 130, err
    assert "rows are safe in" in err
    assert "Traceback" not in err


def test_a_killed_worker_costs_only_its_batches(slowly, calm, tmp_path):
    output = tmp_path / "killed.csv"
    run = slowly("--num-workers", "2", "--output", output)
    run.wait_for_batches(output)
    run.workers(".predict")[0].kill()
    code, out, err = run.finish()
    assert code == 0, err
    assert "1 worker died; the run went on." in out
    assert "died and is started again" in err
    report = assert_calm(output, calm)
    assert report["faults"]["worker_deaths"] == 1
    assert 1 <= report["faults"]["retried_batches"] <= 2
    assert sorted(worker["restarts"] for worker in report["workers"]) == [0, 1]


@pytest.mark.slow
def test_workers_that_always_die_end_the_run(start, models, test_set, tmp_path):
    output = tmp_path / "s.csv"
    run = start("--num-workers", "1", *models["gemma2"].flags(), "--input", test_set,
                "--output", output)  # fmt: skip
    killed = set()
    while run.process.poll() is None:
        for worker in run.workers(".load"):
            if worker.pid not in killed:
                killed.add(worker.pid)
                worker.kill()
        time.sleep(0.05)
    code, _, err = run.finish()
    assert code == 1
    assert "error: Every worker died 4 times" in err
    assert "Traceback" not in err
    assert len(killed) == 4
    assert not output.exists()
    run.assert_nothing_is_left()


def test_a_log_gets_plain_lines_and_no_chatter(cli, models, tmp_path):
    rows = tmp_path / "one.csv"
    rows.write_text(",".join(COLUMNS) + "\n1,p,a,b\n")
    # A batch of so many seconds that something must be said before it ends.
    crawling = json.dumps([{"kind": "slow", "tokens_per_s": 16 / 6}])
    done = cli("--mode", "single", *models["gemma2"].flags(), "--input", str(rows),
               "--sequence-length", "16", "--output", str(tmp_path / "s.csv"),
               **{VARIABLE: crawling})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines, "more than five seconds pass before the first batch"
    assert all(re.match(r"\[\d+:\d\d\] \S", line) for line in lines)


@pytest.mark.parametrize("columns", [120, pytest.param(0, marks=pytest.mark.slow)])
def test_a_terminal_gets_one_line(columns, warm, models, real_job, cache_without_shapes, tmp_path):
    """Through a pseudo-terminal: first what is waited for, then rows, tokens/s, time left."""
    cache = cache_without_shapes(models["arena"], tmp_path / "cache")
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, columns))
    process = warm.start(
        [*real_job, "--num-workers", "2", "--output", str(tmp_path / "s.csv")],
        environment(cache, TERM="xterm", **{VARIABLE: json.dumps([SLOW])}),
        stderr=terminal,
    )
    os.close(terminal)
    shown, redrawn, began = b"", 0, time.monotonic()
    while True:
        if select.select([controller], [], [], 0.2)[0]:
            try:
                piece = os.read(controller, 65536)
            except OSError:
                break
            redrawn += 1
            shown += piece
    took_s = time.monotonic() - began
    process.communicate()
    os.close(controller)
    text = shown.decode()
    assert process.returncode == 0, text
    assert redrawn > took_s / 5, "a line is redrawn far more often than every five seconds"
    # None of its shapes is in the cache yet, so each shape is long enough in the making to be seen.
    for stage in ("starting, loading and compiling", "w[01] loading", "w[01] compiling"):
        assert re.search(stage, text)
    assert re.search(r"\d+%\|.*\d+/96 rows, [\d,]+ tokens/s, \d+:\d\d left; w0 busy", text)
    assert "\n" not in text.rstrip(), "one line, redrawn"


def test_the_console_command(cache):
    done = subprocess.run(
        [sys.executable, "-m", "runner.cli", "--help"],
        cwd=ROOT, env=environment(cache), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--head-kernel FILE" in done.stdout
