"""Preset directory, LoRA file and dtype -> a Keras backbone with its weights, LoRA merged.

Runs in the process that predicts. Imports Keras, so `workers.prepare_process` must come first.
"""

from typing import Any

import h5py
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from runner.errors import DataError


def load_backbone(preset: str, *, dtype: str) -> keras.Model:
    """Return the backbone of a KerasHub preset directory.

    Configs are deserialized in Keras' safe mode: no code comes from the directory.

    Raises:
        DataError: the weights do not fit the config, or the class takes more than token ids.
    """
    try:
        backbone = keras_hub.models.Backbone.from_preset(preset, dtype=dtype)
    except (ValueError, KeyError, TypeError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{preset} does not load as a preset: {first_line}") from error
    if set(backbone.input) != {"token_ids", "padding_mask"}:
        raise DataError(
            f"{preset} must be a text backbone that takes token_ids and padding_mask. "
            f"Received: inputs {sorted(backbone.input)}"
        )
    return backbone


def merge_lora(backbone: keras.Model, path: str) -> None:
    """Add the LoRA update of a `*.lora.h5` file to the kernels, which then cost nothing extra.

    kernel + A @ B, computed in float32 for one kernel at a time (Hu et al. 2021, section 4.1).
    KerasHub saves no alpha and loads with alpha equal to the rank, so their quotient is 1 here.

    Raises:
        DataError: the file's layers or shapes are not this backbone's.
    """
    # KerasHub names LoRA layers by their index among the layers that have weights.
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    targets = set(backbone.default_lora_layer_names())
    expected = {str(i): layer for i, layer in enumerate(layers) if layer.name in targets}
    with h5py.File(path, "r") as file:
        found = set(file["lora"]) - {"vars"}
        if found != set(expected):
            raise DataError(
                f"{path} belongs to another backbone: expected LoRA kernels for layers "
                f"{_some(expected)}. Received: layers {_some(found)}"
            )
        for index, layer in expected.items():
            a, b = (file[f"lora/{index}/vars/lora_kernel_{part}"][()] for part in "ab")
            _merge_kernel(path, layer.kernel, a, b)


def _merge_kernel(path: str, kernel: Any, a: np.ndarray, b: np.ndarray) -> None:
    if (*a.shape[:-1], b.shape[-1]) != tuple(kernel.shape) or b.shape != (a.shape[-1], b.shape[-1]):
        raise DataError(
            f"{path} belongs to another backbone: {kernel.path} has shape {tuple(kernel.shape)}. "
            f"Received: LoRA kernels of shape {a.shape} and {b.shape}"
        )
    update = np.matmul(a.astype(np.float32), b.astype(np.float32))
    kernel.assign((jnp.asarray(kernel.value, jnp.float32) + update).astype(kernel.dtype))


def _some(names: Any) -> str:
    ordered = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(ordered[:6]) + (", ..." if len(ordered) > 6 else "")
