"""Layouts -> keras.distribution objects.

The only file of this folder that imports a framework.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras

from sharding.layouts import WeightLayout

AXES = ("batch", "model")


def distribute(layouts: Sequence[WeightLayout], group_size: int) -> tuple[Any, Any]:
    """Let Keras split variables over a (1, group_size) mesh of all processes' devices.

    Return the `ModelParallel` distribution, which is now active, and the JAX sharding of an array
    that every process holds whole.
    """
    mesh = keras.distribution.DeviceMesh(
        (1, group_size), list(AXES), keras.distribution.list_devices()
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    for layout in layouts:
        # Whole paths instead of the rules' patterns, so that Keras does exactly what was decided.
        layout_map[re.escape(layout.path)] = layout.axes
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)
    replicated = keras.distribution.TensorLayout((), mesh).backend_layout
    return distribution, replicated
