"""A fresh process -> one that is tied to its device, with JAX started and its group met.

Does not know what is computed in it. The only file of this room that names Ray.
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

# Share of a GPU that JAX takes at its start: the process has the card to itself.
GPU_MEMORY_FRACTION = "0.92"
# Seconds in which all members of a group must have come to its address.
GROUP_MEETS_WITHIN_S = 120
# Of prctl(2): the signal to get when the parent ends.
PR_SET_PDEATHSIG = 1
# What XLA, CUDA and the host say in an error where memory is short.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


def prepare_process(slot: WorkerSlot, *, verbose: bool) -> None:
    """Tie this process to its device and quieten its libraries, before JAX starts.

    XLA sizes its CPU thread pool by the cores this process may use. TensorFlow is kept out: it
    would cost 600 MB and 3.5 s, and may take GPU memory.
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
    """Return the address of this machine, as the cluster knows it."""
    import ray

    return str(ray.util.get_node_ip_address())


def _end_with_ray() -> None:
    """Let the kernel end this process when Ray's raylet, its parent, ends: a worker that hangs or
    is stopped would not hear of it and keep its device. Nothing where Ray has not started it."""
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None or str(os.getppid()) != raylet or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if str(os.getppid()) != raylet:
        os._exit(1)  # it ended a moment ago


@contextmanager
def memory_errors() -> Iterator[None]:
    """Within, what JAX raises where memory is short becomes a DeviceMemoryError."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        # XlaRuntimeError is a RuntimeError.
        is_memory = isinstance(error, MemoryError)
        if is_memory or any(words in str(error) for words in OUT_OF_MEMORY):
            raise DeviceMemoryError(first_line(error)) from error
        raise


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident, in bytes.

    VmHWM, not ru_maxrss: the latter is inherited from the process that forked this one.
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
    """Make JAX see the devices of all members as one mesh; blocks until all have come."""
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
    """Else gloo listens on the address that the machine's own name stands for, if it has one."""
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
    """Start JAX on this process' device and return it."""
    import jax

    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        extra = (KINDS[kind].extra if kind in KINDS else "") or kind
        raise WorkerError(
            f"There is a {kind}, but JAX cannot use it: {error}. Install the extra for it, "
            f"'arena-runner[{extra}]', or set JAX_PLATFORMS=cpu."
        ) from error
    if compilation_cache is not None:
        # XLA divides a CPU program for the threads it finds when it compiles, but JAX's cache key
        # does not hold their number: one core's program ran 1.4 times slower on two cores.
        threads = os.environ.get("NPROC") or len(cores_here())
        name = f"cpu-{threads}" if device.platform == "cpu" else device.platform
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache, name)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return device
