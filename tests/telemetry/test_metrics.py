"""Figures of a run as Prometheus reads them: names as documented, during a run, gone after it."""

import re
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import runner.executors.single
from runner import RunConfig, run
from runner.cli import main
from runner.common.errors import ConfigError
from runner.common.records import Faults, WorkerStats
from runner.config.flags import flag
from runner.telemetry.metrics import Figures, Metrics
from runner.telemetry.progress import Progress, Status
from tests.conftest import ROOT
from tests.support.fakes import FakeReplica, write_fake_job

FIGURES = Figures(
    build={"arena-runner": "1", "mode": "single"},
    status=Status(
        phase="starting",
        workers={0: "busy", 1: "compiling 1/8"},
        elapsed_s=9.0,
        rows_done=4,
        rows_total=10,
        rows_per_s=2.5,
        tokens_per_s=80.0,
        left_s=3.0,
        slack_s=-1.5,
    ),
    rows={"total": 10, "done": 5, "resumed": 2, "shortened": 1, "filled": 0},
    real_tokens=70,
    padded_tokens=80,
    workers=[WorkerStats(0, rows=3, busy_s=1.25), WorkerStats(1, member=1, restarts=2)],
    faults=Faults(hangs=1),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_fake_job(tmp_path_factory.mktemp("job"))


def read(text):
    """Return name, then labels as the text has them -> value."""
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def written(figures):
    metrics, registry = Metrics(None), CollectorRegistry()
    metrics.watch(lambda: figures)
    registry.register(metrics)
    return generate_latest(registry).decode()


def test_what_is_served_is_what_is_documented():
    text = written(FIGURES)
    served = {re.split(r"[ {]", line)[0] for line in text.splitlines() if line[0] != "#"}
    documented = (ROOT / "docs" / "observability.md").read_text()
    assert served == set(re.findall(r"^\| `(arena_runner_\w+)", documented, re.MULTILINE))


def test_values():
    found = read(written(FIGURES))
    expected = {
        "arena_runner_rows": 10,
        "arena_runner_rows_done": 5,
        "arena_runner_rows_resumed": 2,
        "arena_runner_tokens_padded_total": 80,
        "arena_runner_left_seconds": 3,
        "arena_runner_slack_seconds": -1.5,
        "arena_runner_rows_per_second": 2.5,
        "arena_runner_faults_total hangs": 1,
        "arena_runner_worker_busy_seconds_total 0 0": 1.25,
        "arena_runner_worker_restarts_total 1 1": 2,
        "arena_runner_replica_state 1 compiling": 1,
        "arena_runner_build_info 1 single": 1,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_what_is_not_known_is_left_out():
    nothing = Progress().status()
    text = written(Figures({}, nothing, FIGURES.rows, 0, 0, [], Faults()))
    assert "arena_runner_left_seconds" not in text
    assert "arena_runner_slack_seconds" not in text
    assert "arena_runner_rows 10.0" in text


def test_a_figure_that_fails_fails_nothing_else():
    with Metrics(0) as metrics:
        metrics.watch(lambda: 1 / 0)
        assert urllib.request.urlopen(metrics.url, timeout=10).read() == b""


def test_during_a_run(job, tmp_path, monkeypatch, capsys):
    """Scraped between two batches; nobody but this machine is listened to; gone afterwards."""
    asked, go_on = threading.Event(), threading.Event()

    class Waiting(FakeReplica):
        def predict(self, batch):
            if batch.index > 2:
                asked.set()
                assert go_on.wait(60)
            return super().predict(batch)

    monkeypatch.setattr(runner.executors.single, "Replica", Waiting)
    config = RunConfig(
        **job, output=tmp_path / "s.csv", mode="single", metrics_port=0, sequence_length=64,
        max_tokens_per_batch=256,
    )  # fmt: skip
    urls, enter = [], Metrics.__enter__

    def note_url(self):
        urls.append(enter(self).url)
        assert self._server.server_address[0] == "127.0.0.1"
        return self

    monkeypatch.setattr(Metrics, "__enter__", note_url)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    try:
        assert asked.wait(60)
        (url,) = urls
        end = time.monotonic() + 60
        while True:
            found = read(urllib.request.urlopen(url, timeout=10).read().decode())
            # A worker's rows are counted just before they are saved.
            is_settled = (
                found["arena_runner_worker_rows_total 0 0"] == found["arena_runner_rows_done"] > 0
            )
            if is_settled or time.monotonic() > end:
                break
    finally:
        go_on.set()
        thread.join()
    assert found["arena_runner_rows"] == 40
    assert 0 < found["arena_runner_rows_done"] < 40
    assert is_settled, found
    assert found["arena_runner_tokens_real_total"] > 0
    assert found["arena_runner_replica_state 0 busy"] == 1
    assert url in capsys.readouterr().err
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)


def test_a_port_that_is_taken(job, tmp_path, capsys):
    """Said before the work, in a line."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        flags = [part for name, path in job.items() for part in (flag(name), str(path))]
        output = tmp_path / "s.csv"
        assert main([*flags, "--metrics-port", str(port), "--output", str(output)]) == 2
        said = capsys.readouterr().err
        assert "--metrics-port must be a free port" in said
        assert said.count("\n") == 1
        with pytest.raises(ConfigError, match="Address already in use"), Metrics(port):
            pass
    assert list(tmp_path.iterdir()) == []
