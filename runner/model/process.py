"""A new process -> one bound to its device, with JAX started and its group joined.

Does not know what it will compute. Only this file of the room names Ray.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.common.errors import DeviceMemoryError, WorkerError, first_line
from runner.common.machine import cores_here
from runner.model import cpu_allocator
from sharding.kinds import KINDS
from sharding.topology import WorkerSlot

# The share of a GPU's memory that JAX allocates at start; no other process uses the GPU.
GPU_MEMORY_FRACTION = "0.92"
# How long the members of a group may take to connect to its address.
GROUP_MEETS_WITHIN_S = 120
# An option of prctl(2): which signal to receive when the parent ends.
PR_SET_PDEATHSIG = 1
# Words in the errors of XLA, CUDA and the host when they are out of memory.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


def prepare_process(slot: WorkerSlot, *, verbose: bool) -> None:
    """Bind this process to its device and silence its libraries, before JAX starts.

    XLA sizes its CPU thread pool by the cores that this process may use. TensorFlow is not
    imported: it would take 600 MB and 3.5 s, and may take GPU memory.
    """
    _end_with_ray()
    cpu_allocator.use_one_heap()
    os.environ["KERAS_BACKEND"] = "jax"
    if slot.kind != "auto":
        os.environ["JAX_PLATFORMS"] = KINDS[slot.kind].platform
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
    is_host = slot.kind != "auto" and KINDS[slot.kind].is_host
    if is_host and (slot.cores or slot.node):
        os.environ["NPROC"] = str(len(slot.cores) or slot.cpus)
        if slot.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, slot.cores)
    for module in ("tensorflow", "tensorflow_text"):
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        warnings.filterwarnings("ignore")


def address_here() -> str:
    """Return this machine's address in the Ray cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def _end_with_ray() -> None:
    """Let the kernel kill this process when its parent, Ray's raylet, ends.

    Otherwise a worker that hangs or is stopped would not notice and would keep its device. Does
    nothing if Ray did not start the process.
    """
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None or str(os.getppid()) != raylet or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if str(os.getppid()) != raylet:
        os._exit(1)  # the raylet ended before the call


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn JAX's out-of-memory errors into DeviceMemoryError."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        # XlaRuntimeError is a RuntimeError.
        is_memory = isinstance(error, MemoryError)
        if is_memory or any(words in str(error) for words in OUT_OF_MEMORY):
            raise DeviceMemoryError(first_line(error)) from error
        raise


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    Reads VmHWM, since a forked process inherits its parent's ru_maxrss.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def join_group(address: str, group_size: int, member: int) -> None:
    """Connect JAX to all members, so that it sees their devices; wait until all have joined.

    Args:
        address: host:port of member 0.
    """
    import jax

    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    on_one_machine = address.startswith(("127.0.0.1:", "unix:"))
    if on_one_machine:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=group_size,
        process_id=member,
        coordinator_bind_address=address if member == 0 else None,
        initialization_timeout=GROUP_MEETS_WITHIN_S,
    )
    if os.environ["JAX_PLATFORMS"] == "cpu":
        _keep_gloo_at("127.0.0.1" if on_one_machine else address_here())


def _keep_gloo_at(host: str) -> None:
    """Let gloo listen on `host`, not on the address that the machine's name resolves to."""
    from functools import partial

    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    collectives = _jax.make_gloo_tcp_collectives(
        distributed_client=distributed.global_state.client, hostname=host
    )
    xla_bridge.register_backend_factory(
        "cpu",
        partial(xla_bridge.make_cpu_client, collectives),
        priority=0,
        fail_quietly=False,
    )


def start_jax(kind: str, compilation_cache: str | None) -> Any:
    """Start JAX on this process' device and return the device.

    Args:
        kind: a key of `KINDS`, or auto. compilation_cache: a folder, None for no cache.

    Raises:
        WorkerError: JAX cannot use the device.
    """
    import jax

    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        extra = (KINDS[kind].extra if kind in KINDS else "") or kind
        raise WorkerError(
            f"There is a {kind}, but JAX cannot use it: {error}. Install 'arena-runner[{extra}]', "
            "or set JAX_PLATFORMS=cpu."
        ) from error
    if compilation_cache is not None:
        # XLA compiles a CPU program for a number of threads, which is not in JAX's cache key: a
        # program compiled for one core took 1.4 times as long on two.
        threads = os.environ.get("NPROC") or len(cores_here())
        name = f"cpu-{threads}" if device.platform == "cpu" else device.platform
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache, name)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return device
