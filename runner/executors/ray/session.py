"""Ray itself: started for one run and closed to everyone else, or joined where it already runs;
its devices found; ended, or left as it was.

Does not know what runs on it. docs/security.md says which process listens where.
"""

import atexit
import fcntl
import ipaddress
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]

import runner
from runner.common.errors import ConfigError, WorkerError, first_line
from runner.model.cpu_allocator import ENVIRONMENT
from sharding.kinds import KINDS, named_by_jax

# What Ray appends to its folder's path for a socket, and the longest path that a socket can have.
LONGEST_SOCKET = "/session_2026-11-24_12-00-00_123456_4194304/sockets/plasma_store"
MAX_SOCKET_PATH_BYTES = 103
# A file in a run's folder that is locked for as long as its driver lives.
LOCK = "arena-runner.lock"
# The processes of Ray without which no worker can be reached or started.
NEEDED = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
# Files in a session's folder that tell a raylet where its agents listen.
PORTS_OF_AGENTS = (
    *("metrics_agent_port", "metrics_export_port"),
    *("dashboard_agent_listen_port", "runtime_env_agent_port"),
)
# Replaces an agent: sleeps until the raylet ends, when the kernel kills it (see prctl(2)).
IDLE_AGENT = (
    "import ctypes, os, time\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "while str(os.getppid()) == os.environ['RAY_RAYLET_PID']: time.sleep(1)"
)
# Seconds in which a cluster must accept a connection; Ray itself would try for minutes.
ANSWERS_WITHIN_S = 5.0
# Variables of the driver's environment with these prefixes are set for a cluster's workers too.
HANDED_ON = ("XLA_", "JAX_", "NCCL_", "ARENA_", "MALLOC_")


@dataclass(slots=True)
class _Session:
    """What this process has to end or leave.

    started_in: the private folder of the Ray that it started, and the open lock of that folder.
    """

    started_in: tuple[Path, int] | None = None
    has_joined: bool = False


_session = _Session()
_print_of_ray = ray._private.worker.print_to_stdstream


def start_ray(num_cpus: int, *, verbose: bool) -> None:
    """Start Ray on this machine for this run alone; `stop_ray` ends it.

    Its servers listen on loopback and require a token that only this run's processes know. Their
    files are in a folder that only the owner can enter. Call it in the main thread: the kernel ends
    Ray's processes together with the thread that started them.

    Raises:
        WorkerError: Ray does not start, or would listen to other machines.
    """
    _set_environment()
    if _session.started_in is None:
        atexit.register(stop_ray)
        _session.started_in = make_private_folder()
    folder, _ = _session.started_in
    try:
        with (
            # Ray 2.60 binds its servers to every interface unless its node's address is a loopback
            # one, and replaces `_node_ip_address="127.0.0.1"` by the machine's address unless this
            # constant says that there is no cluster. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER sets it too,
            # but is read when ray is imported, and would also hold for a cluster that is joined.
            _replaced(ray_constants, ENABLE_RAY_CLUSTER=False),
            _only_needed_servers(log_monitor=verbose),
        ):
            # Ray opens its own folder to all users (0777), but they cannot enter the one above it.
            _init(
                verbose=verbose,
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                _temp_dir=str(folder / "r"),
            )
    except Exception as error:
        # Ray's errors have no common class, and nothing but Ray runs in there.
        raise WorkerError(
            f"Ray did not start: {type(error).__name__}: {first_line(error)}. Is there enough "
            f"memory, and room in {folder.parent}? Ray's logs are in ray/, in the folder of logs."
        ) from error
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        stop_ray()
        raise WorkerError(
            f"Ray {ray.__version__} would listen to other machines: expected it to use a loopback "
            f"address, as Ray 2.60 does. Received: {address}. This is a bug."
        )


def _set_environment() -> None:
    """Set what Ray reads from the environment."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray read both when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    # Ray's metrics servers, which come with ray[default] or prometheus_client, ask for no token.
    # There is no port 65536, so they do not start.
    os.environ.update(
        RAY_enable_metrics_collection="0",
        AUTOSCALER_METRIC_PORT="65536",
        DASHBOARD_METRIC_PORT="65536",
    )
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray gives its workers almost the lowest priority; ours do the work itself.
        "RAY_worker_niceness": "0",
        **ENVIRONMENT,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def join_ray(address: str, *, verbose: bool) -> None:
    """Connect to a Ray cluster that already runs; `stop_ray` leaves it as it was.

    The code of `runner` and `sharding` is sent to the nodes. They need the dependencies in
    pyproject.toml, but not this package. Ray itself reads RAY_AUTH_MODE and the token.

    Raises:
        ConfigError: there is no cluster, it refuses the token, its versions differ, or this machine
            is not one of its nodes.
    """
    _check_address(address)
    code = Path(runner.__file__).resolve().parent
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
    if not verbose:
        # Ray prints the last lines of a lost node's raylet even if it is told not to print logs.
        ray._private.worker.print_to_stdstream = lambda *said, **how: None
    try:
        _init(
            verbose=verbose,
            address=address,
            runtime_env={
                "py_modules": [str(code), str(code.parent / "sharding")],
                "env_vars": ENVIRONMENT | handed_on,
            },
        )
    except Exception as error:
        # Ray's errors have no common class, and none of them names --address.
        ray.shutdown()
        raise ConfigError(_why_not_joined(address, error)) from error
    _session.has_joined = True
    atexit.register(stop_ray)


def _init(*, verbose: bool, **options: Any) -> None:
    """Call `ray.init` without Ray's handler of SIGTERM, which ends the process at once."""
    with _replaced(ray._private.utils, set_sigterm_handler=lambda handler: None):
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.CRITICAL,
            configure_logging=verbose,
            **options,
        )


def _check_address(address: str) -> None:
    """Raise ConfigError if no cluster answers, since Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            "--address must be HOST:PORT of a Ray cluster, as `ray start --head` prints it, or "
            f"auto for the cluster of this machine. Received: --address {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
        # `ray.init` would say no more than that there is no cluster.
        GcsClient(address=address).internal_kv_keys(b"", None)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(_why_not_joined(address, error)) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"What answers there is not a Ray cluster: {first_line(error).rstrip('.')}. Received: "
            f"--address {address}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at this address: {error.strerror or error}. Expected: the "
            f"address that `ray status` or `ray start --head` prints. Received: --address {address}"
        ) from None


def _why_not_joined(address: str, error: Exception) -> str:
    """Return on one line what Ray's error means for the user."""
    said = " ".join(str(error).split())
    if "ersion mismatch" in said or "The cluster was started with" in said:
        return (
            "The cluster and this process must have the same Ray and Python: install the cluster's "
            f"versions here, or these versions there. Received: {said}"
        )
    if isinstance(error, ray.exceptions.AuthenticationError) or "nauthenticated" in said:
        return (
            f"The cluster at {address} requires a token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, as on its nodes. If the cluster has no token, "
            f"set RAY_AUTH_MODE=disabled. Received: {first_line(error).partition('. ')[0]}"
        )
    return (
        f"This machine cannot join the cluster at {address}: it must be one of its nodes "
        f"(`ray start --address`). Received: {type(error).__name__}: {said}"
    )


def check_ray() -> None:
    """Check that the Ray that `start_ray` started still runs.

    Call it before anything else is concluded from a failure: if Ray ends, all workers end with it,
    and after a while Ray ends the driver too, at any point of its code.

    Raises:
        WorkerError: one of its processes has ended.
    """
    node = ray._private.worker._global_node if _session.started_in is not None else None
    for name, process in node.dead_processes() if node is not None else ():
        if name in NEEDED:
            raise WorkerError(
                f"Ray's {name} ended (exit status {process.returncode}), and all workers with it: "
                "was it killed, or is the machine out of memory?"
            )


def stop_ray() -> None:
    """End the Ray that `start_ray` started and remove its files, or disconnect from the cluster
    that `join_ray` joined, which ends this run's actors there and nothing else."""
    if _session.has_joined:
        _session.has_joined = False
        ray.shutdown()
        ray._private.worker.print_to_stdstream = _print_of_ray
    if _session.started_in is None:
        return
    # Ray's processes write logs until they end.
    ray.shutdown(wait_for_processes=True)
    folder, lock = _session.started_in
    _session.started_in = None
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def private_folder() -> Path | None:
    """Return the folder of this run on this machine, None if Ray was not started here."""
    return _session.started_in[0] if _session.started_in else None


def make_private_folder() -> tuple[Path, int]:
    """Return a new folder that only its owner can enter, and the open lock that keeps it.

    Removes the folders of killed drivers: nobody holds their locks.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    longest = os.fsencode(base / "arena-12345678" / f"r{LONGEST_SOCKET}")
    if len(longest) > MAX_SOCKET_PATH_BYTES:
        base = Path("/tmp")
    for stale in base.glob(f"arena-*/{LOCK}"):
        _remove_if_stale(stale)
    # Lock it before it gets a name that other runs look for.
    fresh = Path(tempfile.mkdtemp(prefix=".arena-", dir=base))
    lock = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return fresh.rename(base / fresh.name.removeprefix(".")), lock


def _remove_if_stale(path: Path) -> None:
    folder = path.parent
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


@contextmanager
def _only_needed_servers(*, log_monitor: bool) -> Iterator[None]:
    """Within, Ray starts its GCS server and its raylet, and no other server.

    A run has no use for the autoscaler, nor for the dashboard, whose process Ray 2.60 starts even
    if it is switched off, nor for the two agents, which serve metrics and runtime environments.
    The agents take seconds to import. The raylet waits 15 s for the files with their ports and ends
    itself if they come later, as on a busy machine. It also ends if an agent does. So the files are
    written before it looks for them, and a process that does nothing replaces each agent.

    Args:
        log_monitor: also start the process that sends the workers' output to the driver.
    """
    start_process = services.start_ray_process

    def start_without_agents(command: list[str], kind: str, *rest: Any, **options: Any) -> Any:
        if kind == ray_constants.PROCESS_TYPE_RAYLET:
            flags = dict(part[2:].split("=", 1) for part in command if "=" in part)
            for name in PORTS_OF_AGENTS:
                Path(flags["session_dir"], f"{name}_{flags['node_id']}").write_text("1")
            agent = subprocess.list2cmdline([sys.executable, "-I", "-S", "-c", IDLE_AGENT])
            command = [re.sub(r"(?s)(--\w+_agent_command=).*", lambda found: found[1] + agent, part)
                       for part in command]  # fmt: skip
        return start_process(command, kind, *rest, **options)

    unneeded = ["start_monitor", "start_api_server"]
    if not log_monitor:
        unneeded.append("start_log_monitor")
    with (
        _replaced(ray._private.node.Node, **dict.fromkeys(unneeded, lambda self, **options: None)),
        _replaced(services, start_ray_process=start_without_agents),
    ):
        yield


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within, attributes of one of Ray's modules or classes have other values."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def find_devices() -> tuple[str, int]:
    """Return the kind of device to use and how many there are, without starting JAX here.

    JAX_PLATFORMS decides the kind if it is set, as it does for JAX itself.

    Raises:
        ConfigError: JAX_PLATFORMS names an unknown kind.
    """
    resources = ray.cluster_resources()
    found = {
        kind.name: int(resources.get(kind.resource, 0))
        for kind in KINDS.values()
        if not kind.is_host
    }
    platforms = os.environ.get("JAX_PLATFORMS", "")
    kind = named_by_jax(platforms) or next((name for name, count in found.items() if count), "cpu")
    if kind not in KINDS:
        *others, last = (known.platform for known in KINDS.values())
        raise ConfigError(
            f"JAX_PLATFORMS must begin with {', '.join(others)} or {last}. Received: "
            f"JAX_PLATFORMS={platforms}"
        )
    return kind, found.get(kind, 0)
