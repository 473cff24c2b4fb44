"""Nobody but the owner's processes can talk to a run: sockets, token, folder, command lines."""

import ipaddress
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import grpc
import psutil
import pytest
import ray

from runner.common.errors import WorkerError
from runner.executors.ray import session
from runner.executors.ray.session import LOCK, LONGEST_SOCKET, make_private_folder
from tests.conftest import LONGEST_RUN_S, ROOT, environment, slow_until

# Actor class, the method in which it predicts, flags.
MODES = {
    "data-parallel": ("Replica", ".predict", []),
    "pipeline": ("PipelineStage", "", ["--mode", "model-parallel", "--strategy", "pipeline"]),
    "tensor": ("TensorMember", ".predict", ["--mode", "model-parallel", "--strategy", "tensor"]),
}
# One method of each of Ray's servers, with which code or objects come in.
METHODS = {
    "gcs_server": {"InternalKVGcsService/InternalKVPut"},
    "raylet": {"NodeManagerService/RequestWorkerLease", "ObjectManagerService/Push"},
    "core worker": {"CoreWorkerService/PushTask"},
}
# Says for each token named on the command line whether the cluster let it in. The last one wants
# to become a driver.
CLIENT = """
import os, sys
os.environ.update(RAY_AUTH_MODE="disabled", RAY_NUM_REDIS_GET_RETRIES="1")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else 127.0.0.1 is taken for another address
import ray
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient
address, *tokens = sys.argv[1:]
for token in tokens:
    os.environ.update(RAY_AUTH_MODE="token" if token else "disabled", RAY_AUTH_TOKEN=token)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        print("in", bool(GcsClient(address=address).internal_kv_keys(b"", None)))
    except ray.exceptions.AuthenticationError:
        print("refused")
try:
    ray.init(address=address, log_to_driver=False)
    print("driver")
except ConnectionError:
    print("no driver")
"""


def kind_of(process: psutil.Process) -> str:
    """What a process of a run is, in a few words."""
    line = process.cmdline()
    title = line[0].split("/")[-1] if line else process.name()
    for known in ("monitor.py", "log_monitor.py", "dashboard.py", "run.py"):
        if any(word.endswith("/" + known) for word in line):
            return "driver" if known == "run.py" else known
    return title


def everything(run) -> list[psutil.Process]:
    """All processes of a run: Ray's agents hide their environment behind a title."""
    return list({*run.family(), *psutil.Process(run.process.pid).children(recursive=True)})


def listening(processes: list[psutil.Process]) -> list[tuple[str, str, str, int]]:
    """Return (what, protocol, address, port) of every socket that waits for strangers."""
    found = []
    for process in processes:
        try:
            for entry in process.net_connections("inet"):
                if entry.status == psutil.CONN_LISTEN or entry.type == socket.SOCK_DGRAM:
                    protocol = "tcp" if entry.type == socket.SOCK_STREAM else "udp"
                    found.append((kind_of(process), protocol, entry.laddr.ip, entry.laddr.port))
        except psutil.NoSuchProcess:
            continue
    print("", *(f"{what:35} {kind} {host} {port}" for what, kind, host, port in found), sep="\n")
    return found


def is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def run_folder(processes: list[psutil.Process]) -> Path:
    """Return the folder of a run, which holds its unix sockets."""
    paths = {entry.laddr for p in processes for entry in p.net_connections("unix") if entry.laddr}
    folders = {re.sub(r"(/arena-\w{8})/.*", r"\1", str(path)) for path in paths}
    assert len(folders) == 1, f"one folder for all sockets: {paths}"
    return Path(folders.pop())


def call_without_token(method: str, port: int) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize(
    "mode",
    [
        "data-parallel",
        pytest.param("pipeline", marks=pytest.mark.slow),
        pytest.param("tensor", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_closed_to_others(start, real_job, cache, tmp_path, mode):
    worker, step, flags = MODES[mode]
    output, probed = tmp_path / "s.csv", tmp_path / "probed"
    run = start(
        *("--num-workers", "2", *flags, *real_job, "--output", output),
        cold=True, **slow_until(probed),
    )  # fmt: skip
    run.wait_for_workers(step, count=2, name=worker)
    family = everything(run)
    sockets = listening(family)

    # Sockets: all on loopback, and no server that was not thought of.
    assert [entry for entry in sockets if not is_loopback(entry[2])] == []
    assert not [entry for entry in sockets if entry[1] == "udp"]
    servers = {re.sub(r"^(ray::\w+).*", r"\1", what) for what, *_ in sockets}
    idle = {"ray::IDLE"}
    assert servers - idle == {*("driver", "gcs_server", "raylet", f"ray::{worker}")}

    # Each refuses who has no token, but for what JAX has for a tensor group.
    seen, of_jax = set(), []
    for what, _, host, port in sockets:
        if host == "127.0.0.1":
            of_jax.append((what, "gloo"))
            continue
        methods = METHODS.get(what, METHODS["core worker"])
        # UNIMPLEMENTED: the raylet's two services have a port each.
        answers = {method: call_without_token(method, port) for method in methods}
        assert set(answers.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (what, answers)
        refused = {method for method, answer in answers.items() if answer == "UNAUTHENTICATED"}
        if not refused:
            of_jax.append((what, "coordinator"))
        seen |= refused
    assert seen == set().union(*METHODS.values())
    assert {what.split(".")[0] for what, _ in of_jax} <= {"ray::TensorMember"}
    assert [name for _, name in of_jax].count("coordinator") <= (mode == "tensor")
    assert [name for _, name in of_jax].count("gloo") == (2 if mode == "tensor" else 0)

    # The token: in the environment alone, and it is what makes the difference.
    tokens = {process.environ().get("RAY_AUTH_TOKEN") for process in run.family()}
    (token,) = tokens - {None}
    assert len(token) == 64
    assert not [p.pid for p in family if token in " ".join(p.cmdline())]
    assert not [p.pid for p in family if re.search(r"redis.password=\S", " ".join(p.cmdline()))]
    (port,) = [entry[3] for entry in sockets if entry[0] == "gcs_server"]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, f"127.0.0.1:{port}", token, "", "0" * 64],
        env=environment(cache), capture_output=True, text=True, timeout=LONGEST_RUN_S,
    )  # fmt: skip
    assert done.stdout.split("\n")[:4] == ["in True", "refused", "refused", "no driver"], (
        done.stderr
    )

    # The folder: private to the owner, whatever Ray makes of what lies in it; gone at the end.
    folder = run_folder(family)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    for process in family:
        assert not [file for file in process.open_files() if file.path.startswith("/tmp/ray/")]
    assert run.process.poll() is None, "all this was while the run was on"
    probed.touch()
    code, _, err = run.finish()
    assert code == 0, err
    assert not folder.exists()
    assert json.loads((tmp_path / "s.csv.report.json").read_text())["faults"]["worker_deaths"] == 0


def test_a_ray_that_would_listen_to_others_is_refused(monkeypatch):
    """Should an update of Ray no longer take the loopback address, no run goes on with it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_enable_metrics_collection",
                 "AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT", "RAY_worker_niceness",
                 "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):  # fmt: skip
        monkeypatch.setenv(name, "")
    folders = []
    monkeypatch.setattr(session, "Config", MagicMock())
    monkeypatch.setattr(session, "AuthenticationTokenLoader", MagicMock())
    monkeypatch.setattr(ray, "init", lambda **flags: folders.append(Path(flags["_temp_dir"])))
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    with pytest.raises(WorkerError, match=r"expected .* loopback .* Received: 192\.0\.2\.7"):
        session.start_ray(1, verbose=False)
    assert not folders[0].parent.exists()


def test_folders_of_killed_runs_are_swept(monkeypatch):
    # pytest's folders are too deep for a socket in them.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        script = (
            "import os; from runner.executors.ray.session import make_private_folder as make;"
            "print(make()[0], flush=True); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        killed = Path(done.stdout.strip())
        (killed / "r").mkdir()
        somebody_elses = Path(short, "arena-results")
        somebody_elses.mkdir()
        alive, lock = make_private_folder()
        assert stat.S_IMODE(alive.stat().st_mode) == 0o700
        assert killed.parent == alive.parent == Path(short)
        assert not killed.exists()
        _, second = make_private_folder()
        assert (alive / LOCK).exists(), "its driver lives"
        assert somebody_elses.exists()
        os.close(lock)
        os.close(second)


def test_a_deep_temporary_folder_is_not_used(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    folder, lock = make_private_folder()
    try:
        assert folder.parent == Path("/tmp")
        assert len(f"{folder}/r{LONGEST_SOCKET}") <= 103
    finally:
        (folder / LOCK).unlink()
        folder.rmdir()
        os.close(lock)


def test_nothing_is_unpickled():
    """Model files and tables are arrays, JSON, HDF5 and CSV: none can hold code."""
    forbidden = re.compile(
        r"\b(c?loud)?pickle\b(?!=False)|allow_pickle=True|torch\.load|joblib|safe_mode=False"
        r"|enable_unsafe_deserialization|\beval\(|\bexec\(|yaml\.load"
    )
    sources = [path for folder in ("runner", "sharding") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 20
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    ]
    assert found == []
