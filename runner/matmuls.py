"""A traced function -> the same function with matrix products in the forms a CPU is fast at.

XLA's CPU library (YNNPACK) multiplies bfloat16 into float32 at twice the float32 rate where the
processor has instructions for it, but bfloat16 into bfloat16, what Keras asks for, is converted
and runs at the float32 rate. Measured on one core of an AVX-512 BF16 processor, 2048 x 512 x 2048:
float32 109, bfloat16 into bfloat16 105, int8 into int32 163, bfloat16 into float32 215 GFLOP/s.

So a product of bfloat16 arrays keeps its float32 sums until they are rounded once, which is also
more exact, and a product of int8 arrays is computed in bfloat16: it holds every int8 exactly, and
float32 every sum of 1,040 such products (2^24 / 127^2); longer sums round at 6e-8.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def with_fast_matmuls(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `function`, to be traced by `jax.jit`, with its matrix products rewritten."""

    def rewritten(*arguments: Any) -> jax.Array:
        traced = jax.make_jaxpr(function)(*arguments)
        (output,) = _evaluate(traced, jax.tree.leaves(arguments))
        return output

    return rewritten


def _evaluate(traced: ClosedJaxpr, arguments: list[Any]) -> list[Any]:
    """Evaluate a traced function, equation by equation, as `jax.core.eval_jaxpr` does."""
    jaxpr: Jaxpr = traced.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        outputs = _apply(equation, [read(variable) for variable in equation.invars])
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    primitive = equation.primitive
    if primitive.name in ("jit", "pjit"):
        return _evaluate(equation.params["jaxpr"], inputs)
    if primitive.name == "dot_general" and _is_narrow(inputs):
        wanted = equation.params["preferred_element_type"] or inputs[0].dtype
        parameters = {**equation.params, "preferred_element_type": jnp.dtype("float32")}
        operands = [array.astype(jnp.bfloat16) for array in inputs]
        return [primitive.bind(*operands, **parameters).astype(wanted)]
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return list(outputs) if primitive.multiple_results else [outputs]


def _is_narrow(operands: list[Any]) -> bool:
    kinds = {operand.dtype for operand in operands}
    return len(kinds) == 1 and kinds <= {jnp.dtype("bfloat16"), jnp.dtype("int8")}
