"""What follows a pooling: the layer that some heads begin with, and what is made of their sums."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Of the layer between pooling and head, in a `Head` that has one.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# A head's sums (rows, labels) -> what is written of them. A new kind of head is a line here, and
# its name in `task.HEADS`.
OUTPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "regression": lambda sums: sums,
}
