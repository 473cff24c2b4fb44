"""Preset directory, LoRA file and dtype -> a Keras backbone with its weights, LoRA merged.

Runs in the process that predicts. Imports Keras, so `process.prepare_process` must be called first.
Does not know heads, poolings or rows.
"""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import jax
import keras
import keras_hub
import numpy as np
from keras.src.backend.common import global_state
from keras.src.saving import saving_lib

from runner.common.errors import DataError, first_line, readable
from runner.model.cpu_allocator import large_blocks_go_back
from runner.model.quantization import (
    policies_after,
    policies_before,
    policies_of,
    quantize_layer,
    round_outputs,
)
from runner.model.weights import StoredWeight, find_weights
from runner.preset.families import FAMILIES
from sharding.memory import product_dtype


def load_backbone(
    preset: str, lora_weights: str | None, *, dtype: str, quantization: str | None = None
) -> keras.Model:
    """Return the backbone of a preset with all its weights on this process' device.

    Args:
        lora_weights: path of a file to merge, or None. quantization: as for `fill`.

    Raises:
        DataError: as `build_backbone` and `locate_weights`.
    """
    backbone = build_backbone(preset, dtype=dtype, quantization=quantization)
    stored = locate_weights(backbone, preset, lora_weights)
    fill(backbone, stored, place_whole, quantization=quantization)
    return backbone


def build_backbone(
    preset: str, *, dtype: str, quantization: str | None = None, is_quantized: bool = False
) -> keras.Model:
    """Return the backbone of a KerasHub preset directory, with variables that have no values yet.

    Configs are deserialized in Keras' safe mode: no code is loaded from the directory.

    Args:
        quantization: how its float weights are going to be quantized, a key of
            `quantization.CONFIGS`, or None. is_quantized: whether to build it as it is afterwards.

    Raises:
        DataError: the config does not describe a backbone that takes only tokens.
    """
    backbone = _build(preset, policies_of(Path(preset), dtype))
    if quantization is not None and is_quantized:
        backbone = _build(preset, policies_after(backbone, quantization, dtype))
    elif quantization is not None and product_dtype(quantization, dtype) != dtype:
        backbone = _build(preset, policies_before(backbone, quantization, dtype))
    round_outputs(backbone, dtype)
    if set(backbone.input) - {"segment_ids"} != {"token_ids", "padding_mask"}:
        raise DataError(
            f"{preset} must be a text backbone that takes token_ids and padding_mask. "
            f"Received: inputs {sorted(backbone.input)}"
        )
    return backbone


def _build(preset: str, policies: Any) -> keras.Model:
    """Build a preset's backbone with a dtype, or with a policy for each layer."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            backbone = keras_hub.models.Backbone.from_preset(
                preset, load_weights=False, dtype=policies
            )
    except Exception as error:  # Keras can raise anything for a damaged config
        raise DataError(f"{preset} does not load as a preset: {first_line(error)}") from error
    finally:
        # Otherwise the next scope, inside the first trace, would initialize them when it ends.
        global_state.set_global_attribute("uninitialized_variables", [])
    return backbone


def cut_stage(backbone: keras.Model, start: int, stop: int) -> keras.Model:
    """Return the part of a backbone's graph that computes decoder layers `start` to `stop`.

    Its inputs are padding_mask and either token_ids or, after the first part, hidden. The first
    part has the embedding; the last has the final norm and all of the backbone's outputs. The parts
    share the backbone's layers.

    Raises:
        DataError: the backbone is not a chain of decoder layers, or has no such layers.
    """
    layers = getattr(backbone, "transformer_layers", None)
    if not layers or not 0 <= start < stop <= len(layers):
        raise DataError(
            f"{type(backbone).__name__} cannot be cut into stages: expected transformer_layers "
            f"{start} to {stop}. Received: {len(layers or ())} layers"
        )
    inputs = dict(backbone.input)
    if start > 0:
        inputs = {"hidden": _entry(layers[start]), "padding_mask": inputs["padding_mask"]}
    output = backbone.output if stop == len(layers) else _entry(layers[stop])
    return keras.Model(inputs, output)


def float_parts(preset: str, lora_weights: str | None) -> Iterator[tuple[keras.Model, bool]]:
    """Yield a float preset's decoder layers in float32, and whether each is the last.

    The parts are those of `cut_stage`. A part's weights are released before the next one is loaded.
    A backbone that cannot be cut is yielded whole.

    Raises:
        DataError: as `build_backbone` and `locate_weights`.
    """
    backbone = build_backbone(preset, dtype="float32")
    stored = locate_weights(backbone, preset, lora_weights)
    has_stages = FAMILIES[type(backbone).__name__].has_stages
    layers = len(backbone.transformer_layers) if has_stages else 1
    for number in range(layers):
        part = cut_stage(backbone, number, number + 1) if has_stages else backbone
        fill(part, stored, place_whole)
        yield part, number + 1 == layers
        for variable in part.variables:
            variable._value = None


def _entry(layer: keras.Layer) -> Any:
    """Return the hidden states that go into a decoder layer, a symbolic tensor."""
    return layer.input[0] if isinstance(layer.input, (list, tuple)) else layer.input


def locate_weights(
    backbone: keras.Model, preset: str, lora_weights: str | None
) -> dict[int, StoredWeight]:
    """Return id(variable) -> where its values are stored, kernels with their LoRA factors.

    Raises:
        DataError: weights or LoRA file do not fit the backbone.
    """
    stored = find_weights(backbone, Path(preset))
    if lora_weights is not None:
        for kernel, factors in _read_lora(backbone, lora_weights):
            stored[id(kernel)] = replace(stored[id(kernel)], lora=factors)
    return stored


def fill(
    model: keras.Model,
    stored: dict[int, StoredWeight],
    place: Callable[[keras.Variable, StoredWeight], jax.Array],
    *,
    quantization: str | None = None,
) -> None:
    """Give each variable of a model its values, one at a time.

    Args:
        stored: from `locate_weights`; entries are removed as they are used.
        place: reads a variable's values onto devices.
        quantization: a key of `quantization.CONFIGS`. Each layer is quantized as soon as it has its
            weights, so that at most one layer is in memory in float.

    Raises:
        DataError: weights are damaged or not finite.
    """
    with large_blocks_go_back():
        if quantization is not None:
            # Keras collects garbage after each layer. Scanning the objects that were there before
            # would take a sixth of a second per layer.
            gc.freeze()
            for layer in list(model._flatten_layers(include_self=False)):
                if len(list(layer._flatten_layers())) == 1:
                    _fill(layer.variables, stored, place)
                    quantize_layer(layer, quantization)
            gc.unfreeze()
        _fill(model.variables, stored, place)


def _fill(
    variables: Iterable[keras.Variable],
    stored: dict[int, StoredWeight],
    place: Callable[[keras.Variable, StoredWeight], jax.Array],
) -> None:
    for variable in variables:
        if variable._value is not None:
            continue
        if id(variable) in stored:
            # Wait for the copy; otherwise several tensors would be in host memory twice.
            values = place(variable, stored.pop(id(variable)))
            variable._value = jax.block_until_ready(values)
            variable._initializer = None
        else:
            # The unused state of a random generator, which is not in the files.
            assert math.prod(variable.shape) <= 2, f"this is a bug: no values for {variable.path}"
            variable._deferred_initialize()


def place_whole(variable: keras.Variable, stored: StoredWeight) -> jax.Array:
    """Return all values of a variable on this process' device."""
    # On a CPU jnp.asarray would compile a copy for each shape.
    return jax.device_put(stored.read(dtype=variable.dtype))


def _read_lora(
    backbone: keras.Model, path: str
) -> list[tuple[keras.Variable, tuple[np.ndarray, np.ndarray]]]:
    """Return (kernel, its LoRA factors in float32) for each layer of a `*.lora.h5` file.

    Raises:
        DataError: the file's layers or shapes are not this backbone's.
    """
    # KerasHub names LoRA layers by their index among the layers that have weights.
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    targets = set(backbone.default_lora_layer_names())
    expected = {str(i): layer for i, layer in enumerate(layers) if layer.name in targets}
    with readable(path), h5py.File(path, "r") as file:
        names = set(file["lora"]) - {"vars"}
        if names != set(expected):
            raise DataError(
                f"{path} belongs to another backbone: expected LoRA kernels for layers "
                f"{_some(expected)}. Received: layers {_some(names)}"
            )
        return [
            (layer.kernel, _read_factors(file, index, layer.kernel))
            for index, layer in expected.items()
        ]


def _read_factors(
    file: h5py.File, index: str, kernel: keras.Variable
) -> tuple[np.ndarray, np.ndarray]:
    """Return the LoRA factors of one layer in float32, after checking their shapes."""
    a, b = (
        saving_lib.safe_get_h5_dataset(file, f"lora/{index}/vars/lora_kernel_{part}")
        for part in "ab"
    )
    shape = tuple(kernel.shape)
    if (*a.shape[:-1], b.shape[-1]) != shape or b.shape != (a.shape[-1], shape[-1]):
        raise DataError(
            f"{file.filename} belongs to another backbone: {kernel.path} has shape {shape}. "
            f"Received: LoRA kernels of shape {a.shape} and {b.shape}"
        )
    factors = a[()].astype(np.float32), b[()].astype(np.float32)
    if not all(np.isfinite(factor).all() for factor in factors):
        raise DataError(
            f"{file.filename} must hold finite weights. "
            f"Received: NaN or infinity in {a.name} or {b.name}"
        )
    return factors


def _some(names: Any) -> str:
    ordered = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(ordered[:6]) + (", ..." if len(ordered) > 6 else "")
