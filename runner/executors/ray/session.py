"""Starts Ray for one run, closed to others, or joins a running cluster; counts the devices that Ray
found; stops Ray, or leaves the cluster as it was.

Does not know what runs on it. docs/security.md says what listens where.
"""

import atexit
import ipaddress
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]

import runner
from runner.common.errors import ConfigError, WorkerError, first_line
from runner.executors.ray.folders import make_private_folder
from runner.model.cpu_allocator import ENVIRONMENT
from sharding.kinds import KINDS, named_by_jax

# The Ray processes without which no worker can be started or reached.
NEEDED = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
# Files in a session's folder that tell the raylet the ports of its agents.
PORTS_OF_AGENTS = (
    *("metrics_agent_port", "metrics_export_port"),
    *("dashboard_agent_listen_port", "runtime_env_agent_port"),
)
# Replaces an agent: does nothing, and the kernel ends it with the raylet (see prctl(2)).
IDLE_AGENT = (
    "import ctypes, os, time\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "while str(os.getppid()) == os.environ['RAY_RAYLET_PID']: time.sleep(1)"
)
# Seconds in which a cluster must accept a connection; Ray itself would try for minutes.
ANSWERS_WITHIN_S = 5.0
# Prefixes of the driver's environment variables that workers on a cluster's nodes get too.
HANDED_ON = ("XLA_", "JAX_", "NCCL_", "ARENA_", "MALLOC_")


@dataclass
class _Session:
    """This process' Ray.

    Attributes:
        folder, lock: the private folder of the Ray that this process started, and its open lock.
        has_joined: whether this process has joined a cluster.
    """

    folder: Path | None = None
    lock: int = -1
    has_joined: bool = False


_session = _Session()
_print_of_ray = ray._private.worker.print_to_stdstream


def start_ray(num_cpus: int, *, verbose: bool) -> None:
    """Start a Ray on this machine that serves only this run; `stop_ray` stops it.

    Its servers listen on loopback, require a token that only this run's processes know, and keep
    their files in a folder that only the owner can read. Call this in the main thread: the kernel
    ends Ray's processes with the thread that started them.

    Raises:
        WorkerError: Ray does not start, or would listen to other machines.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray read both when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default, Ray starts workers at a low priority.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _turn_off_metrics()
    if _session.folder is None:
        atexit.register(stop_ray)
        _session.folder, _session.lock = make_private_folder()
    folder = _session.folder
    try:
        with (
            _loopback_as_address(),
            _signals_as_they_are(),
            _without_agents(log_monitor=verbose),
        ):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                configure_logging=verbose,
                # Ray opens this folder to all users (0777), but they cannot enter its parent.
                _temp_dir=str(folder / "r"),
            )
    except Exception as error:
        # Ray's errors have no common class.
        raise WorkerError(
            f"Ray did not start: {type(error).__name__}: {first_line(error)}. Check that there is "
            f"free memory, and free space in {folder.parent}. Ray's logs are in ray/ in the folder "
            "of logs."
        ) from error
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        stop_ray()
        raise WorkerError(
            f"Ray {ray.__version__} would listen to other machines. Expected: a loopback address, "
            f"as with Ray 2.60. Received: {address}. This is a bug."
        )


def join_ray(address: str, *, verbose: bool) -> None:
    """Become a driver of a running Ray cluster; `stop_ray` leaves the cluster as it was.

    Ray ships the code of `runner` and `sharding` to the nodes, which need only the dependencies in
    pyproject.toml. Ray itself finds the cluster's token: RAY_AUTH_MODE and its token file.

    Raises:
        ConfigError: there is no cluster, it requires a token, it has other versions, or this
            machine is not one of its nodes.
    """
    _check_address(address)
    code = Path(runner.__file__).resolve().parent
    if not verbose:
        # Ray prints the last log lines of a lost node's raylet, even if logging is off.
        ray._private.worker.print_to_stdstream = lambda *said, **how: None
    try:
        with _signals_as_they_are():
            ray.init(
                address=address,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                configure_logging=verbose,
                runtime_env={
                    "py_modules": [str(code), str(code.parent / "sharding")],
                    "env_vars": ENVIRONMENT
                    | {
                        name: value
                        for name, value in os.environ.items()
                        if name.startswith(HANDED_ON)
                    },
                },
            )
    except Exception as error:
        # Ray's errors have no common class.
        ray.shutdown()
        raise ConfigError(_why_not_joined(address, error)) from error
    _session.has_joined = True
    atexit.register(stop_ray)


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing answers; Ray would try for minutes first."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            "--address must be HOST:PORT of a Ray cluster (`ray start --head` prints it), or auto "
            f"for the cluster that this machine is in. Received: --address {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
        # A driver would only learn that there is no cluster.
        GcsClient(address=address).internal_kv_keys(b"", None)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(_why_not_joined(address, error)) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"The server at this address is not a Ray cluster: {first_line(error).rstrip('.')}. "
            f"Received: --address {address}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at this address: {error.strerror or error}. Expected: the "
            "address that `ray status` or `ray start --head` prints. Received: --address "
            f"{address}"
        ) from None


def _why_not_joined(address: str, error: Exception) -> str:
    """Return what Ray's error means, in one line."""
    said = " ".join(str(error).split())
    if "ersion mismatch" in said or "The cluster was started with" in said:
        return (
            "The cluster and this process must have the same Ray and Python versions; install "
            f"the cluster's here, or these there. Received: {said}"
        )
    if isinstance(error, ray.exceptions.AuthenticationError) or "nauthenticated" in said:
        return (
            f"The cluster at {address} requires a token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, as on its nodes. If the cluster has none, set "
            f"RAY_AUTH_MODE=disabled. Received: {first_line(error).partition('. ')[0]}"
        )
    return (
        f"This machine cannot join the cluster at {address}; it must be one of its nodes "
        f"(`ray start --address`). {type(error).__name__}: {said}"
    )


def _turn_off_metrics() -> None:
    """Prevent Ray's metrics servers, which require no token; port 65536 does not exist.

    Ray starts them if `ray[default]` or prometheus_client is installed.
    """
    os.environ.update(
        RAY_enable_metrics_collection="0",
        AUTOSCALER_METRIC_PORT="65536",
        DASHBOARD_METRIC_PORT="65536",
    )


def check_ray() -> None:
    """Check that the servers that `start_ray` started still run.

    Call this before a failure is blamed on a worker: all workers end with the servers, and a little
    later Ray ends the driver as well.

    Raises:
        WorkerError: a server has ended.
    """
    node = ray._private.worker._global_node if _session.folder is not None else None
    for name, process in node.dead_processes() if node is not None else ():
        if name in NEEDED:
            raise WorkerError(
                f"Ray's {name} ended (exit status {process.returncode}), and all workers with it. "
                "Was it killed, or is the machine out of memory?"
            )


def stop_ray() -> None:
    """Stop the Ray that `start_ray` started and remove its files, or leave the joined cluster.

    Leaving a cluster ends this run's actors there and nothing else.
    """
    if _session.has_joined:
        _session.has_joined = False
        ray.shutdown()
        ray._private.worker.print_to_stdstream = _print_of_ray
    if _session.folder is None:
        return
    # Its processes write logs until they end.
    ray.shutdown(wait_for_processes=True)
    folder, _session.folder = _session.folder, None
    shutil.rmtree(folder, ignore_errors=True)
    os.close(_session.lock)


def private_folder() -> Path | None:
    """Return the folder of this run on this machine, None if Ray was not started here."""
    return _session.folder


@contextmanager
def _loopback_as_address() -> Iterator[None]:
    """Make Ray use 127.0.0.1 as this machine's address, as it does on macOS and Windows.

    Ray 2.60 binds its servers to every interface unless their node's address is a loopback
    address. It resolves `_node_ip_address="127.0.0.1"` to the machine's address unless this
    constant says that there is no cluster. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER sets the constant as
    well, but only while ray is imported, and it would apply to joined clusters too.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_agents(*, log_monitor: bool) -> Iterator[None]:
    """Let Ray start only its GCS server and its raylet.

    Ray 2.60 also starts an autoscaler, a dashboard process (even if the dashboard is off) and two
    agents, which take seconds to import. The raylet waits 15 s for files with the agents' ports and
    exits if they come later, as on a busy machine; it also exits if either agent ends. A run needs
    none of them: they serve metrics and runtime environments. So this writes the port files before
    the raylet looks for them, and gives the raylet idle processes in place of its agents, which it
    insists on.

    Args:
        log_monitor: whether to start the process that forwards workers' logs to the driver.
    """
    node, services = ray._private.node.Node, ray._private.services
    before = {name: getattr(node, name) for name in ("start_monitor", "start_api_server")}
    if not log_monitor:
        before["start_log_monitor"] = node.start_log_monitor
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

    try:
        for name in before:
            setattr(node, name, lambda self, **options: None)
        services.start_ray_process = start_without_agents
        yield
    finally:
        services.start_ray_process = start_process
        for name, method in before.items():
            setattr(node, name, method)


@contextmanager
def _signals_as_they_are() -> Iterator[None]:
    """Keep Ray from handling SIGTERM: its handler would end the process at once."""
    before = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = before


def find_devices() -> tuple[str, int]:
    """Return the kind of device to use and the number of devices, without starting JAX here.

    JAX_PLATFORMS selects the kind if it is set, as it does for JAX itself.

    Raises:
        ConfigError: JAX_PLATFORMS names an unknown kind.
    """
    resources = ray.cluster_resources()
    found = {
        kind.name: int(resources.get(kind.resource, 0))
        for kind in KINDS.values()
        if not kind.is_host
    }
    kind = named_by_jax(os.environ.get("JAX_PLATFORMS", ""))
    if not kind:
        kind = next((name for name, count in found.items() if count), "cpu")
    if kind not in KINDS:
        *others, last = (known.platform for known in KINDS.values())
        raise ConfigError(
            f"JAX_PLATFORMS must be {', '.join(others)} or {last}. Received: "
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
        )
    return kind, found.get(kind, 0)
