"""A backbone and a head -> a compiled program for each shape: token ids in, probabilities out.

Does not know Ray, the order of rows or files.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax._src import distributed

from runner.common.poolings import POOLINGS
from runner.common.records import CompileInfo, Head
from runner.model.attention import attention, choose_way
from runner.model.cpu_rewrites import rewritten_for_cpu
from sharding.batches import BatchShape
from sharding.kinds import KINDS, auto_dtype, dtype_beside

# The activation of the layer between pooling and output, in a `Head` that has one.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Logits (rows, labels) -> the numbers that are written. A new kind of head is a line here, and its
# name in `task.HEADS`.
OUTPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "regression": lambda logits: logits,
}


class Predictor:
    """A model, or a stage of one, compiled for each shape.

    Threads may share it: one can compile a shape while others predict.

    Args:
        model: a functional model over "token_ids" or "hidden", "padding_mask" and for BERT
            "segment_ids", LoRA merged. Its weights stay where they are.
        head: None to return hidden states, or pooled ones if output is none.
        pooling: a key of `POOLINGS`.
        output: a key of `OUTPUTS`; or none, without a head, for pooled states.
        replicated: the sharding of arrays that all processes of a mesh hold whole; None without a
            mesh.
        way: how to attend, a key of `attention.WAYS`; None chooses one by device and checks it.

    Attributes:
        way: the way chosen. notes: sentences about ways that were rejected.
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
        self._model = model
        self._entry = "token_ids" if "token_ids" in model.input else "hidden"
        self._pooling = POOLINGS[pooling]
        self._dense = ACTIVATIONS[head.activation] if head is not None and head.dense else None
        self._output = output if head is not None or output == "none" else "hidden"
        self.notes: tuple[str, ...] = ()
        self._replicated = replicated
        self._arguments = (
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.non_trainable_variables],
            [self._on_device(np.asarray(array, np.float32)) for array in _arrays(head)],
        )
        device = next(iter(self._arguments[0][0].devices()))
        # TF32 would break the float32 equalities on a GPU.
        self._precision = "highest" if model.compute_dtype == "float32" else "default"
        self.way = way or ""
        if way is None:
            with jax.default_matmul_precision(self._precision):
                self.way, self.notes = choose_way(model, device, replicated)
        # A GPU or TPU queues programs. A CPU would run two at once, each half as fast.
        self._is_cpu = KINDS[device.platform].is_host
        self._turns = threading.Lock()
        self._function: Callable[..., jax.Array] = self._forward
        if self._is_cpu:
            self._function = rewritten_for_cpu(self._forward)
        self._programs: dict[BatchShape, Any] = {}

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that this process holds."""
        return sum(
            shard.data.nbytes
            for array in jax.tree.leaves(self._arguments)
            for shard in array.addressable_shards
        )

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Compile one shape, or read its program from JAX's cache on disk."""
        started, hits = time.perf_counter(), _cache_hits().count
        if shape not in self._programs:
            entry = self._model.input[self._entry]
            trailing = entry.shape[2:]
            with jax.default_matmul_precision(self._precision):
                lowered = jax.jit(self._function, out_shardings=self._replicated).lower(
                    *self._arguments,
                    self._abstract((shape.rows, shape.length, *trailing), entry.dtype),
                    self._abstract((shape.rows,), "int32"),
                )
                with _every_process_writes_its_cache():
                    self._programs[shape] = lowered.compile()
        return CompileInfo(time.perf_counter() - started, _cache_hits().count > hits)

    def predict(self, entry: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the head's output, float32 (rows, classes), or pooled states, (rows, hidden); in
        stages before the last, hidden states, (rows, length, hidden).

        Args:
            entry: token ids, int32 (rows, length), padded after each row's end; or hidden states.
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
        """Wait for what `enqueue` returned, and return it as an array like `predict`."""
        return np.asarray(output.addressable_data(0))

    def _forward(
        self,
        trainable: list[jax.Array],
        non_trainable: list[jax.Array],
        head: list[jax.Array],
        entry: jax.Array,
        lengths: jax.Array,
    ) -> jax.Array:
        states = self._states(trainable, non_trainable, entry, lengths)
        hidden = states["sequence_output"] if isinstance(states, dict) else states
        if self._output == "hidden":
            return hidden
        if self._pooling.pool is None:
            pooled = states["pooled_output"].astype(jnp.float32)
        else:
            pooled = self._pooling.pool(jnp, hidden.astype(jnp.float32), lengths)
        if self._output == "none":
            return pooled
        kernel, bias, *dense = head
        if self._dense is not None:
            between, its_bias = dense
            pooled = self._dense(jnp.matmul(pooled, between, precision="highest") + its_bias)
        logits = jnp.matmul(pooled, kernel, precision="highest") + bias
        return OUTPUTS[self._output](logits)

    def _states(
        self,
        trainable: list[jax.Array],
        non_trainable: list[jax.Array],
        entry: jax.Array,
        lengths: jax.Array,
    ) -> Any:
        """Return hidden states, (rows, length, hidden); for BERT a dict of them and pooled ones."""

        def call(entry: jax.Array, mask: jax.Array) -> Any:
            inputs = {self._entry: entry, "padding_mask": mask}
            if "segment_ids" in self._model.input:
                inputs["segment_ids"] = jnp.zeros_like(entry)  # a row is one segment
            return self._model.stateless_call(trainable, non_trainable, inputs, training=False)[0]

        rows, length, *trailing = entry.shape
        if self.way == "keras":
            return call(entry, jnp.arange(length)[None, :] < lengths[:, None])
        seen = lengths if self._pooling.sees_padding else None
        with attention(self._model, self.way, rows, length, seen):
            end_to_end = entry.reshape(rows * length, 1, *trailing)
            hidden = call(end_to_end, jnp.ones(end_to_end.shape[:2], bool))
        return hidden.reshape(rows, length, -1)

    def _abstract(self, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _on_device(self, array: np.ndarray) -> jax.Array:
        if self._replicated is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(array.shape, self._replicated, array.__getitem__)


def _arrays(head: Head | None) -> tuple[np.ndarray, ...]:
    return () if head is None else (head.kernel, head.bias, *(head.dense or ()))


@contextmanager
def _every_process_writes_its_cache() -> Iterator[None]:
    """Within, this process writes to JAX's cache on disk, whatever its number in the group.

    JAX 0.10 lets only process 0 of a group write, since all would write the same. But on a CPU the
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


def resolve_dtype(requested: str, device: jax.Device, *, is_int8: bool = False) -> str:
    """Return the dtype that `requested` means on a device.

    `auto` becomes the device's own; with int8 weights, float32 if the device has no bfloat16.
    """
    if requested != "auto":
        return requested
    capability = float(getattr(device, "compute_capability", "0") or 0)
    dtype = auto_dtype(device.platform, capability)
    assert dtype is not None, "this is a bug: a device's capability determines its dtype"
    return dtype_beside("int8" if is_int8 else None, dtype)


def matmul_rate(dtype: str, device: jax.Device) -> float:
    """Return the FLOP/s of a square matmul on this process' device, the best of three."""
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
