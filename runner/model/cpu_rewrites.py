"""A traced function -> the same function in forms that XLA compiles to faster code on a CPU.

Keras and KerasHub are not changed. The program that JAX traces from them is rewritten, equation by
equation, before it is compiled. Each rewrite is a case in `_Rewriter._rewrite`. Figures are for one
core of an AMD EPYC (Zen 4), 2,048 tokens, layers of 512. Does not know models.

Products: if the processor has instructions for it, XLA's CPU library (YNNPACK) multiplies bfloat16
into float32 at twice the float32 rate. Keras asks for bfloat16 into bfloat16, which is converted
and runs at the float32 rate. In GFLOP/s: float32 109, bfloat16 into bfloat16 105, int8 into int32
163, bfloat16 into float32 215. So a product of bfloat16 arrays keeps its float32 sums until they
are rounded once, which is also more accurate. A product of int8 arrays is computed in bfloat16,
which represents every int8 exactly. Sums of up to 1,040 such products (2^24 / 127^2) are exact in
float32; longer ones have a rounding error of 6e-8. Without those instructions (Zen 3) both would be
slower, 51 instead of 75 and 49 instead of 91 GFLOP/s, so neither is rewritten.

Elementwise operations: the processor computes in float32, so XLA converts the operands of each
operation and rounds its result to bfloat16. A gated activation of 2,048 x 2,048 took 11.3 ms this
way and 2.1 ms in float32 (Zen 5). So elementwise results stay in float32 until another kind of
operation uses them, as XLA's own `xla_allow_excess_precision` does between two conversions.

Norms: YNNPACK also sums squares, but not over (tokens, 1, width), the shape in which tokens go
through the layers (`attention.py`). Without the 1, a model is 1.05 times as fast.

Rotary embedding: the cosines and sines of all positions are constant, but too large for XLA to
compute at compile time. It would compute them in each layer, for each head of queries and keys.
Passing them as constants makes a model 1.06 times as fast.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from runner.common.machine import multiplies_bfloat16

# Primitives that NumPy computes while a program is traced, since compiling a JAX program for them
# takes half a second per shape. Values that need other primitives stay in the program.
UFUNCS: dict[str, np.ufunc] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "pow": np.power,
    "cos": np.cos,
    "sin": np.sin,
}
# Primitives whose elements each depend on one element per operand.
ELEMENTWISE = {
    *("abs", "add", "add_any", "div", "erf", "exp", "integer_pow", "log", "logistic", "max", "min"),
    *("mul", "neg", "pow", "rsqrt", "sqrt", "square", "sub", "tanh"),
}
# Primitives that call another program, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def rewritten_for_cpu(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a function that `jax.jit` traces to the rewritten program of `function`."""

    def rewritten(*arguments: Any) -> jax.Array:
        traced = jax.make_jaxpr(function)(*arguments)
        (output,) = _Rewriter().evaluate(traced, list(map(_Value, jax.tree.leaves(arguments))))
        return output.array

    return rewritten


@dataclass(frozen=True)
class _Value:
    """An operand or a result of an equation.

    Attributes:
        made: its array in the traced program; None if it is yet to be rounded from `exact`.
        made_by: the equation that computes it, and its operands; None for an argument or constant.
        number: equal for values that are computed alike; None if it depends on an argument.
        exact: its float32 array before rounding to its own dtype; None if there is none.
    """

    made: Any
    made_by: tuple[JaxprEqn, tuple["_Value", ...]] | None = None
    number: int | None = None
    exact: Any = None

    @functools.cached_property
    def array(self) -> Any:
        """Its array in its own dtype."""
        if self.made is not None or self.made_by is None:
            return self.made
        return self.exact.astype(_dtype(self.made_by[0].outvars[0]))

    @property
    def in_float32(self) -> Any:
        """Its array in float32, without rounding if possible."""
        return self.array.astype(jnp.float32) if self.exact is None else self.exact


class _Rewriter:
    """The rewriting of one program."""

    def __init__(self) -> None:
        self._multiplies_bfloat16 = multiplies_bfloat16()
        self._numbers: dict[Any, int] = {}
        self._tables: dict[int | None, np.ndarray] = {}

    def evaluate(self, traced: ClosedJaxpr, arguments: Sequence[_Value]) -> list[_Value]:
        """Evaluate a traced function, equation by equation, like `jax.core.eval_jaxpr`."""
        jaxpr: Jaxpr = traced.jaxpr
        values = dict(zip(jaxpr.constvars, map(self._constant, traced.consts), strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> _Value:
            is_literal = isinstance(variable, Literal)
            return self._constant(variable.val) if is_literal else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._apply(equation, tuple(map(read, equation.invars)))
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _apply(self, equation: JaxprEqn, inputs: tuple[_Value, ...]) -> list[_Value]:
        if (call := CALLS.get(equation.primitive.name)) is not None:
            return self.evaluate(equation.params[call], inputs)
        if (rewritten := self._rewrite(equation, inputs)) is not None:
            return [rewritten]
        outputs = _computed(equation, [value.array for value in inputs])
        if equation.primitive.multiple_results:
            return list(map(_Value, outputs))
        return [_Value(outputs, (equation, inputs), self._number(equation, inputs))]

    def _rewrite(self, equation: JaxprEqn, inputs: tuple[_Value, ...]) -> _Value | None:
        """Return the result of an equation in its faster form, None if it has none."""
        made_by, number, exact = (equation, inputs), self._number(equation, inputs), None
        match equation.primitive.name:
            case "dot_general" if self._multiplies_bfloat16 and _is_narrow(equation):
                exact = _summed_in_float32(equation, inputs)
            case "convert_element_type" if _is_kept(equation, inputs[0]):
                exact = inputs[0].in_float32
            case "reduce_sum" if (squared := _squared(inputs[0])) is not None:
                sums = _sums_of_squares(equation, squared.array)
                return None if sums is None else _Value(sums)
            case "cos" | "sin" if number is not None:
                return _Value(self._table(_Value(None, made_by, number)), number=number)
            case _ if number is None and _rounds_elements(equation):
                exact = _computed(equation, [value.in_float32 for value in inputs])
        return None if exact is None else _Value(None, made_by, exact=exact)

    def _constant(self, array: Any) -> _Value:
        if isinstance(array, jax.core.Tracer):
            return _Value(array)
        key = id(array) if np.ndim(array) else (str(np.asarray(array).dtype), float(array))
        return _Value(array, number=self._numbers.setdefault(key, len(self._numbers)))

    def _number(self, equation: JaxprEqn, inputs: tuple[_Value, ...]) -> int | None:
        numbers = [value.number for value in inputs]
        if None in numbers or not _is_known(equation):
            return None
        key = (equation.primitive.name, str(equation.params), *numbers)
        return self._numbers.setdefault(key, len(self._numbers))

    def _table(self, value: _Value) -> np.ndarray:
        """Return the array of a constant value; equal values share one."""
        if value.made_by is None:
            return np.asarray(value.array)
        if value.number not in self._tables:
            equation, inputs = value.made_by
            arrays, name = [self._table(each) for each in inputs], equation.primitive.name
            aval: Any = equation.outvars[0].aval
            computed = UFUNCS[name](*arrays) if name in UFUNCS else FORMS[name](equation, *arrays)
            self._tables[value.number] = np.asarray(computed, aval.dtype)
        return self._tables[value.number]


def _computed(equation: JaxprEqn, arrays: Sequence[Any]) -> Any:
    primitive = equation.primitive
    return primitive.bind(*arrays, **primitive.get_bind_params(equation.params))


def _is_narrow(product: JaxprEqn) -> bool:
    kinds = set(map(_dtype, product.invars))
    return len(kinds) == 1 and kinds <= {jnp.dtype("bfloat16"), jnp.dtype("int8")}


def _summed_in_float32(product: JaxprEqn, operands: Sequence[_Value]) -> Any:
    parameters = {**product.params, "preferred_element_type": jnp.dtype("float32")}
    narrow = [operand.array.astype(jnp.bfloat16) for operand in operands]
    return product.primitive.bind(*narrow, **parameters)


def _rounds_elements(equation: JaxprEqn) -> bool:
    """Return whether an equation is elementwise from bfloat16 to bfloat16."""
    kinds = set(map(_dtype, (*equation.invars, *equation.outvars)))
    return equation.primitive.name in ELEMENTWISE and kinds == {jnp.dtype(jnp.bfloat16)}


def _is_kept(conversion: JaxprEqn, value: _Value) -> bool:
    """Return whether a conversion can stay in float32 and be rounded later."""
    old, new = _dtype(conversion.invars[0]), conversion.params["new_dtype"]
    floats = {jnp.dtype("float32"), jnp.dtype(jnp.bfloat16)}
    return (
        value.number is None
        and new in floats
        and old != new
        and (old in floats or value.exact is not None)
    )


def _dtype(variable: Any) -> Any:
    """Return the dtype of an equation's variable, which JAX's type hints lack."""
    return variable.aval.dtype


def _squared(value: _Value) -> _Value | None:
    """Return x if the value is x squared, else None."""
    if value.made_by is None:
        return None
    equation, inputs = value.made_by
    name = equation.primitive.name
    is_square = name == "square" or (name == "integer_pow" and equation.params["y"] == 2)
    return inputs[0] if is_square else None


def _sums_of_squares(sum_: JaxprEqn, array: Any) -> Any | None:
    """Return sums of squares over the last axis, computed without axes of length 1.

    None if there are no such axes, or `sum_` reduces other axes.
    """
    *leading, width = array.shape
    if tuple(sum_.params["axes"]) != (len(leading),) or 1 not in leading:
        return None
    array = array.reshape(*(length for length in leading if length != 1), width)
    return jnp.square(array).sum(axis=-1).reshape(leading)


def _counted(iota: JaxprEqn) -> np.ndarray:
    shape, dimension = iota.params["shape"], iota.params["dimension"]
    counts = np.arange(shape[dimension]).reshape([-1] + [1] * (len(shape) - dimension - 1))
    return np.broadcast_to(counts, shape)


def _broadcast(equation: JaxprEqn, array: np.ndarray) -> np.ndarray:
    shape = [1] * len(equation.params["shape"])
    for length, dimension in zip(array.shape, equation.params["broadcast_dimensions"], strict=True):
        shape[dimension] = length
    return np.broadcast_to(array.reshape(shape), equation.params["shape"])


def _product(equation: JaxprEqn, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    contracted, _ = equation.params["dimension_numbers"]
    return np.tensordot(left, right, axes=contracted)


# Like `UFUNCS`, for primitives that are not ufuncs.
FORMS: dict[str, Callable[..., np.ndarray]] = {
    "iota": _counted,
    "broadcast_in_dim": _broadcast,
    "dot_general": _product,
    "convert_element_type": lambda _, array: array,
    "integer_pow": lambda equation, array: array ** equation.params["y"],
    "reshape": lambda equation, array: array.reshape(equation.params["new_sizes"]),
    "tile": lambda equation, array: np.tile(array, equation.params["reps"]),
    "stack": lambda equation, *arrays: np.stack(arrays, equation.params["axis"]),
    "concatenate": lambda equation, *arrays: np.concatenate(arrays, equation.params["dimension"]),
}


def _is_known(equation: JaxprEqn) -> bool:
    """Return whether NumPy can compute an equation here; it does not compute batched products."""
    if equation.primitive.name == "dot_general":
        _, batched = equation.params["dimension_numbers"]
        return not any(batched)
    return equation.primitive.name in UFUNCS or equation.primitive.name in FORMS
