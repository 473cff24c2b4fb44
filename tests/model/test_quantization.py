"""int8 and int4: Keras' own numbers, made layer by layer."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import pytest

from tests.conftest import LENGTH, ROOT, TOLERANCE, environment


def hidden_states(backbone):
    tokens = np.random.default_rng(0).integers(5, 200, (2, 40))
    return np.asarray(backbone({"token_ids": tokens, "padding_mask": np.ones((2, 40), bool)}))


def test_auto_dtype_by_device():
    from runner.model.predictor import resolve_dtype  # imports Keras

    for platform, capability, found in (
        *(("gpu", "7.5", "float16"), ("gpu", "8.0", "bfloat16")),
        *(("tpu", None, "bfloat16"), ("cpu", None, "float32")),
    ):
        device = SimpleNamespace(platform=platform, compute_capability=capability)
        assert resolve_dtype("auto", device) == found


def test_int8_layers_in_float16_are_those_of_float32_rounded_once(load):
    """Keras has no such layers. The weights are the same, and so is each layer's output."""
    wide, half = load("gemma2", "int8"), load("gemma2", "int8", dtype="float16")
    twins = {variable.path: variable for variable in wide.variables}
    for variable in half.variables:
        twin = twins[variable.path]
        if variable.dtype != "float16":
            assert (variable.dtype, variable.shape) == (twin.dtype, twin.shape)
            assert np.array_equal(np.asarray(variable.value), np.asarray(twin.value))
    assert sum(v.dtype == "int8" for v in half.variables) == (
        sum(v.dtype == "int8" for v in wide.variables)
    )
    layers = {layer.path: layer for layer in wide._flatten_layers()}
    compared = 0
    for layer in half._flatten_layers():
        if getattr(layer, "quantization_mode", None) != "int8" or "embedding" in layer.path:
            continue
        kernel = layer._kernel.shape
        width = kernel[1:2] if layer.name in ("query", "key", "value") else kernel[:-1]
        inputs = np.random.default_rng(0).normal(size=(1, 5, *width)).astype(np.float16)
        answer = layer(inputs)
        assert answer.dtype == "float16"
        assert np.array_equal(
            np.asarray(answer), np.asarray(layers[layer.path](inputs)).astype(np.float16)
        )
        compared += 1
    assert compared >= 10
    assert hidden_states(half).dtype == np.float16
    # An activation on the edge of two int8 becomes the other one.
    off = np.abs(hidden_states(half).astype(np.float32) - hidden_states(wide))
    of_int8 = np.abs(hidden_states(wide) - hidden_states(load("gemma2")))
    assert off.mean() < of_int8.mean()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_int8_layers_in_float16_are_saved_and_loaded(load, tmp_path):
    from runner.model.loading import load_backbone

    half = load("gemma2", "int8", dtype="float16")
    half.save_to_preset(str(tmp_path / "preset"))
    again = load_backbone(str(tmp_path / "preset"), None, dtype="float16")
    assert np.array_equal(hidden_states(again), hidden_states(half))


def test_sums_beyond_float16_do_not_overflow(load):
    """A sum over 48 columns of 127 x 127 is 774,192; float16 ends at 65,504."""
    half = load("gemma2", "int8", dtype="float16")
    layer = next(layer for layer in half._flatten_layers() if layer.path.endswith("ffw_gating"))
    signs = np.sign(np.asarray(layer._kernel, np.float32)[:, 0])
    answer = np.asarray(layer((signs * 60).astype(np.float16)[None, None]))
    assert np.isfinite(answer).all()
    assert np.abs(np.asarray(layer._kernel, np.float32)[:, 0]).sum() * 127 > 65_504


@pytest.fixture
def load(models):
    from runner.model.loading import load_backbone

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
        ("gemma2", "int8"),
        pytest.param("gemma2", "int4", marks=pytest.mark.slow),
        *(
            pytest.param(name, mode, marks=pytest.mark.slow)
            for name in ("gemma3", "llama3", "mistral", "qwen", "qwen3")
            for mode in ("int8", "int4")
        ),
    ],
)
def test_quantized_while_loading_is_what_keras_makes_of_the_whole(load, monkeypatch, name, mode):
    from runner.model import quantization

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


FLAGS = ("--pooling", "mean", "--sequence-length", str(LENGTH), "--max-tokens-per-batch", "512")


@pytest.fixture(scope="module")
def prepared(models, cli, test_set, tmp_path_factory):
    """An int8 preset made from the arena model, and what the command said."""
    model, folder = models["gemma2"], tmp_path_factory.mktemp("prepared") / "int8"
    done = cli(
        *("prepare", *model.flags(), "--input", str(test_set), "--output", str(folder)),
        *("--pooling", "mean", "--sequence-length", str(LENGTH)),
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_prepared_preset_gives_the_numbers_of_quantizing_while_loading(
    models, reference, test_set, predict, prepared
):
    folder, said = prepared
    model = models["gemma2"]
    flags = ("--mode", "single", "--input", str(test_set), *FLAGS)
    loaded = predict(*flags, *model.flags(), "--quantization", "int8")
    head = ("--head-kernel", model.folder / "kernel.npy", "--head-bias", model.folder / "bias.npy")
    ready = predict(*flags, "--preset", str(folder), *map(str, head))
    assert np.array_equal(loaded.probabilities, ready.probabilities)
    # What the report says of the first rows is what the notebook's own loop says of them.
    figures = loaded.report["quantization"]
    moved = np.abs(loaded.probabilities - reference(model)["raw mean"])[:8]
    assert figures["mode"] == ready.report["quantization"]["mode"] == "int8"
    assert figures["reference_rows"] == 8
    assert figures["max_abs_difference"] == pytest.approx(moved.max(), abs=TOLERANCE)
    assert figures["mean_abs_difference"] == pytest.approx(moved.mean(), abs=TOLERANCE)
    assert 1e-5 < figures["max_abs_difference"] < 0.1
    # The preparation measured the same rows, and the run with the prepared preset quotes it.
    quoted = ready.report["quantization"]
    assert quoted["max_abs_difference"] == pytest.approx(figures["max_abs_difference"], abs=1e-6)
    assert "when the preset was prepared" in quoted["measured"]
    assert "LoRA merged, int8" in said
    assert ready.report["workers"][0]["weight_bytes"] == loaded.report["workers"][0]["weight_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"), [("int8", "float32"), ("int4", "float32"), ("int8", "float16")]
)
def test_a_quantized_pipeline_equals_single(models, test_set, predict, mode, dtype):
    flags = (
        *(*models["gemma2"].flags(), "--input", str(test_set), *FLAGS),
        *("--quantization", mode, "--dtype", dtype),
    )
    pipelined = predict("--mode", "model-parallel", *flags)
    single = predict("--mode", "single", *flags)
    # An int8 activation may fall on the other side of a rounding.
    assert np.abs(pipelined.probabilities - single.probabilities).max() < 2e-3
    assert pipelined.report["strategy"] == "pipeline"
    figures, expected = pipelined.report["quantization"], single.report["quantization"]
    assert figures["max_abs_difference"] == pytest.approx(expected["max_abs_difference"], abs=2e-3)
    held = [worker["weight_bytes"] for worker in pipelined.report["workers"]]
    assert max(held) < single.report["workers"][0]["weight_bytes"]


def test_what_cannot_be_quantized_is_said_at_once(models, cli, test_set, prepared, tmp_path):
    folder, _ = prepared
    model = models["gemma2"]
    head = model.flags()[4:]
    ready = ("--preset", str(folder), *head, "--input", str(test_set))
    cases = {
        "holds int8 weights; use the float preset": (*ready, "--quantization", "int4"),
        "A LoRA file cannot be merged": (*ready, *model.flags()[2:4]),
        "goes with --strategy pipeline": (
            *(*ready, "--mode", "model-parallel", "--strategy", "tensor"),
        ),
        "must be a new or empty folder": (
            *("prepare", "--preset", str(model.preset), "--output", str(folder)),
        ),
        "which is already int8": (
            *("prepare", "--preset", str(folder), "--output", str(tmp_path / "new")),
        ),
        "prepare needs --preset and --output": ("prepare",),
    }
    before = sorted(tmp_path.iterdir())
    for message, flags in cases.items():
        done = cli(*flags)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_float_weights_pass_through_memory_a_layer_at_a_time(heavy, cache):
    """At most 1.3 times the int8 bytes and the two largest float tensors, beyond the imports."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "load_quantized.py", heavy.preset, "int8"],
        env=environment(cache),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["held"] > 300e6
    assert found["peak"] <= 1.3 * found["held"] + 2 * found["largest_float"]
