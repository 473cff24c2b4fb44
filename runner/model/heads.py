"""The functions of a head: the activation of its first layer, if any, and that of its output."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Of the layer between pooling and output, in a `Head` that has one.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Logits (rows, labels) -> the numbers that are written. A new kind of head is a line here, and its
# name in `task.HEADS`.
OUTPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "regression": lambda logits: logits,
}
