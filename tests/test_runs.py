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
from tests.conftest import LENGTH, ROOT, TOLERANCE, environment

COLUMNS = ["id", "prompt", "response_a", "response_b"]
SUBMISSION_HEADER = "id,winner_model_a,winner_model_b,winner_tie\n"


@pytest.fixture
def long_job(models, arena_rows):
    """Flags of a run that predicts for some ten seconds on two workers."""
    flags = [*models["arena"].flags(), "--sequence-length", "1024"]
    return ["--num-workers", "2", *flags, "--input", arena_rows]


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


def test_report_holds_the_contract(models, test_set, predict, tmp_path):
    flags = (*models["gemma2"].flags(), "--input", str(test_set), "--pooling", "mean",
             "--sequence-length", "80", "--max-tokens-per-batch", "256")  # fmt: skip
    fresh = str(tmp_path / "cache")
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
def test_processes_keep_to_their_part(start, long_job, tmp_path, models):
    """The driver starts no JAX, workers no TensorFlow; each has a core; memory is bounded."""
    output = tmp_path / "s.csv"
    run = start(*long_job, "--output", output)
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
    code, _, err = run.finish()
    assert code == 0, err
    run.assert_nothing_is_left()
    report = json.loads((tmp_path / "s.csv.report.json").read_text())
    for worker in report["workers"]:
        # 410 MB of imports; compiling eight shapes takes most of the rest where nothing is cached.
        assert worker["peak_rss_bytes"] <= 1e9 + 2 * report["model"]["weight_bytes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything(start, long_job, tmp_path, number):
    output = tmp_path / "s.csv"
    run = start(*long_job, "--output", output)
    run.wait_for_workers(".predict" if number == signal.SIGINT else ".load")
    asked = time.monotonic()
    run.process.send_signal(number)
    code, _, err = run.finish(timeout_s=20)
    assert code == 130, err
    assert time.monotonic() - asked < 8
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"interrupted\. ([\d,]+ of 905 rows are safe in \S+|No row is done yet);"
        r" the same command goes on from (there|the start)\.",
        last,
    )
    run.assert_nothing_is_left()
    assert not output.exists()
    left = {path.name for path in tmp_path.iterdir()} - {"s.csv.logs"}
    assert left == (set() if "No row" in last else {"s.csv.journal"})


def test_an_interrupt_of_single_mode(start, models, arena_rows, tmp_path):
    run = start(
        *("--mode", "single", *models["arena"].flags(), "--input", arena_rows),
        *("--sequence-length", "1024", "--output", tmp_path / "s.csv"),
    )
    journal = tmp_path / "s.csv.journal-wal"
    while not journal.is_file() or journal.stat().st_size < 10_000:
        assert run.process.poll() is None, run.process.communicate()
        time.sleep(0.02)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish(timeout_s=20)
    assert code == 130, err
    assert "rows are safe in" in err
    assert "Traceback" not in err


def test_a_killed_worker_costs_only_its_batches(start, long_job, predict, tmp_path):
    output = tmp_path / "killed.csv"
    run = start(*long_job, "--output", output)
    run.wait_for_workers(".predict", count=2)
    time.sleep(1)
    run.workers()[0].kill()
    code, out, err = run.finish()
    assert code == 0, err
    assert "1 worker deaths were survived" in out
    assert "died and is started again" in err
    report = json.loads((tmp_path / "killed.csv.report.json").read_text())
    assert report["faults"]["worker_deaths"] == 1
    assert 1 <= report["faults"]["retried_batches"] <= 2
    assert sorted(worker["restarts"] for worker in report["workers"]) == [0, 1]
    calm = predict(*map(str, long_job))
    table = pd.read_csv(output, dtype={"id": str})
    assert table["id"].tolist() == calm.ids
    assert np.abs(table.iloc[:, 1:].to_numpy() - calm.probabilities).max() < TOLERANCE


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


def test_a_log_gets_plain_lines_and_no_chatter(models, arena_rows, predict):
    answer = predict(*models["arena"].flags(), "--input", str(arena_rows), "--pooling", "mean",
                     "--sequence-length", "256")  # fmt: skip
    lines = answer.stderr.splitlines()
    assert lines, "more than five seconds pass before the first batch"
    assert all(re.match(r"\[\d+:\d\d\] \S", line) for line in lines)


@pytest.mark.parametrize("columns", [120, pytest.param(0, marks=pytest.mark.slow)])
def test_a_terminal_gets_one_line(columns, cache, models, arena_rows, tmp_path):
    """Through a pseudo-terminal: first what is waited for, then rows, tokens/s, time left."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, columns))
    flags = ["--input", str(arena_rows), "--output", str(tmp_path / "s.csv"), "--pooling", "mean"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *models["arena"].flags(), *flags],
        env=environment(cache, TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown, silences, last = b"", [], time.monotonic()
    while True:
        if select.select([controller], [], [], 0.2)[0]:
            try:
                piece = os.read(controller, 65536)
            except OSError:
                break
            silences.append(time.monotonic() - last)
            last = time.monotonic()
            shown += piece
    process.communicate()
    os.close(controller)
    text = shown.decode()
    assert process.returncode == 0, text
    assert max(silences) < 5
    for stage in ("starting, loading and compiling", "w0 loading", "w1 compiling"):
        assert stage in text
    assert re.search(r"\d+%\|.*\d+/905 rows, [\d,]+ tokens/s, \d+:\d\d left; w0 busy", text)
    assert "\n" not in text.rstrip(), "one line, redrawn"


def test_the_console_command(cache):
    done = subprocess.run(
        [sys.executable, "-m", "runner.cli", "--help"],
        cwd=ROOT, env=environment(cache), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--head-kernel FILE" in done.stdout
