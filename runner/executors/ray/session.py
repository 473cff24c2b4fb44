"""Ray itself: started for one run alone and closed to others, or joined where it runs already;
asked what devices it found; ended, or left as it was.

Does not know what runs on it. docs/security.md says what listens where.
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
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]

import runner
from runner.common.errors import ConfigError, WorkerError, first_line
from runner.model.cpu_allocator import ENVIRONMENT
from sharding.kinds import KINDS, named_by_jax

# What Ray adds to its folder's path for a socket, and the longest path that a socket may have.
LONGEST_SOCKET = "/session_2026-11-24_12-00-00_123456_4194304/sockets/plasma_store"
MAX_SOCKET_PATH_BYTES = 103
# In the folder of a run, locked for as long as its driver lives.
LOCK = "arena-runner.lock"
# Of Ray's processes, those without which no worker can be reached or started.
NEEDED = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
# Files in a session's folder from which a raylet knows where its agents listen.
PORTS_OF_AGENTS = (
    *("metrics_agent_port", "metrics_export_port"),
    *("dashboard_agent_listen_port", "runtime_env_agent_port"),
)
# Stands for an agent: does nothing until the raylet ends, by the kernel's word (see prctl(2)).
IDLE_AGENT = (
    "import ctypes, os, time\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "while str(os.getppid()) == os.environ['RAY_RAYLET_PID']: time.sleep(1)"
)
# Seconds in which a cluster must take a connection: Ray itself would try for minutes.
ANSWERS_WITHIN_S = 5.0
# Of the driver's environment, what reaches the workers on the nodes of a cluster too.
HANDED_ON = ("XLA_", "JAX_", "NCCL_", "ARENA_", "MALLOC_")

_folder: tuple[Path, int] | None = None
_has_joined = False
_print_of_ray = ray._private.worker.print_to_stdstream


def start_ray(num_cpus: int, *, verbose: bool) -> None:
    """Start Ray on this machine for this run alone; `stop_ray` ends it.

    Its servers listen on loopback, want a token that only this run's processes know, and keep
    their files where only the owner looks. Must run in the main thread: the kernel ends Ray's
    processes with the thread that started them.

    Raises:
        WorkerError: Ray does not start, or would listen to other machines.
    """
    global _folder
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Both were read when ray was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its workers at the lowest priority but one; ours are the work itself.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _switch_off_figures()
    if _folder is None:
        atexit.register(stop_ray)
        _folder = make_private_folder()
    try:
        with (
            _loopback_as_address(),
            _signals_as_they_are(),
            _servers_alone(log_monitor=verbose),
        ):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                configure_logging=verbose,
                # Ray opens its own folder to all users (0777); they do not get past the one above.
                _temp_dir=str(_folder[0] / "r"),
            )
    except Exception as error:
        # What it raises has no common class; nothing but Ray ran in there.
        raise WorkerError(
            f"Ray did not start: {type(error).__name__}: {first_line(error)}. Is there memory and "
            f"room in {_folder[0].parent}? Its logs lie in ray/, in the folder of logs."
        ) from error
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        stop_ray()
        raise WorkerError(
            f"Ray {ray.__version__} would listen to other machines: expected that it takes a "
            f"loopback address for its own. Received: {address}. This is a bug; Ray 2.60 does it."
        )


def join_ray(address: str, *, verbose: bool) -> None:
    """Become a driver of a Ray cluster that runs already; `stop_ray` leaves it as it was.

    The code of `runner` and `sharding` goes with the run: nodes need what pyproject.toml depends
    on, and nothing of ours. Tokens are Ray's own matter: RAY_AUTH_MODE and its token file.

    Raises:
        ConfigError: there is no cluster, it lets nobody in without its token, its versions are
            others, or this machine is not one of its nodes.
    """
    global _has_joined
    _check_address(address)
    code = Path(runner.__file__).resolve().parent
    if not verbose:
        # Ray shows the last words of a lost node's raylet, whatever it was told of logs.
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
        # What it raises has no common class, and none of it is about what we asked for.
        ray.shutdown()
        raise ConfigError(_why_not_joined(address, error)) from error
    _has_joined = True
    atexit.register(stop_ray)


def _check_address(address: str) -> None:
    """Raise ConfigError if nothing answers, before Ray tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            "--address must be HOST:PORT of a Ray cluster (`ray start --head` prints it), or auto "
            f"for the one that this machine is a node of. Received: --address {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
        # As a driver Ray would say no more than that there is no cluster.
        GcsClient(address=address).internal_kv_keys(b"", None)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(_why_not_joined(address, error)) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"What answers there is no Ray cluster: {first_line(error).rstrip('.')}. Received: "
            f"--address {address}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers there: {error.strerror or error}. Expected: the address that "
            f"`ray status` or `ray start --head` prints. Received: --address {address}"
        ) from None


def _why_not_joined(address: str, error: Exception) -> str:
    """Return what Ray's error means, in a line."""
    said = " ".join(str(error).split())
    if "ersion mismatch" in said or "The cluster was started with" in said:
        return (
            "The cluster and this process must have the same Ray and Python; install the cluster's "
            f"here, or these there. Received: {said}"
        )
    if isinstance(error, ray.exceptions.AuthenticationError) or "nauthenticated" in said:
        return (
            f"The cluster at {address} asks for its token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, as on its nodes; a cluster without one wants "
            f"RAY_AUTH_MODE=disabled. Received: {first_line(error).partition('. ')[0]}"
        )
    return (
        f"This machine cannot join the cluster at {address}; it must be one of its nodes "
        f"(`ray start --address`). {type(error).__name__}: {said}"
    )


def _switch_off_figures() -> None:
    """Start no servers of Ray's own figures: they ask for no token. There is no port 65536.

    They come with `ray[default]`, or if prometheus_client is installed.
    """
    os.environ.update(
        RAY_enable_metrics_collection="0",
        AUTOSCALER_METRIC_PORT="65536",
        DASHBOARD_METRIC_PORT="65536",
    )


def check_ray() -> None:
    """Look whether the processes of the Ray that `start_ray` started still live.

    To be asked before anything else is made of a failure: with them go all workers, and after a
    while Ray ends the driver too, wherever it is.

    Raises:
        WorkerError: one has ended.
    """
    node = ray._private.worker._global_node if _folder is not None else None
    for name, process in node.dead_processes() if node is not None else ():
        if name in NEEDED:
            raise WorkerError(
                f"Ray's {name} ended (exit status {process.returncode}), and all workers with it: "
                "was it killed, or is the machine out of memory?"
            )


def stop_ray() -> None:
    """End the Ray that `start_ray` started, if it did, and remove what it left on disk; or leave
    the cluster that `join_ray` joined, which ends this run's actors there and nothing else."""
    global _folder, _has_joined
    if _has_joined:
        _has_joined = False
        ray.shutdown()
        ray._private.worker.print_to_stdstream = _print_of_ray
    if _folder is None:
        return
    # Its processes write logs to their end.
    ray.shutdown(wait_for_processes=True)
    folder, lock = _folder
    _folder = None
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def private_folder() -> Path | None:
    """Return the folder of this run on this machine, None if Ray was not started here."""
    return _folder[0] if _folder else None


def make_private_folder() -> tuple[Path, int]:
    """Return a new folder that only the owner can enter, and the open lock that keeps it.

    Folders whose driver was killed are removed: nobody holds their lock.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if len(os.fsencode(base / "arena-12345678" / "r")) + len(LONGEST_SOCKET) > (
        MAX_SOCKET_PATH_BYTES
    ):
        base = Path("/tmp")
    for stale in base.glob(f"arena-*/{LOCK}"):
        _remove_if_stale(stale)
    # Locked before it has a name that is looked for.
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
def _loopback_as_address() -> Iterator[None]:
    """Make Ray take 127.0.0.1 for this machine's address, as it does on macOS and Windows.

    Ray 2.60 binds its servers to every interface unless the address of their node is a loopback
    one, and resolves `_node_ip_address="127.0.0.1"` back to the machine's own unless this constant
    says that there is no cluster. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER sets it too, but is read when
    ray is imported, and would hold for a cluster that is joined.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _servers_alone(*, log_monitor: bool) -> Iterator[None]:
    """Let Ray start its GCS server and its raylet, and nothing beside them.

    There are no machines to start here, so no autoscaler is needed. Ray 2.60 starts the process of
    its dashboard even if the dashboard is off, and two agents, which import for seconds: the
    raylet waits 15 s for the files with their ports, ends itself if they come later, as on a busy
    machine, and ends with either agent. No run of ours asks them anything: they serve figures and
    runtime environments. So the files are written before the raylet looks for them, and a process
    that does nothing stands for each agent, which the raylet insists on.

    Args:
        log_monitor: also start the process that hands on to the driver what workers log.
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
    """Keep Ray from taking SIGTERM: its handler ends the process in the midst of what it does."""
    before = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = before


def find_devices() -> tuple[str, int]:
    """Return the kind of device to use and how many there are, without starting JAX here.

    JAX_PLATFORMS decides the kind if it is set, as it does for JAX itself.

    Raises:
        ConfigError: JAX_PLATFORMS names a kind that is not known here.
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
        raise ConfigError(
            f"Devices are cpu, cuda or tpu. Received: JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
        )
    return kind, found.get(kind, 0)
