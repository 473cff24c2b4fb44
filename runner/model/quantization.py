"""Keras layers in float -> Keras' int8 or int4 layers, one at a time.

The arithmetic is Keras' own. int8 has one scale per channel, and quantizes activations to int8 as
they arrive. Keras has no int8 layers in a float16 model; here they compute in float32 and round
their outputs. int4 has one scale per block of 128 inputs, and computes in the model's dtype. Does
not know weight files: `loading.py` fills the layers.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.quantizers import quantizers

from runner.preset.json_files import read_json
from sharding.memory import product_dtype

CONFIGS = {
    "int8": keras.quantizers.Int8QuantizationConfig,
    "int4": keras.quantizers.Int4QuantizationConfig,
}
# How much of a weight to quantize at a time: Keras holds four copies of it in memory.
PIECE_BYTES = 2 << 20


def quantize_layer(layer: keras.Layer, mode: str) -> None:
    """Quantize a layer's weights to int8 or int4, in place; do nothing if Keras cannot.

    Its float variables are replaced, which frees their memory.
    """
    if type(layer).quantize is keras.Layer.quantize:
        return
    policies = layer.dtype_policy
    is_mapped = isinstance(policies, keras.dtype_policies.DTypePolicyMap)
    if is_mapped:
        # Keras derives the new policy from the layer's own, but does not look it up in the map.
        layer._dtype_policy = policies[layer.path]
    with _in_pieces(), warnings.catch_warnings():
        # Keras converts its variables for NumPy as NumPy 1 did.
        warnings.simplefilter("ignore", DeprecationWarning)
        layer.quantize(mode, config=CONFIGS[mode]())
    if is_mapped:  # the map is saved with the backbone
        del policies[layer.path]
        policies[layer.path] = layer.dtype_policy


def policies_of(preset: Path, dtype: str) -> Any:
    """Return the dtype argument for a preset's backbone.

    For a quantized preset it is a map from layer to policy, with `dtype` for everything that is not
    quantized. KerasHub 0.32 saves that map, but `Backbone.from_preset` overrides it.
    """
    saved = read_json(preset / "config.json")["config"].get("dtype")
    if not isinstance(saved, dict) or saved.get("class_name") != "DTypePolicyMap":
        return dtype
    saved["config"]["default_policy"] = dtype
    for policy in saved["config"]["policy_map"].values():
        name = "source_name" if "source_name" in policy["config"] else "name"
        policy["config"][name] = product_dtype(policy["config"].get("mode"), dtype)
    return keras.dtype_policies.deserialize(saved)


def policies_before(backbone: keras.Model, mode: str, dtype: str) -> Any:
    """Return the dtype argument that builds a float backbone for `quantize_layer`."""
    return _policies(backbone, dtype, product_dtype(mode, dtype))


def policies_after(backbone: keras.Model, mode: str, dtype: str) -> Any:
    """Return the dtype argument that builds a float backbone as `quantize_layer` leaves it."""
    return _policies(backbone, dtype, f"{_POLICIES[mode]}_from_{product_dtype(mode, dtype)}")


def round_outputs(backbone: keras.Model, dtype: str) -> None:
    """Make layers that compute in another dtype return their outputs in `dtype`."""
    for layer in _quantizable(backbone):
        if layer.compute_dtype != dtype:
            layer.call = _rounded(layer.call, dtype)
            layer.quantized_call = _rounded(layer.quantized_call, dtype)


def _rounded(call: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def rounded(*inputs: Any, **options: Any) -> Any:
        return keras.ops.cast(call(*inputs, **options), dtype)

    return rounded


def _policies(backbone: keras.Model, dtype: str, quantizable: str) -> Any:
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=dtype)
    for layer in _quantizable(backbone):
        policies[layer.path] = keras.dtype_policies.get(quantizable)
    return policies


def _quantizable(backbone: keras.Model) -> Iterator[keras.Layer]:
    """Yield the layers that Keras knows how to quantize."""
    for layer in backbone._flatten_layers(include_self=False):
        is_leaf = len(list(layer._flatten_layers())) == 1
        if is_leaf and type(layer).quantize is not keras.Layer.quantize:
            yield layer


# The names of Keras' policies for `CONFIGS`: int4 has blocks of 128 inputs.
_POLICIES = {"int8": "int8", "int4": "int4/128"}


@contextmanager
def _in_pieces() -> Iterator[None]:
    """Make Keras quantize large weights a few channels at a time, with the same results."""
    whole = quantizers.abs_max_quantize
    quantizers.abs_max_quantize = _channel_by_channel(whole)
    try:
        yield
    finally:
        quantizers.abs_max_quantize = whole


def _channel_by_channel(whole: Callable[..., Any]) -> Callable[..., Any]:
    def quantize(inputs: Any, axis: Any, *options: Any, **named: Any) -> tuple[Any, Any]:
        values = np.asarray(getattr(inputs, "value", inputs))
        reduced = {dim % values.ndim for dim in np.atleast_1d(axis)}
        free = [dim for dim in range(values.ndim) if dim not in reduced]
        pieces = math.ceil(values.nbytes / PIECE_BYTES)
        if pieces == 1 or not free:
            return whole(inputs, axis, *options, **named)
        along = max(free, key=lambda dim: values.shape[dim])
        quantized, scales, start = None, [], 0
        for part in np.array_split(values, pieces, axis=along):
            piece, scale = (np.asarray(array) for array in whole(part, axis, *options, **named))
            if quantized is None:
                quantized = np.empty(values.shape, piece.dtype)
            stop = start + part.shape[along]
            index = (slice(None),) * along + (slice(start, stop),)
            quantized[index], start = piece, stop
            scales.append(scale)
        return (
            keras.ops.convert_to_tensor(quantized),
            keras.ops.convert_to_tensor(np.concatenate(scales, axis=along)),
        )

    return quantize
