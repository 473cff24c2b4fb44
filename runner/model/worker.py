"""Batches -> probabilities, in a worker that holds a whole replica.

`Replica` is a plain class: Ray runs it as an actor, `--mode single` in the driver's process. Does
not know Ray, the order of rows or the other workers.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.records import (
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
from runner.model.process import (
    address_here,
    memory_errors,
    peak_rss_bytes,
    prepare_process,
    start_jax,
)
from runner.telemetry.logs import write_to_folder
from sharding.batches import Batch, BatchShape
from sharding.kinds import KINDS
from sharding.topology import WorkerSlot


class Replica:
    """One copy of the weights, on one device, in this process.

    Two threads may call `predict` and a third `compile`. The next batch is then on the device
    before the last one has finished, and batches run while later shapes compile.

    Args:
        log_folder: where to write this process' output, None to leave it unchanged.
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
        """Return the address of this worker's machine, to show that the process has started."""
        return address_here()

    def find_device(self, dtype: str, compilation_cache: str | None) -> tuple[str, str]:
        """Start JAX; return the kind of its device and the dtype that `dtype` means there.

        Raises:
            WorkerError: JAX cannot use the device.
        """
        device = start_jax(self._slot.kind, compilation_cache)
        from runner.model.predictor import resolve_dtype

        return device.platform, resolve_dtype(dtype, device)

    def load(self, spec: ModelSpec) -> WorkerInfo:
        """Load preset, LoRA and head onto the device.

        Raises:
            DataError: the files do not fit each other.
            WorkerError: JAX cannot use the device.
        """
        return self._load(spec, partial(_whole_predictor, spec))

    def hold_tokens(self, tokens: TokenTable) -> None:
        """Keep the token table of the run, which Ray's workers read from shared memory."""
        self._tokens = tokens

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Compile the program for one shape.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        with memory_errors():
            return self._predictor.compile(shape)

    def predict(self, batch: Batch) -> BatchResult:
        """Return the probabilities of a batch, without its filler rows.

        Raises:
            DeviceMemoryError: the device has no room for it.
        """
        started = time.perf_counter()
        with memory_errors():
            self._injected.before(batch)
            tokens, lengths = self._arrays(batch)
            probabilities = self._predictor.predict(tokens, lengths)[: len(batch.rows)]
        took = time.perf_counter() - started
        probabilities = self._injected.after(batch, probabilities, took)
        work = (self._work_since(started),)
        return BatchResult(batch, self._slot.replica, probabilities, work)

    def predict_in_float(self, spec: ModelSpec, batch: Batch) -> np.ndarray:
        """Return a batch's probabilities by `predict_in_float`, float32 (rows, classes)."""
        tokens, lengths = self._arrays(batch)
        probabilities = predict_in_float(spec, tokens, lengths)[: len(batch.rows)]
        return self._injected.after(batch, probabilities, 0.0, wide=True)

    def _work_since(self, started: float, sent_bytes: int = 0) -> Work:
        """Return the work of a batch that ends now, not counting its wait for the batch before."""
        with self._clock:
            ended = time.perf_counter()
            seconds, self._last_end = ended - max(started, self._last_end), ended
        return Work(seconds, peak_rss_bytes(), sent_bytes, time.time())

    def _arrays(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        assert self._tokens is not None, "this is a bug: no tokens before the first batch"
        return self._tokens.batch_arrays(batch.rows, batch.shape.rows, batch.shape.length)

    def _load(
        self, spec: ModelSpec, make: Callable[[str], Any], join: Callable[[], None] | None = None
    ) -> WorkerInfo:
        """Join the worker's group, if there is one, start JAX, and make the predictor.

        make: dtype -> the predictor.
        """
        started = time.perf_counter()
        if join is not None:
            join()
        device = start_jax(self._slot.kind, spec.compilation_cache)
        from runner.model.predictor import matmul_rate, resolve_dtype

        before = peak_rss_bytes()
        dtype = resolve_dtype(spec.dtype, device)
        self._predictor = make(dtype)
        if KINDS[device.platform].is_host:
            cpu_allocator.keep_work_space()
        load_s = time.perf_counter() - started
        return WorkerInfo(
            kind=device.platform,
            device=self._device_name(device),
            dtype=dtype,
            weight_bytes=self._predictor.weight_bytes,
            rss_after_imports_bytes=before,
            load_s=load_s,
            matmul_flops_per_s=matmul_rate(dtype, device),
            attention=self._predictor.way,
            notes=self._predictor.notes,
        )

    def _device_name(self, device: Any) -> str:
        if self._slot.cores:
            return f"cpu, cores {','.join(map(str, self._slot.cores))}"
        if self._slot.node and KINDS[self._slot.kind].is_host:
            return f"cpu, {self._slot.cpus} of its node's"
        name: str = device.device_kind
        return name


def _whole_predictor(spec: ModelSpec, dtype: str) -> Any:
    from runner.model.loading import load_backbone
    from runner.model.predictor import Predictor

    backbone = load_backbone(
        spec.preset, spec.lora_weights, dtype=dtype, quantization=spec.quantization
    )
    return Predictor(backbone, load_head(spec, backbone), pooling=spec.pooling, output=spec.head)


def predict_in_float(spec: ModelSpec, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a float preset's output in float32, (rows, classes), by Keras' own layers.

    Reads the weights again, one decoder layer at a time: slow, but the whole model is never in
    memory.

    Args:
        tokens: int32 (rows, length). lengths: int32 (rows,).

    Raises:
        DataError: as `float_parts`.
    """
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


def load_head(spec: ModelSpec, backbone: Any) -> Head | None:
    """Return the head that a spec names, else the preset's own; None for pooled states.

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
