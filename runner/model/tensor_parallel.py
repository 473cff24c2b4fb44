"""A backbone without values -> its slices on this member of a tensor-parallel group.

Runs in each process of the group. Does not know how weights are split, which `sharding/layouts.py`
decides.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from runner.common.errors import ConfigError
from runner.model.weights import StoredWeight
from sharding.layouts import Weight, WeightLayout, lay_out, replicated_reasons


def lay_out_backbone(
    backbone: keras.Model, family: str, group_size: int
) -> tuple[WeightLayout, ...]:
    """Return how each weight is split over the group.

    Args:
        family: the backbone's class name, a key of `layouts.RULES`.

    Raises:
        ConfigError: no rule matches a weight, or its size is not divisible by the group's.
    """
    weights = [Weight(variable.path, tuple(variable.shape)) for variable in backbone.weights]
    try:
        return lay_out(family, weights, group_size)
    except ValueError as error:
        raise ConfigError(f"--strategy tensor: {error}") from None


def place_slices(distribution: Any) -> Callable[[keras.Variable, StoredWeight], jax.Array]:
    """Return a `place` for `loading.fill` that reads only what this member holds.

    Each process passes its own shards to JAX, so JAX need not compare values between processes.
    """

    def place(variable: keras.Variable, stored: StoredWeight) -> jax.Array:
        sharding = distribution.get_variable_layout(variable).backend_layout
        return jax.make_array_from_callback(
            tuple(variable.shape), sharding, lambda index: stored.read(index, variable.dtype)
        )

    return place


def audit(backbone: keras.Model, layouts: Sequence[WeightLayout]) -> tuple[str, ...]:
    """Check that each weight is split as decided.

    Returns:
        Sentences for the user that say why large weights are not split.
    """
    by_path = {layout.path: layout for layout in layouts}
    for variable in backbone.weights:
        layout = by_path[variable.path]
        array = variable.value
        held = math.prod(array.addressable_shards[0].data.shape)
        parts = len(array.sharding.device_set) if "model" in layout.axes else 1
        assert held * parts == math.prod(variable.shape), (
            f"this is a bug: {variable.path} should be split as {layout.axes}, but this member "
            f"holds {held} of {math.prod(variable.shape)} values"
        )
    return replicated_reasons([layout for layout in layouts if len(layout.axes) > 1])
