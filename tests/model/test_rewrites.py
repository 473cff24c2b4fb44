"""A program rewritten for a CPU computes what it computed, and holds the forms it was given."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from runner.model import cpu_rewrites
from runner.model.cpu_rewrites import rewritten_for_cpu

pytestmark = pytest.mark.process  # compiles programs


@pytest.fixture(params=[True, False], ids=["bfloat16-here", "no-bfloat16"])
def has_bfloat16(request, monkeypatch):
    monkeypatch.setattr(cpu_rewrites, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "out", "bound"), [("bfloat16", "bfloat16", 4e-3), ("int8", "int32", 1e-6)]
)
def test_rewritten_products_are_the_same_products(has_bfloat16, dtype, out, bound):
    random = np.random.default_rng(0)
    values = [random.integers(-127, 128, size=shape) for shape in ((5, 300), (300, 7))]
    arrays = [jnp.asarray(value, dtype) for value in values]

    @jax.jit
    def plain(left, right):
        return jnp.matmul(left, right, preferred_element_type=out)

    exact = values[0].astype(np.int64) @ values[1]
    for function in (plain, rewritten_for_cpu(plain)):
        answer = np.asarray(function(*arrays), np.float64)
        # Nothing but the last rounding, of bfloat16 or of nothing, lies between.
        assert np.abs(answer - exact).max() <= bound * np.abs(exact).max()


def test_all_narrow_products_are_rewritten_where_there_are_instructions_and_no_other(has_bfloat16):
    def function(left, right, wide):
        return (jax.jit(jnp.matmul)(left, right) @ right.T).astype("float32") @ wide

    narrow = jnp.ones((4, 4), "bfloat16")
    traced = program(function, narrow, narrow, jnp.ones((4, 4)))
    assert traced.count("dot_general") == 3
    assert traced.count("preferred_element_type=float32") == (3 if has_bfloat16 else 1)
    assert ("preferred_element_type=bfloat16" in traced) != has_bfloat16


@keras.ops.custom_gradient
def with_own_gradient(left, right):
    """A product in the words of Keras' int8 layers."""
    return jnp.matmul(left, right, preferred_element_type="int32"), lambda *_: None


def test_a_product_with_a_gradient_of_its_own_is_rewritten(has_bfloat16):
    random = np.random.default_rng(0)
    left, right = (random.integers(-127, 128, shape) for shape in ((5, 300), (300, 7)))
    arrays = jnp.asarray(left, "int8"), jnp.asarray(right, "int8")

    def scaled(left, right):
        return with_own_gradient(left, right).astype("float32") / 127

    assert np.allclose(rewritten_for_cpu(scaled)(*arrays), left @ right / 127, rtol=1e-6)
    # Its sums are float32 already: what follows takes them as they are.
    assert ("i32" in program(scaled, *arrays)) != has_bfloat16


def gated(gate, up):
    return jax.nn.gelu(gate, approximate=True) * up


def test_chains_of_bfloat16_are_rounded_once():
    random = np.random.default_rng(4)
    gate, up = (jnp.asarray(random.normal(size=(50, 8)), "bfloat16") for _ in range(2))
    exact = np.asarray(gated(gate.astype("float32"), up.astype("float32")))
    rewritten = rewritten_for_cpu(gated)(gate, up)
    assert rewritten.dtype == jnp.bfloat16
    # All but the constants, which were bfloat16 before.
    assert np.abs(np.asarray(rewritten, "float32") - exact).max() <= 4e-3 * np.abs(exact).max()
    traced = program(gated, gate, up)
    assert [traced.count(f":bf16[50,8] = {word}") for word in ("mul", "add", "tanh")] == [0] * 3
    assert traced.count(":bf16[50,8] = convert_element_type") == 1


def test_what_is_not_element_by_element_takes_rounded_values():
    def function(x):
        doubled = x * jnp.bfloat16(1.01)
        return doubled.max(axis=-1), (doubled.astype("float32") + 1).astype("bfloat16") @ doubled.T

    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6)), "bfloat16")
    largest, product = function(x)

    def first(x):
        return function(x)[0]

    def second(x):
        return function(x)[1]

    assert np.array_equal(rewritten_for_cpu(first)(x), largest)
    difference = np.abs(np.asarray(rewritten_for_cpu(second)(x) - product, "float32")).max()
    assert difference <= 1e-2 * np.abs(np.asarray(product, "float32")).max()


def test_float32_is_left_as_it_is():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, 6)), "float32")
    assert np.array_equal(jax.jit(rewritten_for_cpu(gated))(x, x), jax.jit(gated)(x, x))
    assert "bf16" not in program(gated, x, x)


@pytest.mark.parametrize("shape", [(6, 1, 8), (1, 6, 8), (2, 1, 3, 1, 8), (1, 1, 8)])
@pytest.mark.parametrize("square", [jnp.square, lambda x: x**2])
def test_squares_are_summed_without_axes_of_one(shape, square):
    def norm(x):
        return x * jax.lax.rsqrt(square(x).mean(axis=-1, keepdims=True) + 1e-6)

    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), "float32")
    rewritten = rewritten_for_cpu(norm)(x)
    assert rewritten.shape == shape
    assert np.abs(rewritten - norm(x)).max() <= 1e-6
    squeezed = ",".join(str(length) for length in shape if length != 1)
    assert f":f32[{squeezed}] = square" in program(norm, x)


@pytest.mark.parametrize(
    ("shape", "axes"), [((6, 8), -1), ((6, 1, 8), 0), ((6, 1, 8), (1, 2)), ((6, 1, 8), None)]
)
def test_other_sums_stay(shape, axes):
    def function(x):
        return jnp.square(x).sum(axis=axes)

    x = jnp.asarray(np.random.default_rng(2).normal(size=shape), "float32")
    assert "reshape" not in program(function, x)
    assert np.abs(rewritten_for_cpu(function)(x) - function(x)).max() <= 1e-5


def rotated(x, *, wavelength=10_000.0):
    """Rotary embedding, (positions, features), in the words that KerasHub has for it."""
    length, features = x.shape
    inverse = wavelength ** -(jnp.arange(0, features, 2, dtype="float32") / features)
    angles = jnp.einsum("i,j->ij", jnp.arange(length, dtype="float32"), inverse)
    angles = jnp.stack((angles, angles), axis=-2).reshape(length, features)
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.stack((-right, left), axis=-2).reshape(x.shape)
    return x * jnp.cos(angles).astype(x.dtype) + turned * jnp.sin(angles).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cosines_and_sines_of_positions_are_constants(dtype):
    def layers(x):
        for wavelength in (10_000.0, 1_000_000.0, 10_000.0):
            x = jax.jit(rotated, static_argnames="wavelength")(x, wavelength=wavelength)
        return x

    x = jnp.asarray(np.random.default_rng(3).normal(size=(300, 16)), dtype)
    traced = program(layers, x)
    assert " = cos" not in traced
    assert " = sin" not in traced
    difference = np.abs(np.asarray(rewritten_for_cpu(layers)(x) - layers(x), "float32")).max()
    assert difference <= {"float32": 5e-5, "bfloat16": 5e-2}[dtype]


def test_a_table_is_one_constant_for_all_that_are_alike():
    def layers(x):
        return rotated(rotated(x), wavelength=7.0) + rotated(x, wavelength=7.0)

    traced = jax.make_jaxpr(rewritten_for_cpu(layers))(jnp.ones((9, 4)))
    assert [constant.shape for constant in traced.consts] == [(9, 4)] * 4


def test_a_table_by_words_that_are_not_known_stays_in_the_program():
    def function(x):
        return x * jnp.cos(jnp.cumsum(jnp.ones(5)))

    assert " = cos" in program(function, jnp.ones(5))
    assert np.array_equal(rewritten_for_cpu(function)(jnp.ones(5)), function(jnp.ones(5)))


@pytest.mark.parametrize(
    "angles",
    [
        lambda: jnp.tile(jnp.arange(4, dtype="int32"), 3).astype("float32") / 7,
        lambda: jax.lax.broadcasted_iota("float32", (2, 3, 4), 1) - 2 * jnp.pi,
        lambda: jnp.broadcast_to(-jnp.arange(3.0), (2, 5, 3)) ** 2,
        lambda: jnp.concatenate([jnp.arange(3.0), 1e4 ** -jnp.arange(4.0)]).reshape(1, 7, 1),
        lambda: jnp.arange(6.0).reshape(2, 3) @ jnp.arange(12.0).reshape(3, 4),
        lambda: jnp.einsum("bi,bij->bj", jnp.ones((2, 3)), jnp.ones((2, 3, 4))),
    ],
    ids=["tile", "iota", "broadcast", "concatenate", "product", "batched-product"],
)
def test_tables_are_what_jax_computes(angles):
    def function(x):
        return x * jnp.sin(angles())

    expected = np.asarray(function(1.0))
    assert np.abs(np.asarray(rewritten_for_cpu(function)(1.0)) - expected).max() <= 1e-6


def test_cosines_of_what_comes_in_stay():
    x = jnp.linspace(0, 9, 20)
    assert " = cos" in program(jnp.cos, x)
    assert np.array_equal(rewritten_for_cpu(jnp.cos)(x), jnp.cos(x))


def program(function, *arguments):
    return str(jax.make_jaxpr(rewritten_for_cpu(function))(*arguments))
