"""Actor shells: a process that holds a replica and answers calls. Ray and JAX meet only here.

`Replica` is a plain class: Ray runs it as an actor, `--mode single` in the driver's own process.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from runner.errors import WorkerError
from runner.records import BatchResult, CompileInfo, ModelSpec, ReplicaInfo, TokenTable
from sharding.batches import Batch, BatchShape
from sharding.topology import ReplicaSlot

# Share of a GPU that JAX takes at its start: the process has the card to itself.
GPU_MEMORY_FRACTION = "0.92"


def prepare_process(slot: ReplicaSlot, *, verbose: bool) -> None:
    """Tie this process to its device and quieten its libraries, before JAX starts.

    XLA sizes its CPU thread pool by the cores this process may use. TensorFlow is kept out: it
    would cost 600 MB and 3.5 s, and may take GPU memory.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    if slot.kind != "auto":
        os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}[slot.kind]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
    if slot.cores:
        os.environ["NPROC"] = str(len(slot.cores))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, slot.cores)
    for module in ("tensorflow", "tensorflow_text"):
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    if not verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        warnings.filterwarnings("ignore")


class Replica:
    """One copy of the weights, on one device, in this process."""

    def __init__(self, slot: ReplicaSlot, *, verbose: bool = False) -> None:
        prepare_process(slot, verbose=verbose)
        self._slot = slot
        self._predictor: Any = None
        self._tokens: TokenTable | None = None

    def ping(self) -> int:
        """Return the process id: the process is up."""
        return os.getpid()

    def load(self, spec: ModelSpec) -> ReplicaInfo:
        """Load preset, LoRA and head onto the device.

        Raises:
            DataError: the files do not fit each other.
            WorkerError: the device is not there.
        """
        started = time.perf_counter()
        device = _start_jax(self._slot.kind, spec.compilation_cache)
        from runner.loading import load_backbone
        from runner.predictor import Predictor, matmul_rate, resolve_dtype
        from runner.presets import read_head

        dtype = resolve_dtype(spec.dtype, device)
        backbone = load_backbone(spec.preset, spec.lora_weights, dtype=dtype)
        head = read_head(
            Path(spec.head_kernel),
            Path(spec.head_bias),
            hidden_dim=int(backbone.output.shape[-1]),
            classes=spec.classes,
        )
        self._predictor = Predictor(backbone, *head, pooling=spec.pooling)
        name = device.device_kind
        if self._slot.cores:
            name = f"cpu, cores {','.join(map(str, self._slot.cores))}"
        return ReplicaInfo(
            kind=device.platform,
            device=name,
            dtype=dtype,
            weight_bytes=self._predictor.weight_bytes,
            load_s=time.perf_counter() - started,
            matmul_flops_per_s=matmul_rate(dtype, device),
        )

    def hold_tokens(self, tokens: TokenTable) -> None:
        """Keep the token table, read from shared memory where there is some."""
        self._tokens = tokens

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Make the program for one shape."""
        return self._predictor.compile(shape)

    def predict(self, batch: Batch) -> BatchResult:
        """Return the probabilities of a batch; filler rows are left out."""
        assert self._tokens is not None, "this is a bug: no tokens before the first batch"
        started = time.perf_counter()
        tokens, lengths = self._tokens.batch_arrays(
            batch.rows, batch.shape.rows, batch.shape.length
        )
        probabilities = self._predictor.predict(tokens, lengths)[: len(batch.rows)]
        return BatchResult(
            batch=batch.index,
            rows=batch.rows,
            probabilities=probabilities,
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )


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
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        name = f"cpu-{threads or os.cpu_count()}" if device.platform == "cpu" else device.platform
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache, name)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return device
