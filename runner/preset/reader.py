"""Model files on disk -> checked facts about them, read from JSON and array headers.

The driver rejects wrong files here, before any worker starts. Imports neither Keras nor JAX;
`model/loading.py` builds the model.
"""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from runner.common.errors import DataError, first_line, readable, shown
from runner.common.records import Head
from runner.preset.classifiers import TASK_WEIGHTS, TextClassifier, read_classifier
from runner.preset.families import FAMILIES, Family, family_of_checkpoint, model_shape
from runner.preset.json_files import read_json, settings_of
from runner.preset.tokenizer_files import TokenizerFiles, read_tokenizer
from sharding.costs import ModelShape

# Fields of a shape that must be positive.
SIZES = (
    *("vocabulary_size", "num_layers", "hidden_dim", "num_query_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_dim"),
)
QUANTIZED_POLICIES = ("QuantizedDTypePolicy", "Int4DTypePolicy")
# Version 3 is for field names that are not Latin-1, which a plain array does not have.
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
WEIGHTS = "model.weights.h5"
# In a prepared preset: how much its answers differ from float32.
ACCURACY_FILE = "quantization.json"
# The fewest bytes that a weight takes in a file: int4.
LEAST_WEIGHT_BYTES = 0.5
SHARDED_WEIGHTS_INDEX = "model.weights.json"


@dataclass(frozen=True, slots=True)
class Preset:
    """A complete KerasHub preset directory.

    quantization: of its weights on disk, int8, int4 or None. max_positions: the maximum number of
    tokens per row, None for no limit. classifier: its own head, if it is a whole `TextClassifier`.
    """

    path: Path
    class_name: str
    shape: ModelShape
    tokenizer: TokenizerFiles
    weight_files: tuple[Path, ...]
    quantization: str | None = None
    max_positions: int | None = None
    classifier: TextClassifier | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.class_name]

    @property
    def stored_bytes(self) -> int:
        """Bytes of its weight files."""
        return sum(path.stat().st_size for path in self.weight_files)

    @property
    def accuracy(self) -> dict[str, Any]:
        """What `accuracy.compare` measured when a quantized preset was prepared."""
        try:
            figures = read_json(self.path / ACCURACY_FILE)
        except DataError:
            figures = {}
        measured = figures.get("measured")
        if not isinstance(measured, str):
            return {"measured": "the preset does not say"}
        numbers = ("reference_rows", "max_abs_difference", "mean_abs_difference", "changed_argmax")
        is_complete = all(isinstance(figures.get(name), int | float) for name in numbers)
        return figures if is_complete else {"measured": measured}

    @property
    def small_files(self) -> tuple[Path, ...]:
        """The files other than weights that determine an answer."""
        preprocessor = self.path / "preprocessor.json"
        return (
            *(self.path / name for name in ("config.json", "tokenizer.json")),
            *([preprocessor] if preprocessor.is_file() else []),
            self.tokenizer.vocabulary,
            *([self.tokenizer.byte_pairs.merges] if self.tokenizer.byte_pairs else []),
        )


def read_preset(path: Path, *, needs_weights: bool = True) -> Preset:
    """Return what a KerasHub preset directory holds.

    Args:
        needs_weights: if False, weight files may be missing.

    Raises:
        DataError: a file is missing or unreadable, or the backbone is not supported.
    """
    if not os.path.isdir(path):  # Path.is_dir raises if the name is too long
        raise DataError(f"--preset must be a KerasHub preset directory. Received: {path}")
    if model_type := checkpoint_type(path):
        raise DataError(
            f"{path} is a Hugging Face checkpoint, not a KerasHub preset. Convert it once: "
            f"python run.py prepare --preset {path} --output DIR --quantization none; then run "
            f"with --preset DIR. Received: model_type={model_type!r}"
        )
    config = read_json(path / "config.json")
    module, class_name = str(config.get("module")), str(config.get("class_name"))
    if not module.startswith(("keras_hub.", "keras_nlp.")):
        raise DataError(
            f"{path / 'config.json'} must describe a backbone of keras_hub or keras_nlp. "
            f"Received: module={module!r}, class_name={class_name!r}"
        )
    settings = settings_of(path / "config.json", config)
    try:
        shape = model_shape(class_name, settings)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is not a preset that this runner can use. {first_line(error)}"
        ) from None
    quantization = _quantization(path, settings.get("dtype"))
    tokenizer = read_tokenizer(path)
    if needs_weights:
        weight_files = _weight_files(path)
        _check_size(path / "config.json", shape, weight_files)
    else:
        weight_files = tuple(sorted({*path.glob("*.weights.h5")} - {path / TASK_WEIGHTS}))
    positions = settings.get("max_sequence_length") if FAMILIES[class_name].has_positions else None
    return Preset(
        *(path, class_name, shape, tokenizer, weight_files, quantization),
        max_positions=positions if type(positions) is int else None,
        classifier=read_classifier(path, class_name),
    )


def checkpoint_type(path: Path) -> str | None:
    """Return the model type of a Hugging Face checkpoint, None if the folder is not one.

    Raises:
        DataError: KerasHub does not convert this type to a backbone in `FAMILIES`.
    """
    config = read_json(path / "config.json")
    if "class_name" in config or "model_type" not in config:
        return None
    model_type = str(config["model_type"])
    if family_of_checkpoint(model_type) is None:
        known = sorted(name for family in FAMILIES.values() for name in family.checkpoints)
        raise DataError(
            f"{path} is a Hugging Face checkpoint that KerasHub cannot convert to a supported "
            f"backbone. Expected a model_type of {', '.join(known)}. "
            f"Received: model_type={shown(model_type)}"
        )
    return model_type


def _check_size(config: Path, shape: ModelShape, weight_files: tuple[Path, ...]) -> None:
    """Reject absurd sizes before a worker builds, say, a million layers."""
    for name in SIZES:
        value = getattr(shape, name)
        if value < 1:
            raise DataError(
                f"{config} must describe a backbone with positive sizes. Received: {name}={value}"
            )
    expected = shape.weight_bytes(LEAST_WEIGHT_BYTES)
    stored = sum(file.stat().st_size for file in weight_files)
    if expected > stored:
        raise DataError(
            f"{config} does not match the weights beside it: expected at least {expected:.3g} "
            f"bytes of weights. Received: {stored:.3g} bytes in {len(weight_files)} files"
        )


def _quantization(path: Path, policies: Any) -> str | None:
    """Return the quantization that a config's dtype policies name, None if they are float."""
    if not isinstance(policies, dict) or policies.get("class_name") != "DTypePolicyMap":
        return None
    named = settings_of(
        path / "config.json", settings_of(path / "config.json", policies), "policy_map"
    )
    modes = {
        str(policy["config"].get("mode", "")).partition("/")[0]
        for policy in named.values()
        if isinstance(policy, dict)
        and policy.get("class_name") in QUANTIZED_POLICIES
        and isinstance(policy.get("config"), dict)
    }
    if len(modes) > 1 or not modes <= {"int8", "int4"}:
        raise DataError(
            f"{path / 'config.json'} must name one quantization, int8 or int4, or none. "
            f"Received: {shown(', '.join(sorted(modes)))}"
        )
    return next(iter(modes), None)


def check_lora(path: Path, shape: ModelShape) -> None:
    """Check the shapes in a LoRA file against the backbone's.

    `backbone.save_lora_weights` writes `lora/<layer>/vars/lora_kernel_{a,b}` for the query and
    value projection of each layer. Whether each fits its own layer is checked when it is merged.

    Raises:
        DataError: the file is missing or damaged, or its ranks or dimensions do not fit.
    """
    if not os.path.isfile(path):
        raise DataError(f"--lora-weights must be a *.lora.h5 file that exists. Received: {path}")
    try:
        with h5py.File(path, "r") as file:
            rank = int(file["lora/vars/rank"][()])
            pairs = {
                name: (group["vars/lora_kernel_a"].shape, group["vars/lora_kernel_b"].shape)
                for name, group in file["lora"].items()
                if name != "vars"
            }
    except Exception as error:  # h5py raises anything for a damaged file
        raise DataError(
            f"{path} is not a LoRA file as backbone.save_lora_weights writes it: "
            f"{first_line(error)}"
        ) from None
    if len(pairs) != 2 * shape.num_layers:
        raise DataError(
            f"{path} belongs to another backbone: expected LoRA kernels for query and value of "
            f"{shape.num_layers} layers, {2 * shape.num_layers} in all. Received: {len(pairs)}"
        )
    for name, (a, b) in pairs.items():
        if not a or not b or a[-1] != rank or b[0] != rank:
            raise DataError(
                f"{path} must have the same rank everywhere: expected {rank}, as the file says. "
                f"Received: layer {name} with kernels of shape {a} and {b}"
            )
        if shape.hidden_dim not in a[:-1]:
            raise DataError(
                f"{path} belongs to another backbone: expected hidden size {shape.hidden_dim}. "
                f"Received: layer {name} with a kernel of shape {a}"
            )


def read_head(kernel_path: Path, bias_path: Path, *, hidden_dim: int, classes: int) -> Head:
    """Return the head in two .npy files: kernel (hidden_dim, classes) and bias (classes,).

    Raises:
        DataError: a file is missing, needs unpickling, or has another shape.
    """
    kernel = _read_array("--head-kernel", kernel_path)
    bias = _read_array("--head-bias", bias_path)
    if kernel.shape != (hidden_dim, classes):
        raise DataError(
            f"--head-kernel must have shape (hidden, classes) = {(hidden_dim, classes)} to fit "
            f"the backbone. Received: {kernel_path} of shape {kernel.shape}"
        )
    if bias.shape != (classes,):
        raise DataError(
            f"--head-bias must have shape (classes,) = {(classes,)} to fit the head kernel. "
            f"Received: {bias_path} of shape {bias.shape}"
        )
    return Head(kernel, bias)


def _read_array(name: str, path: Path) -> np.ndarray:
    if not os.path.isfile(path):
        raise DataError(f"{name} must be a .npy file that exists. Received: {path}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers written by Python 2
            _check_size_in_header(file)
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # the header is parsed as Python, which can raise anything
        raise DataError(
            f"{name} must be a plain .npy array, as np.save writes it. "
            f"Received: {path} ({first_line(error)})"
        ) from None
    if array.dtype.kind not in "fiu":
        raise DataError(
            f"{name} must be a .npy array of numbers. Received: {path} of {array.dtype}"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(
            f"{name} must hold finite numbers in float32. Received: {path} with NaN or infinity"
        )
    return array


def _check_size_in_header(file: BinaryIO) -> None:
    """Check the size in a .npy header against the file's before NumPy allocates it; rewind."""
    version = np.lib.format.read_magic(file)
    if version not in NPY_HEADERS:
        raise ValueError(f"a .npy header of version {version}")
    shape, _, dtype = NPY_HEADERS[version](file)
    claimed, held = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
    if min(shape, default=0) < 0 or (claimed != held and not dtype.hasobject):
        raise ValueError(f"shape {shape} of {dtype} is {claimed} bytes, and {held} follow")
    file.seek(0)


def _weight_files(path: Path) -> tuple[Path, ...]:
    files = [path / WEIGHTS]
    if not files[0].is_file():
        index = path / SHARDED_WEIGHTS_INDEX
        if not index.is_file():
            raise DataError(f"The preset has no weights. Expected: {files[0]} or {index}")
        weight_map = settings_of(index, read_json(index), "weight_map")
        names = [
            name
            for value in weight_map.values()
            for name in (value if isinstance(value, list) else [value])
        ]
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(
                f"{index} must name the weight files in its weight_map. Received: {shown(names)}"
            )
        files = [path / name for name in sorted(set(names))]
    for file in files:
        if not os.path.isfile(file):
            raise DataError(f"The preset is missing a part of its weights. Expected: {file}")
        with readable(file), h5py.File(file, "r"):
            pass
    return tuple(files)
