"""A preset's weight files -> where each variable's values lie, and reads of the parts asked for.

A backbone is first built without values, then each process fills only the variables, or the slices
of variables, that it holds: no process ever holds a random model beside the real one, nor a whole
model of which it needs a part. LoRA is merged while a slice is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np
from keras.src.saving import saving_lib

from runner.errors import DataError, first_line

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One dataset of a weight file, with the LoRA factors that belong to it, if any.

    a: (*kernel.shape[:-1], rank), b: (rank, kernel.shape[-1]): the kernel is stored + a @ b.
    """

    file: str
    dataset: str
    shape: tuple[int, ...]
    dtype: str
    lora: tuple[np.ndarray, np.ndarray] | None = None

    def read(self, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        """Return the values at `index`, all of them if it is None, in `dtype`.

        The LoRA update is added in float32, before the values take their dtype
        (Hu et al. 2021, section 4.1; KerasHub loads with alpha equal to the rank).
        """
        index = index if index is not None else tuple(slice(None) for _ in self.shape)
        with h5py.File(self.file, "r") as file:
            values = file[self.dataset][index]
        if self.dtype == "bfloat16":
            values = values.view(ml_dtypes.bfloat16)
        if self.lora is not None:
            a, b = self.lora
            update = np.matmul(a[index[:-1]], b[:, index[-1]])
            update += values
            values = update
        return values if dtype is None else values.astype(dtype, copy=False)


class _LazyStore(saving_lib.H5IOStore):
    """Hands out where a dataset is instead of its values."""

    def __getitem__(self, key: str) -> Any:
        dataset = saving_lib.safe_get_h5_dataset(self._h5_entry_group, key)
        dtype = str(dataset.attrs.get("dtype", dataset.dtype))
        return StoredWeight(dataset.file.filename, dataset.name, dataset.shape, dtype)


class _LazyShardedStore(saving_lib.ShardedH5IOStore, _LazyStore):
    """The same over several files: ShardedH5IOStore finds the file, _LazyStore the dataset."""


def find_weights(model: keras.Model, preset: Path) -> dict[int, StoredWeight]:
    """Return where the values of each variable lie: id(variable) -> StoredWeight.

    Keras itself walks the model and matches it with the files, as `load_weights` does.

    Raises:
        DataError: the files do not fit the model.
    """
    single = preset / "model.weights.h5"
    found: dict[int, StoredWeight] = {}

    def note(variable: keras.Variable, stored: StoredWeight) -> None:
        if tuple(stored.shape) != tuple(variable.shape):
            raise DataError(
                f"{preset} holds weights of another size than its config says: expected "
                f"{variable.path} of shape {tuple(variable.shape)}. Received: {stored.shape}"
            )
        found[id(variable)] = stored

    store = (
        _LazyStore(single) if single.is_file() else _LazyShardedStore(single.with_suffix(".json"))
    )
    try:
        with _assignments_go_to(note):
            saving_lib._load_state(
                model,
                weights_store=store,
                assets_store=None,
                inner_path="",
                visited_saveables=set(),
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{preset} holds weights that do not fit its config: {first_line(error)}"
        ) from error
    finally:
        store.close()
    return found


@contextmanager
def _assignments_go_to(note: Any) -> Iterator[None]:
    """Within, `variable.assign(value)` calls `note(variable, value)`."""
    original = keras.Variable.assign
    keras.Variable.assign = note
    try:
        yield
    finally:
        keras.Variable.assign = original
