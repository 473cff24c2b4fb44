"""Actor shells: a process that holds a replica and answers calls. Ray and JAX meet only here.

`Replica` is a plain class: Ray runs it as an actor, `--mode single` in the driver's own process.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import DeviceMemoryError, WorkerError, first_line
from runner.common.machine import cores_here
from runner.common.records import (
    Activations,
    BatchResult,
    CompileInfo,
    Head,
    ModelSpec,
    TokenTable,
    Work,
    WorkerInfo,
)
from runner.model import cpu_allocator
from runner.model.injected_faults import InjectedFaults
from runner.telemetry.logs import write_to_folder
from sharding.batches import Batch, BatchShape
from sharding.stages import Stage
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
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}[slot.kind]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
    if slot.kind == "cpu" and (slot.cores or slot.node):
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


class Replica:
    """One copy of the weights, on one device, in this process.

    `predict` may be called from two threads and `compile` from a third: the next batch is on the
    device before the last has finished, and batches run while later shapes compile.
    """

    def __init__(
        self, slot: WorkerSlot, *, verbose: bool = False, log_folder: str | None = None
    ) -> None:
        write_to_folder(log_folder, slot.replica, slot.member)
        prepare_process(slot, verbose=verbose)
        self._slot = slot
        self._predictor: Any = None
        self._tokens: TokenTable | None = None
        self._injected = InjectedFaults(slot.replica)
        self._clock = threading.Lock()
        self._last_end = 0.0

    def ping(self) -> str:
        """Return the address of this worker's machine: the process is up."""
        return address_here()

    def find_device(self, dtype: str, compilation_cache: str | None) -> tuple[str, str]:
        """Start JAX; return the kind of its device and what `dtype` means there.

        Raises:
            WorkerError: the device is not there.
        """
        device = _start_jax(self._slot.kind, compilation_cache)
        from runner.model.predictor import resolve_dtype

        return device.platform, resolve_dtype(dtype, device)

    def load(self, spec: ModelSpec) -> WorkerInfo:
        """Load preset, LoRA and head onto the device.

        Raises:
            DataError: the files do not fit each other.
            WorkerError: the device is not there.
        """
        started = time.perf_counter()
        device = _start_jax(self._slot.kind, spec.compilation_cache)
        from runner.model.loading import load_backbone
        from runner.model.predictor import Predictor, resolve_dtype

        before = peak_rss_bytes()
        dtype = resolve_dtype(spec.dtype, device, is_int8=spec.is_int8)
        backbone = load_backbone(
            spec.preset, spec.lora_weights, dtype=dtype, quantization=spec.quantization
        )
        self._predictor = Predictor(
            backbone, load_head(spec, backbone), pooling=spec.pooling, output=spec.head
        )
        return self._introduce(device, dtype, started, before)

    def hold_tokens(self, tokens: TokenTable) -> None:
        """Keep the token table, read from shared memory where there is some."""
        self._tokens = tokens

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Make the program for one shape.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        with _memory_errors():
            return self._predictor.compile(shape)

    def predict(self, batch: Batch) -> BatchResult:
        """Return the probabilities of a batch; filler rows are left out.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        started = time.perf_counter()
        with _memory_errors():
            self._injected.before(batch)
            tokens, lengths = self._arrays(batch)
            probabilities = self._predictor.predict(tokens, lengths)[: len(batch.rows)]
        took = time.perf_counter() - started
        probabilities = self._injected.after(batch, probabilities, took)
        work = (self._work_since(started),)
        return BatchResult(batch, self._slot.replica, probabilities, work)

    def predict_in_float(self, spec: ModelSpec, batch: Batch) -> np.ndarray:
        """Return a batch's probabilities in float32, by Keras' own layers, one after the other.

        The weights are read again, a decoder layer at a time: slow, and never the whole model.
        """
        tokens, lengths = self._arrays(batch)
        probabilities = predict_in_float(spec, tokens, lengths)[: len(batch.rows)]
        return self._injected.after(batch, probabilities, 0.0, wide=True)

    def _work_since(self, started: float, sent_bytes: int = 0) -> Work:
        """Return the work of a batch that ends now. A batch waits on the device while the one
        before computes: that time is the other's."""
        with self._clock:
            ended = time.perf_counter()
            seconds, self._last_end = ended - max(started, self._last_end), ended
        return Work(seconds, peak_rss_bytes(), sent_bytes, time.time())

    def _arrays(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        assert self._tokens is not None, "this is a bug: no tokens before the first batch"
        return self._tokens.batch_arrays(batch.rows, batch.shape.rows, batch.shape.length)

    def _introduce(
        self, device: Any, dtype: str, started: float, before: int, notes: tuple[str, ...] = ()
    ) -> WorkerInfo:
        from runner.model.predictor import matmul_rate

        if device.platform == "cpu":
            cpu_allocator.keep_work_space()
        load_s = time.perf_counter() - started
        name = device.device_kind
        if self._slot.cores:
            name = f"cpu, cores {','.join(map(str, self._slot.cores))}"
        elif self._slot.node and self._slot.kind == "cpu":
            name = f"cpu, {self._slot.cpus} of its node's"
        return WorkerInfo(
            kind=device.platform,
            device=name,
            dtype=dtype,
            weight_bytes=self._predictor.weight_bytes,
            rss_after_imports_bytes=before,
            load_s=load_s,
            matmul_flops_per_s=matmul_rate(dtype, device),
            attention=self._predictor.way,
            notes=notes + self._predictor.notes,
        )


class PipelineStage(Replica):
    """Some of a replica's layers; what it computes goes on to the next stage."""

    def load(self, spec: ModelSpec, stage: Stage | None = None) -> WorkerInfo:
        """Load the weights of one stage, and the head where it is the last.

        Raises:
            DataError: the files do not fit each other.
            WorkerError: the device is not there.
        """
        assert stage is not None, "this is a bug: a stage must know its layers"
        started = time.perf_counter()
        device = _start_jax(self._slot.kind, spec.compilation_cache)
        from runner.model.loading import (
            build_backbone,
            cut_stage,
            fill,
            locate_weights,
            place_whole,
        )
        from runner.model.predictor import Predictor, resolve_dtype

        before = peak_rss_bytes()
        dtype = resolve_dtype(spec.dtype, device, is_int8=spec.is_int8)
        backbone = build_backbone(spec.preset, dtype=dtype)
        model = cut_stage(backbone, stage.start, stage.stop)
        stored = locate_weights(backbone, spec.preset, spec.lora_weights)
        fill(model, stored, place_whole, quantization=spec.quantization)
        is_last = stage.stop == len(backbone.transformer_layers)
        head = load_head(spec, backbone) if is_last else None
        output = spec.head if is_last else "hidden"
        self._predictor = Predictor(model, head, pooling=spec.pooling, output=output)
        return self._introduce(device, dtype, started, before)

    def begin(self, batch: Batch) -> Activations:
        """The first stage: token ids in, hidden states out."""
        started = time.perf_counter()
        with _memory_errors():
            self._injected.before(batch)
            tokens, lengths = self._arrays(batch)
            hidden = self._predictor.predict(tokens, lengths)
        return Activations(hidden, lengths, (self._work_since(started, hidden.nbytes),))

    def carry_on(self, activations: Activations) -> Activations:
        """A stage between: hidden states in and out."""
        started = time.perf_counter()
        with _memory_errors():
            hidden = self._predictor.predict(activations.hidden, activations.lengths)
        work = (*activations.work, self._work_since(started, hidden.nbytes))
        return Activations(hidden, activations.lengths, work)

    def finish(self, batch: Batch, activations: Activations) -> BatchResult:
        """The last stage: hidden states in, probabilities out."""
        started = time.perf_counter()
        with _memory_errors():
            output = self._predictor.predict(activations.hidden, activations.lengths)
        took = time.perf_counter() - started
        probabilities = self._injected.after(batch, output[: len(batch.rows)], took)
        work = (*activations.work, self._work_since(started))
        return BatchResult(batch, self._slot.replica, probabilities, work)


class TensorMember(Replica):
    """A slice of every large weight; all members of the group compute each batch together."""

    def reserve_address(self, host: str) -> str:
        """Return a free port of this machine's `host` address, where the group can meet."""
        with socket.socket() as server:
            server.bind((host, 0))
            return f"{host}:{server.getsockname()[1]}"

    def load(
        self, spec: ModelSpec, address: str = "", group_size: int = 0, family: str = ""
    ) -> WorkerInfo:
        """Meet the group and load this member's slices.

        Raises:
            ConfigError: a weight cannot be split over the group.
            DataError: the files do not fit each other.
            WorkerError: the device is not there.
        """
        started = time.perf_counter()
        _join_group(address, group_size, self._slot.member)
        device = _start_jax(self._slot.kind, spec.compilation_cache)
        import keras

        from runner.model.loading import build_backbone, fill, locate_weights
        from runner.model.predictor import Predictor, resolve_dtype
        from runner.model.tensor_parallel import audit, lay_out_backbone, place_slices
        from sharding.mesh import distribute

        before = peak_rss_bytes()
        dtype = resolve_dtype(spec.dtype, device, is_int8=spec.is_int8)
        keras.utils.set_random_seed(0)
        backbone = build_backbone(spec.preset, dtype=dtype)
        layouts = lay_out_backbone(backbone, family, group_size)
        distribution, replicated = distribute(layouts, group_size)
        stored = locate_weights(backbone, spec.preset, spec.lora_weights)
        fill(backbone, stored, place_slices(distribution))
        notes = audit(backbone, layouts)
        self._predictor = Predictor(
            backbone,
            load_head(spec, backbone),
            pooling=spec.pooling,
            output=spec.head,
            replicated=replicated,
        )
        return self._introduce(device, dtype, started, before, notes)


def predict_in_float(spec: ModelSpec, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return float32 (rows, classes): what a float preset says of tokens int32 (rows, length)."""
    from runner.model.loading import float_parts
    from runner.model.predictor import Predictor

    values = tokens
    for part, is_last in float_parts(spec.preset, spec.lora_weights):
        head = load_head(spec, part) if is_last else None
        output = spec.head if is_last else "hidden"
        predictor = Predictor(part, head, pooling=spec.pooling, output=output, way="keras")
        values = predictor.predict(values, lengths)
        del predictor
    return values


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Within, what JAX raises where memory is short becomes a DeviceMemoryError."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        # XlaRuntimeError is a RuntimeError.
        is_memory = isinstance(error, MemoryError)
        if is_memory or any(words in str(error) for words in OUT_OF_MEMORY):
            raise DeviceMemoryError(first_line(error)) from error
        raise


def load_head(spec: ModelSpec, backbone: Any) -> Head | None:
    """Return the head that is named, else the preset's own; None where the pooled states are asked
    for.

    Raises:
        DataError: it is damaged, or does not fit.
    """
    if spec.head == "none":
        return None
    from runner.preset.classifiers import read_own_head
    from runner.preset.reader import read_head

    output = backbone.output
    hidden = output["sequence_output"] if isinstance(output, dict) else output
    sizes = {"hidden_dim": int(hidden.shape[-1]), "classes": spec.classes}
    if spec.head_kernel is None or spec.head_bias is None:
        return read_own_head(Path(spec.preset), **sizes)
    return read_head(Path(spec.head_kernel), Path(spec.head_bias), **sizes)


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


def _join_group(address: str, group_size: int, member: int) -> None:
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


def _start_jax(kind: str, compilation_cache: str | None) -> Any:
    """Start JAX on this process' device and return it."""
    import jax

    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:
        raise WorkerError(
            f"There is a {kind}, but JAX cannot use it: {error}. Install the extra for it, "
            f"'arena-runner[{ {'gpu': 'cuda'}.get(kind, kind) }]', or set JAX_PLATFORMS=cpu."
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
