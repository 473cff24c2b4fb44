"""A model, a pooling and a head -> the function that a device computes, ready to compile.

Does not know the values of weights: arguments may be arrays, or shapes for an absent device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from runner.common.poolings import POOLINGS
from runner.model.attention import attention
from sharding.batches import BatchShape

# The activation of the layer between pooling and output, in a `Head` that has one.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
# Logits (rows, labels) -> the numbers to write. A new kind of head needs a line here, and its name
# in `task.HEADS`.
OUTPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "regression": lambda logits: logits,
}


class Program:
    """What a device computes for a batch: the backbone, the pooling, the head.

    Args:
        model: a functional model over "token_ids" or "hidden", "padding_mask" and for BERT
            "segment_ids", LoRA merged.
        pooling: a key of `POOLINGS`.
        output: a key of `OUTPUTS`; "none" for pooled states; "hidden" for hidden states.
        way: how to attend, a key of `attention.WAYS`.
        dense: the activation between the two layers of a head, a key of `ACTIVATIONS`; None if the
            head has one layer.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        pooling: str,
        output: str,
        way: str,
        dense: str | None = None,
    ) -> None:
        self._model = model
        self._entry = "token_ids" if "token_ids" in model.input else "hidden"
        self._pooling = POOLINGS[pooling]
        self._dense = ACTIVATIONS[dense] if dense is not None else None
        self._output = output
        self._way = way

    def lower(
        self,
        arguments: tuple[Any, ...],
        shape: BatchShape,
        *,
        sharding: jax.sharding.Sharding | None,
        function: Callable[..., jax.Array] | None = None,
    ) -> jax.stages.Lowered:
        """Lower the program for one shape of batches.

        Args:
            arguments: trainable and non-trainable variables and the head, arrays or shapes of them.
            sharding: of the batch and of the output; None for this process' device.
            function: what to lower instead of `forward`, with the same arguments.
        """
        entry = self._model.input[self._entry]
        sizes = (shape.rows, shape.length, *entry.shape[2:])
        with jax.default_matmul_precision(precision_of(self._model)):
            return jax.jit(function or self.forward, out_shardings=sharding).lower(
                *arguments,
                jax.ShapeDtypeStruct(sizes, entry.dtype, sharding=sharding),
                jax.ShapeDtypeStruct((shape.rows,), "int32", sharding=sharding),
            )

    def forward(
        self,
        trainable: list[jax.Array],
        non_trainable: list[jax.Array],
        head: list[jax.Array],
        entry: jax.Array,
        lengths: jax.Array,
    ) -> jax.Array:
        states = self._states(trainable, non_trainable, entry, lengths)
        hidden = states["sequence_output"] if isinstance(states, dict) else states
        if self._output == "hidden":
            return hidden
        if self._pooling.pool is None:
            pooled = states["pooled_output"].astype(jnp.float32)
        else:
            pooled = self._pooling.pool(jnp, hidden.astype(jnp.float32), lengths)
        if self._output == "none":
            return pooled
        kernel, bias, *dense = head
        if self._dense is not None:
            between, its_bias = dense
            pooled = self._dense(jnp.matmul(pooled, between, precision="highest") + its_bias)
        logits = jnp.matmul(pooled, kernel, precision="highest") + bias
        return OUTPUTS[self._output](logits)

    def _states(
        self,
        trainable: list[jax.Array],
        non_trainable: list[jax.Array],
        entry: jax.Array,
        lengths: jax.Array,
    ) -> Any:
        """Return hidden states, (rows, length, hidden); for BERT a dict with pooled states too."""

        def call(entry: jax.Array, mask: jax.Array) -> Any:
            inputs = {self._entry: entry, "padding_mask": mask}
            if "segment_ids" in self._model.input:
                inputs["segment_ids"] = jnp.zeros_like(entry)  # a row is one segment
            return self._model.stateless_call(trainable, non_trainable, inputs, training=False)[0]

        rows, length, *trailing = entry.shape
        if self._way == "keras":
            return call(entry, jnp.arange(length)[None, :] < lengths[:, None])
        seen = lengths if self._pooling.sees_padding else None
        with attention(self._model, self._way, rows, length, seen):
            end_to_end = entry.reshape(rows * length, 1, *trailing)
            hidden = call(end_to_end, jnp.ones(end_to_end.shape[:2], bool))
        return hidden.reshape(rows, length, -1)


def precision_of(model: keras.Model) -> str:
    """Return JAX's precision for products; TF32 would break the float32 equalities on a GPU."""
    return "highest" if model.compute_dtype == "float32" else "default"
