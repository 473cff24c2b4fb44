"""A backbone and a head -> compiled programs, one a shape: token ids in, probabilities out.

Knows arrays and shapes. Does not know Ray, row order or files.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from runner.records import CompileInfo
from sharding.batches import BatchShape


def mean_over_all_positions(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """GlobalAveragePooling1D without a mask, as the notebook's head was trained."""
    return hidden.mean(axis=1)


def mean_over_tokens(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean over the real tokens of each row; padding changes nothing."""
    real = jnp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return jnp.where(real, hidden, 0).sum(axis=1) / jnp.maximum(lengths, 1)[:, None]


def last_token(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """The hidden state of each row's last real token; padding changes nothing."""
    return hidden[jnp.arange(hidden.shape[0]), jnp.maximum(lengths - 1, 0)]


# (rows, length, hidden) float32 and (rows,) token counts -> (rows, hidden). A new pooling is one
# function and one line here, and its name in `config.CHOICES`.
POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "padded-mean": mean_over_all_positions,
    "mean": mean_over_tokens,
    "last": last_token,
}


class Predictor:
    """One replica on the devices of this process.

    Args:
        backbone: a functional KerasHub backbone, LoRA merged; its weights stay where they are.
        kernel: (hidden, classes). bias: (classes,).
        pooling: a key of `POOLINGS`.
    """

    def __init__(
        self, backbone: keras.Model, kernel: np.ndarray, bias: np.ndarray, *, pooling: str
    ) -> None:
        self._backbone = backbone
        self._pool = POOLINGS[pooling]
        self._arguments = (
            [variable.value for variable in backbone.trainable_variables],
            [variable.value for variable in backbone.non_trainable_variables],
            jnp.asarray(kernel, jnp.float32),
            jnp.asarray(bias, jnp.float32),
        )
        # TF32 would break the float32 equalities on a GPU.
        self._precision = "highest" if backbone.compute_dtype == "float32" else "default"
        self._programs: dict[BatchShape, Any] = {}
        self._cache_hits = 0
        jax.monitoring.register_event_listener(self._count_cache_hits)

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self._arguments))

    def compile(self, shape: BatchShape) -> CompileInfo:
        """Make the program for one shape, from JAX's cache on disk where it is there."""
        started, hits = time.perf_counter(), self._cache_hits
        if shape not in self._programs:
            tokens = jax.ShapeDtypeStruct((shape.rows, shape.length), jnp.int32)
            lengths = jax.ShapeDtypeStruct((shape.rows,), jnp.int32)
            with jax.default_matmul_precision(self._precision):
                lowered = jax.jit(self._forward).lower(*self._arguments, tokens, lengths)
                self._programs[shape] = lowered.compile()
        return CompileInfo(time.perf_counter() - started, self._cache_hits > hits)

    def predict(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return float32 (rows, classes) that sum to one along the last dim.

        Args:
            tokens: int32 (rows, length), zeros after each row's end.
            lengths: int32 (rows,), real tokens of each row; 0 marks a filler row.
        """
        shape = BatchShape(*tokens.shape)
        self.compile(shape)
        return np.asarray(self._programs[shape](*self._arguments, tokens, lengths))

    def _forward(
        self,
        trainable: list[jax.Array],
        non_trainable: list[jax.Array],
        kernel: jax.Array,
        bias: jax.Array,
        tokens: jax.Array,
        lengths: jax.Array,
    ) -> jax.Array:
        mask = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        hidden, _ = self._backbone.stateless_call(
            trainable, non_trainable, {"token_ids": tokens, "padding_mask": mask}, training=False
        )
        pooled = self._pool(hidden.astype(jnp.float32), lengths)
        logits = jnp.matmul(pooled, kernel, precision="highest") + bias
        return jax.nn.softmax(logits, axis=-1)

    def _count_cache_hits(self, event: str, **_: Any) -> None:
        self._cache_hits += event == "/jax/compilation_cache/cache_hits"


def resolve_dtype(requested: str, device: jax.Device) -> str:
    """Return the dtype that `auto` means on a device.

    bfloat16 is native from compute capability 8.0 on (NVIDIA Ampere) and on TPUs; a T4 (7.5)
    emulates it at a twentieth of its float16 rate. On a CPU both are slower than float32.
    """
    if requested != "auto":
        return requested
    if device.platform == "cpu":
        return "float32"
    if device.platform == "gpu":
        capability = float(getattr(device, "compute_capability", "0") or 0)
        return "bfloat16" if capability >= 8.0 else "float16"
    return "bfloat16"


def matmul_rate(dtype: str, device: jax.Device) -> float:
    """Return FLOP/s of a square matmul on this process' device, the best of three."""
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
