"""Keras layers in float -> Keras' int8 or int4 layers, one at a time.

The arithmetic is Keras' own: int8 keeps weights as int8 with a scale a channel and rounds what
comes in to int8 as it comes; int4 keeps weights as int4 with a scale a block of 128 inputs and
computes in the model's dtype. Does not know files: `loading.py` fills a layer before it comes here.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.quantizers import quantizers

CONFIGS = {
    "int8": keras.quantizers.Int8QuantizationConfig,
    "int4": keras.quantizers.Int4QuantizationConfig,
}
# Bytes of a weight that are quantized at a time: Keras' arithmetic holds four copies of them.
PIECE_BYTES = 2 << 20


def quantize_layer(layer: keras.Layer, mode: str) -> None:
    """Turn a layer's weights into int8 or int4, in place, where Keras can; else leave it.

    Its float variables are replaced: nothing here holds on to them.
    """
    with _in_pieces(), suppress(NotImplementedError), warnings.catch_warnings():
        # Keras hands its variables to NumPy in NumPy 1's way.
        warnings.simplefilter("ignore", DeprecationWarning)
        layer.quantize(mode, config=CONFIGS[mode]())


def policies_of(preset: Path, dtype: str) -> Any:
    """Return the dtype with which to build a preset's backbone: of a quantized preset, a map from
    layer to policy, with all that is not quantized in `dtype`.

    KerasHub 0.32 saves that map, but `Backbone.from_preset` overwrites it with its own argument.
    """
    saved = json.loads((preset / "config.json").read_text())["config"].get("dtype")
    if not isinstance(saved, dict) or saved.get("class_name") != "DTypePolicyMap":
        return dtype
    saved["config"]["default_policy"] = dtype
    for policy in saved["config"]["policy_map"].values():
        name = "source_name" if "source_name" in policy["config"] else "name"
        policy["config"][name] = dtype
    return keras.dtype_policies.deserialize(saved)


@contextmanager
def _in_pieces() -> Iterator[None]:
    """Within, Keras quantizes a large weight some channels at a time, to the same numbers."""
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
