"""A backbone and a head -> a compiled program per shape: token ids in, probabilities out.

Does not know Ray, the order of rows or files.
"""

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax._src import distributed

from runner.common.poolings import POOLINGS
from runner.common.records import CompileInfo, Head
from runner.model.attention import choose_way
from runner.model.cpu_rewrites import rewritten_for_cpu
from runner.model.program import Program, precision_of
from sharding.batches import BatchShape
from sharding.kinds import KINDS, auto_dtype


class Predictor:
    """A model, or a stage of one, compiled for each shape.

    Threads may share it: one can compile a shape while others predict.

    Args:
        model: a functional model over "token_ids" or "hidden", "padding_mask" and for BERT
            "segment_ids", LoRA merged. Its weights stay where they are.
        head: None to return hidden states, or pooled states if output is "none".
        pooling: a key of `POOLINGS`.
        output: a key of `OUTPUTS`; or "none", without a head, for pooled states.
        replicated: the sharding of arrays that every process of a mesh holds whole; None without a
            mesh.
        way: how to attend, a key of `attention.WAYS`; None chooses one for the device and checks
            it.

    Attributes:
        way: the way chosen. notes: a sentence for each way that was rejected.
    """

    def __init__(
        self,
        model: keras.Model,
        head: Head | None,
        *,
        pooling: str,
        output: str = "softmax",
        replicated: jax.sharding.Sharding | None = None,
        way: str | None = None,
    ) -> None:
        self.notes: tuple[str, ...] = ()
        self._replicated = replicated
        self._arguments = (
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.non_trainable_variables],
            [self._on_device(np.asarray(array, np.float32)) for array in _arrays(head)],
        )
        device = next(iter(self._arguments[0][0].devices()))
        self.way = way or ""
        if way is None:
            with jax.default_matmul_precision(precision_of(model)):
                self.way, self.notes = choose_way(
                    model, device, replicated, sees_padding=POOLINGS[pooling].sees_padding
                )
        self._program = Program(
            model,
            pooling=pooling,
            output=output if head is not None or output == "none" else "hidden",
            way=self.way,
            dense=head.activation if head is not None and head.dense else None,
        )
        # GPUs and TPUs queue programs. A CPU would run two at once, each at half speed.
        self._is_cpu = KINDS[device.platform].is_host
        self._turns = threading.Lock()
        self._rewritten = rewritten_for_cpu(self._program.forward) if self._is_cpu else None
        self._programs: dict[BatchShape, Any] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that this process holds."""
        return sum(
            shard.data.nbytes
            for array in jax.tree.leaves(self._arguments)
            for shard in array.addressable_shards
        )

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Compile one shape, or read its program from JAX's cache on disk."""
        started, hits = time.perf_counter(), _cache_hits().count
        if shape not in self._programs:
            lowered = self._program.lower(
                self._arguments, shape, sharding=self._replicated, function=self._rewritten
            )
            with _every_process_writes_its_cache():
                self._programs[shape] = lowered.compile()
        return CompileInfo(time.perf_counter() - started, _cache_hits().count > hits)

    def predict(self, entry: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the head's output, float32 (rows, classes), or pooled states, (rows, hidden).

        Stages before the last return hidden states, (rows, length, hidden).

        Args:
            entry: token ids, int32 (rows, length), padded at the end; or hidden states.
            lengths: int32 (rows,), real tokens of each row; 0 marks a filler row.
        """
        shape = BatchShape(*entry.shape[:2])
        self.compile(shape)
        with self._turns:
            output = self.enqueue(entry, lengths)
            if self._is_cpu:
                return self.fetch(output)
        return self.fetch(output)

    def enqueue(self, entry: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """Copy a batch to the device and start it, without waiting.

        Its shape must be compiled. Arguments are as for `predict`.
        """
        return self._programs[BatchShape(*entry.shape[:2])](
            *self._arguments, self._on_device(entry), self._on_device(lengths)
        )

    def fetch(self, output: jax.Array) -> np.ndarray:
        """Wait for the output of `enqueue` and return it like `predict`."""
        return np.asarray(output.addressable_data(0))

    def _on_device(self, array: np.ndarray) -> jax.Array:
        if self._replicated is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(array.shape, self._replicated, array.__getitem__)


def _arrays(head: Head | None) -> tuple[np.ndarray, ...]:
    return () if head is None else (head.kernel, head.bias, *(head.dense or ()))


@contextmanager
def _every_process_writes_its_cache() -> Iterator[None]:
    """Let this process write to JAX's cache on disk, whatever its number in the group.

    In JAX 0.10 only process 0 of a group writes, since all would write the same. But on a CPU the
    key contains the process' place in the topology, so the others would compile in every run.
    """
    state = distributed.global_state
    number, state.process_id = state.process_id, 0
    try:
        yield
    finally:
        state.process_id = number


class _CacheHits:
    """Counts the programs that this process read from JAX's cache on disk."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_listener(self._hear)

    def _hear(self, event: str, **_: Any) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


@functools.cache
def _cache_hits() -> _CacheHits:
    return _CacheHits()


def resolve_dtype(requested: str, device: jax.Device) -> str:
    """Return the dtype that `requested` means on a device; `auto` becomes the device's own."""
    if requested != "auto":
        return requested
    capability = float(getattr(device, "compute_capability", "0") or 0)
    dtype = auto_dtype(device.platform, capability)
    assert dtype is not None, f"this is a bug: no dtype is known for {device.platform}"
    return dtype


def matmul_rate(dtype: str, device: jax.Device) -> float:
    """Return the FLOP/s of a square matmul on this process' device, best of three."""
    size = 1024 if device.platform == "cpu" else 8192
    array = jnp.full((size, size), 1 / size, dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(array, array).block_until_ready()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        multiply(array, array).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
