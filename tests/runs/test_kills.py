"""Whatever is killed, at whatever moment: the undisturbed answers, or an error that says how to go
on. `benchmarks/soak.py` does the same at random; `test_faults.py` has faults struck from within.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from runner.cli import _Interrupts
from runner.common.records import Faults
from runner.executors.ray import failures
from runner.executors.recovery import Recovery
from runner.model.injected_faults import VARIABLE
from sharding.backlog import MOST_SETBACKS_OF_A_ROW, Backlog
from sharding.batches import Batch, BatchShape
from tests.conftest import LONGEST_RUN_S, ROOT, SLOW, assert_calm, environment
from tests.runs.test_faults import MODES

# How Ray names the actors of a mode, and the method in which the first of a group gets a batch.
ACTORS = {
    "data-parallel": ("Replica", ".predict"),
    "pipeline": ("PipelineStage", ".begin"),
    "tensor": ("TensorMember", ".predict"),
}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "s.csv"


@pytest.fixture
def job(real_job, output):
    return [*real_job, "--output", str(output)]


@pytest.fixture
def slowly(start):
    """Start a run whose devices are slow, so that something can befall it in its midst."""

    def run(*flags, **options):
        return start(*flags, **options, **{VARIABLE: json.dumps([SLOW])})

    return run


def safe_rows(err):
    """Rows that the message of a failed run says are safe."""
    found = re.search(r"([\d,]+) of 96 rows are safe in (\S+?)[;,] the same command", err)
    assert found, err
    return int(found[1].replace(",", ""))


def named(run, name):
    (process,) = [one for one in run.family() if one.name() == name]
    return process


@pytest.mark.parametrize(
    ("mode", "server"),
    [
        pytest.param("data-parallel", "raylet", marks=pytest.mark.slow),
        pytest.param("tensor", "raylet", marks=pytest.mark.slow),
        pytest.param("pipeline", "gcs_server", marks=pytest.mark.slow),
    ],
)
def test_ray_itself_is_killed(slowly, cli, job, calm, output, mode, server):
    run = slowly(*MODES[mode], *job)
    run.wait_for_batches(output)
    named(run, server).kill()
    code, _, err = run.finish()
    assert code == 1
    assert f"Ray's {server} ended" in err
    assert "died and is started again" not in err, "it is no worker's death"
    assert "Traceback" not in err
    run.assert_nothing_is_left()
    done = cli(*MODES["single"], *job, "--resume", "require")
    assert done.returncode == 0, done.stderr
    assert assert_calm(output, calm)["rows"]["resumed"] == safe_rows(err) > 0


@pytest.mark.parametrize(
    "mode",
    ["data-parallel", *(pytest.param(mode, marks=pytest.mark.slow)
                        for mode in ("pipeline", "tensor"))],
)  # fmt: skip
def test_the_driver_is_killed_while_a_worker_hangs(start, job, tmp_path, monkeypatch, mode):
    hung = tmp_path / "hung"
    monkeypatch.setenv(VARIABLE, json.dumps([{"kind": "hang", "once": str(hung)}]))
    run = start(*MODES[mode], *job, cold=True)
    while not hung.exists():
        assert run.process.poll() is None, run.process.communicate()
        time.sleep(0.05)
    run.process.kill()
    run.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data-parallel", "pipeline", "tensor"])
def test_the_driver_is_killed_while_a_worker_is_stopped(slowly, job, mode):
    """A stopped process takes no notice of anything but SIGKILL."""
    run = slowly(*MODES[mode], *job, cold=True)
    name, doing = ACTORS[mode]
    run.wait_for_workers(doing, name=name)[0].suspend()
    run.process.kill()
    run.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        *(("data-parallel", moment) for moment in ("start", "load", "compile", "last")),
        *(("pipeline", moment) for moment in ("start", "compile", "last")),
        *(("tensor", moment) for moment in ("start", "compile", "last")),
    ],
)
def test_a_worker_is_killed(
    start, job, calm, output, real_rows, tmp_path, monkeypatch, mode, moment
):
    name, _ = ACTORS[mode]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if moment == "last":
        # Shortest rows come last. One process strikes: of a group, the others are left without it.
        texts = pd.read_csv(real_rows, dtype=str, keep_default_na=False)
        lengths = texts[["prompt", "response_a", "response_b"]].map(len).sum(axis=1)
        fault = {"kind": "kill", "rows": [int(lengths.argmin())], "once": str(tmp_path / "once")}
        monkeypatch.setenv(VARIABLE, json.dumps([fault]))
    run = start(*MODES[mode], *job)
    if moment != "last":
        doing = {"start": "", "load": ".load", "compile": ".compile"}[moment]
        run.wait_for_workers(doing, name=name)[-1].kill()
    code, _, err = run.finish()
    assert code == 0, err
    run.assert_nothing_is_left()
    report = assert_calm(output, calm)
    assert report["faults"]["worker_deaths"] == 1
    assert report["faults"]["quarantined_rows"] == 0
    assert len(re.findall("died and is started again", err)) == 1


@pytest.mark.slow
def test_every_worker_died(slowly, cli, job, calm, output, monkeypatch):
    run = slowly(*MODES["data-parallel"], *job)
    run.wait_for_batches(output)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish()
    assert code == 130
    kept = safe_rows(err)
    died = cli(*MODES["data-parallel"], *job, **{VARIABLE: json.dumps([{"kind": "kill"}])})
    assert died.returncode == 1
    assert f"Every worker died {failures.MAX_RESTARTS + 1} times" in died.stderr
    # The interrupt may have come when a batch was safe and not yet counted.
    assert safe_rows(died.stderr) >= kept > 0
    assert "Traceback" not in died.stderr
    done = cli(*MODES["data-parallel"], *job, "--resume", "require")
    assert done.returncode == 0, done.stderr
    assert assert_calm(output, calm)["rows"]["resumed"] == safe_rows(died.stderr)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(slowly, cli, job, calm, output):
    run = slowly(*MODES["data-parallel"], *job)
    run.wait_for_batches(output)
    # The first one now takes seconds: Ray's processes are asked to end and cannot.
    named(run, "raylet").suspend()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert run.process.poll() is None, "nothing to cut short"
    run.process.send_signal(signal.SIGINT)
    # The raylet is still stopped: the run did not wait for it.
    assert run.process.wait(timeout=LONGEST_RUN_S) == 130
    run.assert_nothing_is_left()
    done = cli(*MODES["single"], *job, "--resume", "require")
    assert done.returncode == 0, done.stderr
    assert assert_calm(output, calm)["rows"]["resumed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "data-parallel", "pipeline", "tensor"])
@pytest.mark.parametrize("after_s", [1.5, 2.5, 4.0])
def test_an_interrupt_while_all_starts(start, job, output, mode, after_s):
    """Before there is a journal, Ray's own handler stands, or an actor is half-made."""
    for number in (signal.SIGINT, signal.SIGTERM):
        run = start(*MODES[mode], *job)
        time.sleep(after_s)
        run.process.send_signal(number)
        code, _, err = run.finish()
        assert code == 130, err
        assert "Traceback" not in err
        run.assert_nothing_is_left()


def can_mount() -> bool:
    """Whether a process may mount file systems for itself here."""
    asked = ["unshare", "--map-root-user", "--mount", "true"]
    return not subprocess.run(asked, capture_output=True).returncode


class TestFullDisk:
    """The disk fills in the midst; once there is room the same command goes on."""

    # tmpfs: a small file system. limit: no file may be longer, as under a quota.
    @pytest.mark.parametrize("way", ["tmpfs", pytest.param("limit", marks=pytest.mark.slow)])
    def test_journal(self, warm, cache, job, calm, tmp_path, way):
        if way == "tmpfs" and not can_mount():
            way = "limit"
        folder, kept = tmp_path / "small", tmp_path / "kept"
        folder.mkdir()
        # A batch a row: the more there is to write, the surer it fills.
        flags = [*MODES["single"], *job[:-1], folder / "s.csv", "--max-tokens-per-batch", "128"]
        done = warm.run(
            [way, folder, kept, *flags],
            environment(cache),
            script=ROOT / "tests" / "support" / "full_disk.py",
            timeout=LONGEST_RUN_S,
        )
        assert done.returncode == 0, done.stderr
        err = folder.with_suffix(".err").read_text()
        assert folder.with_suffix(".code").read_text() == "1"
        assert "Traceback" not in err
        assert "The journal cannot be written: " in err
        files = folder.with_suffix(".files").read_text().split()
        assert "s.csv.journal" in files
        assert "s.csv" not in files
        safe = int(re.search(r"([\d,]+) of 96 rows are safe", err)[1].replace(",", ""))
        report = assert_calm(kept / "s.csv", calm)
        assert report["rows"]["resumed"] >= safe > 0


# A run in a cluster of two nodes, one of which goes when five batches have come.
CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
from runner import cli
from runner.executors.ray import places, replicas

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
places.start_ray = lambda num_cpus, verbose: ray.init(
    address=cluster.address, log_to_driver=False, configure_logging=False
)
predict = replicas.RayReplicas._run

def run(self, backlog):
    came = 0
    for result in predict(self, backlog):
        came += result is not None and result.replica == 1
        if came == 5:
            cluster.remove_node(second, allow_graceful=False)
            came += 1
        yield result
    assert came > 5, "the second node had no part in it"

replicas.RayReplicas._run = run
code = cli.main(sys.argv[1:])
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.slow
def test_a_node_leaves_the_cluster(cache, job, calm, output):
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, *MODES["data-parallel"], *job],
        env=environment(cache, PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=LONGEST_RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert assert_calm(output, calm)["faults"]["worker_deaths"] >= 1
    assert "worker 1 died and is started again" in done.stderr


def wait_in_steps():
    """What comes again is no signal, so that it cuts no sleep short: it comes between two."""
    for _ in range(100_000):
        time.sleep(0.01)


def test_an_interrupt_in_a_destructor_is_not_lost(monkeypatch):
    """Python ignores what is raised there, and so did JAX' callback of the garbage collector."""

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupts = _Interrupts()
    interrupts.install()
    try:
        dying = Dying()
        del dying
        with pytest.raises(KeyboardInterrupt):
            wait_in_steps()
    finally:
        interrupts.stop_watching()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cost(shape):
    return float(shape.tokens)


def anything(shape):
    return True


def test_a_row_is_not_given_up_for_two_deaths():
    """Whoever kills workers at random may strike the same row twice."""
    backlog = Backlog([Batch(0, (7,), BatchShape(1, 8))], cost=cost)
    for _ in range(MOST_SETBACKS_OF_A_ROW - 1):
        batch = backlog.take(0, runnable=anything, alone=True)
        assert backlog.setback(batch, 0, "it died") is None
    assert not backlog.given_up
    backlog.finish(backlog.take(0, runnable=anything, alone=True))
    assert not backlog


def test_a_row_that_another_device_may_hold_is_not_given_up():
    """A copy of it runs where there may be room."""
    notes, faults = [], Faults()
    backlog = Backlog([Batch(0, (0,), BatchShape(1, 8))], cost=cost)
    recovery = Recovery(backlog, faults, ["a"], notes.append)
    batch = backlog.take(0, runnable=anything, alone=True)
    backlog.copy(batch, 1)
    recovery.too_large(0, [0], batch)
    assert (faults.quarantined_rows, backlog.given_up, notes) == (0, {}, [])
    recovery.too_large(1, [1], batch)
    assert faults.quarantined_rows == 1
    assert list(backlog.given_up) == [0]
