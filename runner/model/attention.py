"""Queries, keys and values of a decoder layer -> its attention, without the full square of scores.

Keras computes all query-key pairs in float32, including the half that the causal mask discards.
Here queries are processed in chunks, each with the keys up to its own end. The models remain
Keras': its attention layers in KerasHub can hand queries, keys and values to a function (meant for
vLLM's kernel), which this file supplies. They pass tokens end to end, as (tokens, 1, ...). Does not
know poolings, heads or files.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_hub.src.vllm.context import vllm_context_scope

from runner.common.errors import first_line

# More chunks skip more of the masked half but take longer to compile. Eight compute 9/16 of the
# square. On a CPU, chunks of 64 queries were 1.09 times as fast as chunks of 128 (8 layers of 512,
# 512 tokens).
MOST_CHUNKS = 8
SMALLEST_CHUNK = 64
MASKED = -1e30
# Fused kernels take a multiple of so many tokens.
TILE = 128
# Rows and tokens for comparing a layer with Keras' own: two chunks, the last one short.
CHECKED_SHAPE = (2, SMALLEST_CHUNK + 32)
# The largest allowed difference, relative to the largest value; rounding stays far below.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# Layers with special behaviour in KerasHub 0.32 with JAX. Qwen's call a fused op before they apply
# their window, so the window has no effect. If a window contains no real token, Gemma's softmax
# gives 0, the others' gives the mean of all values.
WITHOUT_WINDOW = ("QwenAttention", "Qwen3Attention")
BLIND_SEE_NOTHING = ("CachedGemmaAttention", "CachedGemma3Attention")
# With int8 activations, a tiny difference can change how a value is rounded.
QUANTIZED_TOLERANCE = 1e-1


# A way to compute causal attention with grouped heads: the signature of the two functions below.
# queries: (rows, length, query_heads, head_dim). keys, values: (rows, length, key_value_heads,
# head_dim). lengths: int32 (rows,), real tokens of each row, or None if the results after a row's
# end do not matter. window: a position sees itself and the window - 1 before it. Returns (rows,
# length, query_heads, head_dim).
Attend = Callable[..., jax.Array]


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
    """Attend in plain JAX, on any device: chunks of queries, each with the keys that it can see."""
    rows, length, query_heads, head_dim = queries.shape
    heads = keys.shape[2]
    group = query_heads // heads
    # With key/value heads next to rows, and a group's queries next to positions, a chunk takes two
    # plain batched matmuls.
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
        # Divide after the matmul: it has head_dim values a query instead of one for each key.
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
    kernel: str,
) -> jax.Array:
    """Attend by a fused kernel of https://github.com/openxla/tokamax.

    Args:
        kernel: a key of tokamax' implementations. Without one, it would fall back to plain XLA,
            which has the whole square of scores in float32, and say nothing.

    Raises:
        NotImplementedError: this kernel does not compute this on this device. That of TPUs has
            neither lengths nor windows.
    """
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Otherwise tokamax would parse this program's command line and fail.
        flags.FLAGS(["arena-runner"])
    # Kernels take whole tiles. With a causal mask, no token attends to those after it.
    length = queries.shape[1]
    more = ((0, 0), (0, -length % TILE), (0, 0), (0, 0))
    attended = tokamax.dot_product_attention(
        *(jnp.pad(array, more) for array in (queries, keys, values)),
        scale=scale,
        is_causal=True,
        logits_soft_cap=soft_cap,
        local_window_size=(window - 1, 0) if window else None,
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
        implementation=kernel,
    )
    return attended[:, :length]


# A new way to attend is a function above and a line here. `keras` does not change the layers.
WAYS: dict[str, Attend | None] = {
    **{
        f"tokamax {kernel}": functools.partial(attend_with_tokamax, kernel=kernel)
        for kernel in ("mosaic_tpu", "mosaic_gpu", "triton")
    },
    "chunked": attend_in_chunks,
    "keras": None,
}


def ways_for(device: jax.Device) -> tuple[str, ...]:
    """Return the ways to try on a device, best first.

    tokamax has kernels for TPUs and for compute capability 8.0 and later (not for a T4). On a CPU
    it was only as fast as chunks of 128, so it is not tried there.
    """
    kernels: tuple[str, ...] = ()
    if importlib.util.find_spec("tokamax") is not None:
        if device.platform == "tpu":
            kernels = ("tokamax mosaic_tpu",)
        elif device.platform == "gpu":
            capability = float(getattr(device, "compute_capability", "0") or 0)
            if capability >= 9:
                kernels = ("tokamax mosaic_gpu", "tokamax triton")
            elif capability >= 8:
                kernels = ("tokamax triton",)
    return (*kernels, "chunked", "keras")


def choose_way(
    model: keras.Model,
    device: jax.Device,
    replicated: jax.sharding.Sharding | None = None,
    *,
    sees_padding: bool = True,
) -> tuple[str, tuple[str, ...]]:
    """Return the first way that agrees with Keras' own attention on this model and device.

    Runs one layer of each kind (with and without a window) on a few tokens both ways.

    Args:
        sees_padding: whether the results after a row's end matter.

    Returns:
        The way, and a warning for each way that was rejected.
    """
    checks = [  # an encoder has no such layers
        _Check(layer, int(model.output.shape[-1]), sees_padding)
        for layer in _one_of_each_kind(model)
    ]
    kind, tolerance = device.device_kind, _tolerance(model)
    notes: list[str] = []
    try:
        expected = [check.outputs("keras", replicated) for check in checks]
    except Exception as error:  # for example float16 in Llama on a CPU
        notes.append(
            f"warning: Keras' own attention does not run in {model.compute_dtype} on {kind}, so "
            f"the runner's is not compared with it: {type(error).__name__}: {first_line(error)}"
        )
        return ways_for(device)[0], tuple(notes)
    for way in ways_for(device):
        if way == "keras" or not checks:
            break
        try:
            answers = [check.outputs(way, replicated) for check in checks]
        except Exception as error:  # compiling a kernel can raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
        else:
            difference = max(
                _relative_difference(check.compared(answer), check.compared(own))
                for check, answer, own in zip(checks, answers, expected, strict=True)
            )
            if difference <= tolerance:
                return way, tuple(notes)
            reason = f"it differs from Keras' own by {difference:.1e}"
        notes.append(f"warning: attention {way!r} is not used on {kind}: {reason}")
    return "keras", tuple(notes)


@contextmanager
def attention(
    model: keras.Model,
    way: str,
    rows: int,
    length: int,
    lengths: jax.Array | None,
    *,
    is_strict: bool = False,
) -> Iterator[None]:
    """Let the model take tokens end to end, (rows x length, 1, ...), and attend as `way` says.

    Args:
        way: a key of `WAYS` other than `keras`. lengths: as in `Attend`.
        is_strict: whether to raise NotImplementedError if the way's kernel cannot compute a layer,
            instead of using chunks.
    """
    chosen = WAYS[way]
    assert chosen is not None, "this is a bug: Keras' own attention needs no scope"
    # Traced once for all equal layers; otherwise it would take half of a model's tracing time.
    attend: Any = _traced_once(chosen)
    kinds = {type(layer).__name__ for layer in _layers(model)}
    has_windows, blind_see_nothing = kinds.isdisjoint(WITHOUT_WINDOW), kinds <= {*BLIND_SEE_NOTHING}

    def handed_over(  # noqa: PLR0917 - KerasHub calls it by position
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
        is_seen = has_windows and sliding_window and sliding_window < length
        window = sliding_window if is_seen else None
        values = values.reshape(rows, length, key_value_heads, head_dim)
        arrays = (
            queries.reshape(rows, length, query_heads, head_dim),
            keys.reshape(rows, length, key_value_heads, head_dim),
            values,
        )
        options = {
            "lengths": lengths, "scale": float(scale), "soft_cap": soft_cap, "window": window
        }  # fmt: skip
        try:
            attended = attend(*arrays, **options)
        except NotImplementedError:
            if is_strict:
                raise
            attended = _traced_once(attend_in_chunks)(*arrays, **options)
        if window and lengths is not None:
            # Blind positions are those whose window is entirely past the row's end.
            blind = jnp.arange(length) >= lengths[:, None] + window - 1
            mean = values.mean(axis=1, keepdims=True).repeat(query_heads // key_value_heads, axis=2)
            seen_blindly = jnp.where(blind_see_nothing, 0, mean)
            attended = jnp.where(blind[:, :, None, None], seen_blindly, attended)
        return cache, attended.reshape(rows * length, query_heads * head_dim)

    positions = jnp.tile(jnp.arange(length, dtype="int32"), rows)
    with vllm_context_scope(paged_attention_func=handed_over, positions=positions):
        yield


@functools.cache
def _traced_once(attend: Any) -> Attend:
    return jax.jit(attend, static_argnames=("scale", "soft_cap", "window"), inline=True)


def _layers(model: keras.Model) -> list[keras.Layer]:
    """Return the attention layers that can hand over queries, keys and values."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if hasattr(layer, "_compute_vllm_attention")
    ]


def _one_of_each_kind(model: keras.Model) -> list[keras.Layer]:
    """Return one decoder layer for each window length in the model, and one without a window."""
    kinds: dict[Any, keras.Layer] = {}
    for block in model.layers:
        for layer in _layers(block):
            kinds.setdefault(_window(layer), block)
    return list(kinds.values())


def _window(layer: keras.Layer) -> int | None:
    if not getattr(layer, "use_sliding_window_attention", True):
        return None
    return getattr(layer, "sliding_window_size", None) or getattr(layer, "_sliding_window", None)


def _tolerance(model: keras.Model) -> float:
    modes = (getattr(layer, "quantization_mode", None) for layer in model._flatten_layers())
    return QUANTIZED_TOLERANCE if any(modes) else TOLERANCES[model.compute_dtype]


class _Check:
    """A decoder layer, its width, and a small input whose second row ends early."""

    def __init__(self, layer: keras.Layer, width: int, sees_padding: bool) -> None:
        rows, length = CHECKED_SHAPE
        self._layer, self._width, self._sees_padding = layer, width, sees_padding
        named = inspect.signature(layer.call).parameters
        self._mask = "padding_mask" if "padding_mask" in named else "decoder_padding_mask"
        # Of the size that a norm outputs.
        self._inputs = np.random.default_rng(0).normal(size=(rows, length, width))
        self._lengths = np.array([length, length // 3], np.int32)

    def outputs(self, way: str, replicated: jax.sharding.Sharding | None) -> np.ndarray:
        """Return the layer's output, float32 (rows, length, width).

        Args:
            way: a key of `WAYS`. replicated: as for `Predictor`.
        """
        variables = (
            [variable.value for variable in self._layer.trainable_variables],
            [variable.value for variable in self._layer.non_trainable_variables],
        )
        call = self._plain if way == "keras" else functools.partial(self._handed_over, way)
        output = jax.jit(call, out_shardings=replicated)(*variables)
        return np.asarray(output.addressable_data(0), np.float32)

    def compared(self, output: np.ndarray) -> np.ndarray:
        """Return the part of an output that matters."""
        return output if self._sees_padding else output[self._real()]

    def _real(self) -> np.ndarray:
        real: np.ndarray = np.arange(CHECKED_SHAPE[1]) < self._lengths[:, None]
        return real

    def _plain(self, trainable: Any, others: Any) -> jax.Array:
        return self._call(trainable, others, self._inputs, self._real())

    def _handed_over(self, way: str, trainable: Any, others: Any) -> jax.Array:
        end_to_end = self._inputs.reshape(-1, 1, self._width)
        lengths = jnp.asarray(self._lengths) if self._sees_padding else None
        with attention(self._layer, way, *CHECKED_SHAPE, lengths, is_strict=True):
            real = np.ones(end_to_end.shape[:2], bool)
            output = self._call(trainable, others, end_to_end, real)
        return output.reshape(self._inputs.shape)

    def _call(self, trainable: Any, others: Any, inputs: Any, mask: Any) -> jax.Array:
        inputs = jnp.asarray(inputs, self._layer.compute_dtype)
        options = {self._mask: jnp.asarray(mask), "training": False}
        if "training" not in inspect.signature(self._layer.call).parameters:
            del options["training"]
        return self._layer.stateless_call(trainable, others, inputs, **options)[0]


def _relative_difference(answer: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest value; infinite if a value is not finite."""
    difference = float(np.abs(answer - expected).max() / np.abs(expected).max())
    return difference if np.isfinite(difference) else float("inf")
