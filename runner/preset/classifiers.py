"""The task.json and task.weights.h5 of a KerasHub `TextClassifier` preset -> its head.

Both the driver and the workers read it, without Keras. `families.py` says which pooling and layers
a class has. Does not know the backbone, which `reader.py` reads as in any preset.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from runner.common.errors import DataError, readable, shown
from runner.common.records import Head
from runner.preset.families import FAMILIES, Classifier
from runner.preset.json_files import read_json, settings_of

TASK = "task.json"
TASK_WEIGHTS = "task.weights.h5"
# linear: the model returns logits. The others are the final activation.
ACTIVATIONS = ("linear", "softmax", "sigmoid")


@dataclass(frozen=True, slots=True)
class TextClassifier:
    """A classifier's own head, as its files describe it. activation: one of `ACTIVATIONS`."""

    path: Path
    known: Classifier
    classes: int
    activation: str

    @property
    def pooling(self) -> str:
        return self.known.pooling

    @property
    def files(self) -> tuple[Path, ...]:
        return self.path / TASK, self.path / TASK_WEIGHTS

    def head(self, *, hidden_dim: int, classes: int) -> Head:
        """Return the weights of the head, in float32.

        Args:
            hidden_dim: the backbone's. classes: the number of label columns.

        Raises:
            DataError: the weights are damaged, or do not fit the backbone or the classes.
        """
        if self.classes != classes:
            raise DataError(
                f"{self.path / TASK} must have {classes} classes, one for each label column. "
                f"Received: num_classes={self.classes}"
            )
        layers = _dense_layers(self.path / TASK_WEIGHTS)
        wanted = 1 if self.known.dense is None else 2
        if len(layers) != wanted:
            raise DataError(
                f"{self.path / TASK_WEIGHTS} must hold {wanted} dense layers, those of a "
                f"{self.known.class_name}. Received: {len(layers)}"
            )
        size = hidden_dim
        for kernel, bias in layers:
            if kernel.ndim != 2 or kernel.shape[0] != size or bias.shape != kernel.shape[1:]:
                raise DataError(
                    f"{self.path / TASK_WEIGHTS} does not fit its backbone: expected a kernel of "
                    f"{size} rows and a bias for its columns. Received: {kernel.shape} and "
                    f"{bias.shape}"
                )
            size = kernel.shape[1]
        if size != classes:
            raise DataError(
                f"{self.path / TASK_WEIGHTS} must end in {classes} classes. Received: {size}"
            )
        kernel, bias = layers[-1]
        if self.known.dense is None:
            return Head(kernel, bias)
        return Head(kernel, bias, dense=layers[0], activation=self.known.dense)


def read_classifier(path: Path, class_name: str) -> TextClassifier | None:
    """Return the complete classifier in a preset directory, None if there is none.

    A task.json of another task, such as CausalLM, is ignored: it has no head for classes.

    Args:
        class_name: of the backbone, a key of `FAMILIES`.

    Raises:
        DataError: its task.json is damaged or not supported.
    """
    known = FAMILIES[class_name].classifier
    if known is None or not all((path / name).is_file() for name in (TASK, TASK_WEIGHTS)):
        return None
    content = read_json(path / TASK)
    # KerasNLP called a BertTextClassifier BertClassifier.
    old_name = known.class_name.replace("TextClassifier", "Classifier")
    if content.get("class_name") not in (known.class_name, old_name):
        return None
    config = settings_of(path / TASK, content)
    classes, activation = config.get("num_classes"), _name(config.get("activation"))
    if type(classes) is not int or classes < 1:
        raise DataError(
            f"{path / TASK} must set num_classes to a positive integer. Received: {shown(classes)}"
        )
    if activation not in ACTIVATIONS:
        raise DataError(
            f"{path / TASK} must set activation to one of {', '.join(ACTIVATIONS)}. "
            f"Received: activation={shown(activation)}"
        )
    return TextClassifier(path, known, classes, activation)


def read_own_head(preset: Path, *, hidden_dim: int, classes: int) -> Head:
    """Return the head of a preset that is a whole classifier.

    Arguments and errors are those of `TextClassifier.head` and `read_classifier`.
    """
    classifier = read_classifier(preset, str(read_json(preset / "config.json").get("class_name")))
    assert classifier is not None, f"this is a bug: {preset} is not a classifier"
    return classifier.head(hidden_dim=hidden_dim, classes=classes)


def _name(activation: Any) -> str:
    """Return the name of an activation that Keras serialized as a string, an object or null."""
    if isinstance(activation, dict):
        activation = activation.get("config", activation.get("class_name"))
    return "linear" if activation is None else str(activation)


def _dense_layers(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (kernel, bias) of each dense layer in a file, in the order of the model."""
    with readable(path), h5py.File(path, "r") as file:
        names = sorted(file["layers"], key=lambda name: (len(name), name))
        groups = [file[f"layers/{name}/vars"] for name in names]
        layers = [(_values(vars["0"]), _values(vars["1"])) for vars in groups if len(vars)]
    if not all(np.isfinite(array).all() for layer in layers for array in layer):
        raise DataError(f"{path} must hold finite weights. Received: NaN or infinity")
    return layers


def _values(dataset: h5py.Dataset) -> np.ndarray:
    values = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":
        values = values.view(ml_dtypes.bfloat16)
    return np.asarray(values, np.float32)
