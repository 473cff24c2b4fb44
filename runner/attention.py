"""Queries, keys and values of a decoder layer -> what its heads attend to, without the square.

Keras computes all query-key pairs, in float32 and with the half that causality throws away. Here
queries go in chunks that see the keys up to their own end: the causal half, a piece at a time. The
models stay Keras': KerasHub's attention layers hand queries, keys and values to a function that is
published around a call (made for vLLM's kernel), which this file supplies. That seam takes tokens
end to end, as (tokens, 1, ...). Does not know poolings, heads or files.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_hub.src.vllm.context import vllm_context_scope

# More chunks save more of the causal half and cost time to compile: eight leave 9/16 of the square.
# On a CPU 64 queries a chunk were 1.09 times as fast as 128 (8 layers of 512, 512 tokens).
MOST_CHUNKS = 8
SMALLEST_CHUNK = 64
MASKED = -1e30
# Rows and tokens on which a layer is compared with Keras' own: two chunks, the last one short.
CHECKED_SHAPE = (2, SMALLEST_CHUNK + 32)
# Largest difference allowed, relative to the largest value; the dtype's rounding is far below.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


class Attend(Protocol):
    """A way to compute causal attention with grouped heads.

    queries: (rows, length, query_heads, head_dim). keys, values: (rows, length, key_value_heads,
    head_dim). lengths: int32 (rows,), tokens of each row that may be attended to, or None where
    what comes of the positions after a row's end is of no account. window: a position sees itself
    and the window - 1 before it. Returns (rows, length, query_heads, head_dim).
    """

    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        *,
        lengths: jax.Array | None,
        scale: float,
        soft_cap: float | None,
        window: int | None,
    ) -> jax.Array: ...


def attend_in_chunks(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    lengths: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> jax.Array:
    """Plain JAX, for any device: a chunk of queries, and the keys that one of them can see."""
    rows, length, query_heads, head_dim = queries.shape
    heads = keys.shape[2]
    group = query_heads // heads
    # Key/value heads beside the rows, the group's queries beside the positions: two plain batched
    # matmuls a chunk.
    grouped = queries.reshape(rows, length, heads, group, head_dim).transpose(0, 2, 1, 3, 4) * scale
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    chunk = max(SMALLEST_CHUNK, -(-length // (16 * MOST_CHUNKS)) * 16)
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        first = max(0, start - window + 1) if window else 0
        part = grouped[:, :, start:stop].reshape(rows, heads, (stop - start) * group, head_dim)
        logits = jnp.einsum(
            "bkth,bksh->bkts", part, keys[:, :, first:stop], preferred_element_type=jnp.float32
        )
        if soft_cap:
            logits = jnp.tanh(logits / soft_cap) * soft_cap
        position = np.repeat(np.arange(start, stop), group)[:, None]
        seen = np.arange(first, stop)[None, :]
        visible = seen <= position
        if window:
            visible &= seen > position - window
        logits = jnp.where(visible, logits, MASKED)
        if lengths is not None:
            logits = jnp.where(seen < lengths[:, None, None, None], logits, MASKED)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        sums = weights.sum(axis=-1, keepdims=True)
        output = jnp.einsum(
            "bkts,bksh->bkth",
            weights.astype(values.dtype),
            values[:, :, first:stop],
            preferred_element_type=jnp.float32,
        )
        # Divided after the matmul: head_dim values a query instead of one for each key.
        output = (output / sums).astype(values.dtype)
        outputs.append(output.reshape(rows, heads, stop - start, group, head_dim))
    joined = jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3, 4)
    return joined.reshape(rows, length, query_heads, head_dim)


def attend_with_tokamax(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    lengths: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> jax.Array:
    """The fused kernels of https://github.com/openxla/tokamax: Mosaic or Triton by device."""
    import tokamax

    return tokamax.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=True,
        logits_soft_cap=soft_cap,
        local_window_size=(window - 1, 0) if window else None,
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
    )


# A new way to attend is a function above and a line here. `keras` leaves the layers as they are.
WAYS: dict[str, Attend | None] = {
    "tokamax": attend_with_tokamax,
    "chunked": attend_in_chunks,
    "keras": None,
}


def ways_for(device: jax.Device) -> tuple[str, ...]:
    """Return the ways to try on a device, the best first.

    tokamax has kernels for TPUs and for compute capability 8.0 and later (none for a T4); on a
    CPU it was as fast as chunks of 128, so it is not asked for there.
    """
    if device.platform == "cpu" or importlib.util.find_spec("tokamax") is None:
        return ("chunked", "keras")
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "0") or 0) < 8:
        return ("chunked", "keras")
    return ("tokamax", "chunked", "keras")


def choose_way(
    model: keras.Model, device: jax.Device, replicated: jax.sharding.Sharding | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the first way that agrees with Keras' own attention on this model's layers here.

    One layer of each kind (with a window, without) runs on a few tokens both ways.

    Returns:
        The way, and sentences about ways that were tried and left.
    """
    layers = _one_of_each_kind(model)
    notes: list[str] = []
    for way in ways_for(device):
        if way == "keras" or not layers:
            break
        try:
            difference = max(_difference(layer, way, replicated) for layer in layers)
        except Exception as error:  # a kernel that does not compile is as varied as kernels are
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if difference <= TOLERANCES[model.compute_dtype]:
                return way, tuple(notes)
            reason = f"it differs from Keras' own by {difference:.1e}"
        notes.append(f"warning: attention {way!r} is not used on {device.device_kind}: {reason}")
    return "keras", tuple(notes)


@contextmanager
def attention(way: str, rows: int, length: int, lengths: jax.Array | None) -> Iterator[None]:
    """Within, KerasHub's attention layers take tokens end to end, (rows x length, 1, ...), and
    attend in this way. Not for `keras`."""
    attend = WAYS[way]
    assert attend is not None, "this is a bug: Keras' own attention needs no scope"

    def handed_over(
        cache: Any,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        scale: float,
        head_dim: int,
        query_heads: int,
        key_value_heads: int,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[Any, jax.Array]:
        # A window as long as the row hides nothing.
        window = sliding_window if sliding_window and sliding_window < length else None
        values = values.reshape(rows, length, key_value_heads, head_dim)
        attended = attend(
            queries.reshape(rows, length, query_heads, head_dim),
            keys.reshape(rows, length, key_value_heads, head_dim),
            values,
            lengths=lengths,
            scale=float(scale),
            soft_cap=soft_cap,
            window=window,
        )
        if window and lengths is not None:
            attended = _fill_blind(attended, values, lengths, window)
        return cache, attended.reshape(rows * length, query_heads * head_dim)

    positions = jnp.tile(jnp.arange(length, dtype="int32"), rows)
    with vllm_context_scope(paged_attention_func=handed_over, positions=positions):
        yield


def _fill_blind(
    attended: jax.Array, values: jax.Array, lengths: jax.Array, window: int
) -> jax.Array:
    """Give positions whose window lies wholly past their row's end what Keras gives them: its
    softmax over logits that are all masked alike, the mean of all values."""
    blind = jnp.arange(attended.shape[1]) >= lengths[:, None] + window - 1
    mean = values.mean(axis=1, keepdims=True)
    mean = jnp.repeat(mean, attended.shape[2] // values.shape[2], axis=2)
    return jnp.where(blind[:, :, None, None], mean, attended)


def _layers(model: keras.Model) -> list[keras.Layer]:
    """Attention layers that can hand their queries, keys and values over."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if hasattr(layer, "_compute_vllm_attention")
    ]


def _window(layer: keras.Layer) -> int | None:
    if not getattr(layer, "use_sliding_window_attention", True):
        return None
    return getattr(layer, "sliding_window_size", None) or getattr(layer, "_sliding_window", None)


def _one_of_each_kind(model: keras.Model) -> list[keras.Layer]:
    kinds: dict[Any, keras.Layer] = {}
    for layer in _layers(model):
        kinds.setdefault(_window(layer), layer)
    return list(kinds.values())


def _difference(layer: keras.Layer, way: str, replicated: jax.sharding.Sharding | None) -> float:
    """Return the largest difference from Keras' own output on a small input, relative to it."""
    rows, length = CHECKED_SHAPE
    width = _input_width(layer)
    # Of the size a norm leaves; the second row ends early.
    inputs = np.random.default_rng(0).normal(size=(rows, length, width)).astype(np.float32)
    lengths = np.array([length, length - SMALLEST_CHUNK // 2], np.int32)
    real = np.arange(length) < lengths[:, None]
    mask = np.tril(np.ones((length, length), bool)) & real[:, None, :]
    if window := _window(layer):
        mask &= ~np.tril(np.ones((length, length), bool), -window)
    variables = (
        [variable.value for variable in layer.trainable_variables],
        [variable.value for variable in layer.non_trainable_variables],
    )

    def plain(trainable: Any, others: Any) -> jax.Array:
        values = jnp.asarray(inputs, layer.compute_dtype)
        return layer.stateless_call(trainable, others, values, attention_mask=mask)[0]

    def handed_over(trainable: Any, others: Any) -> jax.Array:
        values = jnp.asarray(inputs, layer.compute_dtype).reshape(rows * length, 1, width)
        with attention(way, rows, length, jnp.asarray(lengths)):
            output = layer.stateless_call(trainable, others, values)[0]
        return output.reshape(rows, length, width)

    def outputs(function: Callable[..., jax.Array]) -> np.ndarray:
        output = jax.jit(function, out_shardings=replicated)(*variables)
        return np.asarray(output.addressable_data(0), np.float32)

    expected = outputs(plain)
    return float(np.abs(outputs(handed_over) - expected).max() / np.abs(expected).max())


def _input_width(layer: keras.Layer) -> int:
    dense = getattr(layer, "query_dense", None) or layer._query_dense
    return int(dense.input_spec.axes[-1])
