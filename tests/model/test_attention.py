"""Attention against plain reference code, before any model."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.model import attention
from runner.model.attention import WAYS, ways_for

pytestmark = pytest.mark.process  # compiles programs

WAYS_HERE = [way for way, attend in WAYS.items() if attend is not None]


def textbook_attention(queries, keys, values, *, lengths, scale, soft_cap, window):
    """One query at a time, in float64; what a position past its row's end sees is masked too."""
    rows, length, query_heads, head_dim = queries.shape
    group = query_heads // keys.shape[2]
    output = np.zeros((rows, length, query_heads, head_dim))
    for row, position, head in np.ndindex(rows, length, query_heads):
        first = max(0, position - window + 1) if window else 0
        last = min(position + 1, lengths[row])
        seen = slice(first, max(last, first))
        logits = keys[row, seen, head // group] @ queries[row, position, head] * scale
        if soft_cap:
            logits = np.tanh(logits / soft_cap) * soft_cap
        if not logits.size:
            continue
        weights = np.exp(logits - logits.max())
        output[row, position, head] = weights @ values[row, seen, head // group] / weights.sum()
    return output


def operands(length, heads=(4, 2), seed=0):
    random = np.random.default_rng(seed)
    query_heads, heads_of_keys = heads
    shapes = [(2, length, query_heads, 8)] + [(2, length, heads_of_keys, 8)] * 2
    return [random.normal(size=shape).astype(np.float32) * 2 for shape in shapes]


@pytest.fixture
def kernels(monkeypatch):
    """tokamax' kernels by its plain code, as there are none for a CPU; the shapes that they got."""
    tokamax = pytest.importorskip("tokamax")
    plain, shapes = tokamax.dot_product_attention, []

    def compute(queries, *others, implementation, **options):
        assert implementation in ("mosaic_tpu", "mosaic_gpu", "triton")
        shapes.append(queries.shape)
        return plain(queries, *others, implementation="xla", **options)

    monkeypatch.setattr(tokamax, "dot_product_attention", compute)
    return shapes


@pytest.mark.parametrize("way", WAYS_HERE)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize(("soft_cap", "window"), [(None, None), (5.0, None), (None, 40), (5.0, 7)])
def test_every_way_is_the_textbooks(kernels, way, heads, soft_cap, window):
    # Three chunks, the last one short; a row that ends in the second.
    arrays, lengths = operands(150, heads), np.array([150, 97], np.int32)
    options = {"scale": 0.3, "soft_cap": soft_cap, "window": window}
    expected = textbook_attention(*arrays, lengths=lengths, **options)
    attend = jax.jit(lambda *inputs: WAYS[way](*inputs[:3], lengths=inputs[3], **options))
    answer = np.asarray(attend(*arrays, lengths))
    # Where a window lies past the row's end nothing is seen; the caller fills such positions.
    defined = np.arange(150) < lengths[:, None] + (window or 1000) - 1
    assert np.abs(answer - expected)[defined].max() < 1e-5
    assert way == "chunked" or kernels == [(2, 256, heads[0], 8)], "whole tiles"


@pytest.mark.parametrize("way", WAYS_HERE)
def test_real_positions_need_no_lengths(kernels, way):
    arrays, lengths = operands(70), np.array([70, 33], np.int32)
    options = {"scale": 0.3, "soft_cap": 5.0, "window": None}
    answer = np.asarray(WAYS[way](*map(jnp.asarray, arrays), lengths=None, **options))
    expected = textbook_attention(*arrays, lengths=lengths, **options)
    real = np.arange(70) < lengths[:, None]
    assert np.abs(answer - expected)[real].max() < 1e-5


def test_chunks_leave_out_what_causality_throws_away():
    """Of a square of 512 eight chunks compute 36 blocks of 64, and no more."""
    shapes = [jnp.zeros((1, 512, 1, 8))] * 3
    traced = jax.make_jaxpr(
        lambda *inputs: attention.attend_in_chunks(
            *inputs, lengths=None, scale=1.0, soft_cap=None, window=None
        )
    )(*shapes)
    squares = [
        equation.outvars[0].aval.size
        for equation in traced.jaxpr.eqns
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape[-1] != 8
    ]
    assert len(squares) == 8
    assert sum(squares) == 36 * 64 * 64


class Card:
    """Stands for a device."""

    def __init__(self, platform, compute_capability=None):
        self.platform, self.device_kind = platform, "a card"
        if compute_capability:
            self.compute_capability = compute_capability


def test_the_way_is_chosen_by_device(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert ways_for(Card("cpu")) == ("chunked", "keras")
    assert ways_for(Card("gpu", "7.5")) == ("chunked", "keras")
    assert ways_for(Card("gpu", "8.0"))[0] == "tokamax triton"
    assert ways_for(Card("gpu", "9.0"))[:2] == ("tokamax mosaic_gpu", "tokamax triton")
    assert ways_for(Card("tpu"))[0] == "tokamax mosaic_tpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ways_for(Card("tpu")) == ("chunked", "keras")


@pytest.fixture(scope="module")
def backbone(models):
    from runner.model.loading import load_backbone

    return load_backbone(str(models["gemma2"].preset), None, dtype="float32")


def test_a_way_that_agrees_with_keras_is_taken(backbone):
    assert attention.choose_way(backbone, jax.local_devices()[0]) == ("chunked", ())


def test_a_kernel_without_lengths_is_checked_if_they_do_not_matter(backbone, monkeypatch):
    """As that of TPUs: it does not run at all if padding is seen."""

    def takes_no_lengths(*arrays, lengths, **options):
        if lengths is not None:
            raise NotImplementedError("no lengths")
        return attention.attend_in_chunks(*arrays, lengths=None, **options)

    ways = {"kernel": takes_no_lengths, "chunked": attention.attend_in_chunks}
    monkeypatch.setattr(attention, "WAYS", ways)
    monkeypatch.setattr(attention, "ways_for", lambda device: tuple(ways))
    device = jax.local_devices()[0]
    assert attention.choose_way(backbone, device, sees_padding=False) == ("kernel", ())
    way, (note,) = attention.choose_way(backbone, device, sees_padding=True)
    assert way == "chunked"
    assert note.endswith("NotImplementedError: no lengths")


def test_a_layer_that_the_kernel_cannot_compute_is_computed_in_chunks(backbone, monkeypatch):
    """After the check, for example if rows are longer than a window."""

    def computes_nothing(*arrays, **options):
        raise NotImplementedError("not this shape")

    monkeypatch.setitem(WAYS, "kernel", computes_nothing)
    tokens = np.random.default_rng(0).integers(5, 200, (8, 1))

    def states(way, **options):
        with attention.attention(backbone, way, 1, 8, None, **options):
            return np.asarray(
                backbone({"token_ids": tokens, "padding_mask": np.ones((8, 1), bool)})
            )

    assert np.array_equal(states("kernel"), states("chunked"))
    with pytest.raises(NotImplementedError, match="not this shape"):
        states("kernel", is_strict=True)


def test_a_way_that_differs_or_fails_is_left_and_said(backbone, monkeypatch):
    def forgets_the_cap(*arrays, soft_cap, scale, **options):
        return attention.attend_in_chunks(*arrays, soft_cap=None, scale=3 * scale, **options)

    def does_not_compile(*arrays, **options):
        raise NotImplementedError("no kernel for this card\nand a trace")

    ways = {"wrong": forgets_the_cap, "broken": does_not_compile, "keras": None}
    monkeypatch.setattr(attention, "WAYS", ways)
    monkeypatch.setattr(attention, "ways_for", lambda device: tuple(ways))
    way, notes = attention.choose_way(backbone, jax.local_devices()[0])
    assert way == "keras"
    assert "'wrong' is not used" in notes[0]
    assert "differs from Keras' own" in notes[0]
    assert notes[1].endswith("NotImplementedError: no kernel for this card")
