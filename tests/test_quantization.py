"""int8 and int4: Keras' own numbers, made layer by layer."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import pytest


def hidden_states(backbone):
    tokens = np.random.default_rng(0).integers(5, 200, (2, 40))
    return np.asarray(backbone({"token_ids": tokens, "padding_mask": np.ones((2, 40), bool)}))


@pytest.fixture
def load(models):
    from runner.loading import load_backbone

    def load_one(name, quantization=None, dtype="float32"):
        model = models[name]
        lora = str(model.folder / "model.lora.h5")
        return load_backbone(str(model.preset), lora, dtype=dtype, quantization=quantization)

    return load_one


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("gemma2", "int8"), ("gemma2", "int4"), ("llama3", "int8")),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for name in ("gemma3", "mistral", "qwen", "qwen3")
            for mode in ("int8", "int4")
        ),
    ],
)
def test_quantized_while_loading_is_what_keras_makes_of_the_whole(load, monkeypatch, name, mode):
    from runner import quantization

    # Every weight in several pieces.
    monkeypatch.setattr(quantization, "PIECE_BYTES", 1000)
    whole, layer_by_layer = load(name), load(name, mode)
    whole.quantize(mode)
    expected = {variable.path: variable for variable in whole.variables}
    assert {v.path for v in layer_by_layer.variables} == set(expected)
    for variable in layer_by_layer.variables:
        assert variable.dtype == expected[variable.path].dtype
        assert np.array_equal(np.asarray(variable.value), np.asarray(expected[variable.path].value))
    assert sum(v.dtype == "int8" for v in layer_by_layer.variables) > 10
    assert np.array_equal(hidden_states(layer_by_layer), hidden_states(whole))
