"""int8 and int4: Keras' own numbers, made layer by layer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import pytest

from runner.common.errors import ConfigError
from runner.config.run_config import PrepareConfig
from tests.conftest import LENGTH, ROOT, TOLERANCE, environment


def hidden_states(backbone):
    tokens = np.random.default_rng(0).integers(5, 200, (2, 40))
    return np.asarray(backbone({"token_ids": tokens, "padding_mask": np.ones((2, 40), bool)}))


def test_int8_is_never_beside_float16():
    from runner.model.predictor import resolve_dtype  # imports Keras

    for platform, capability, found in (
        *(("gpu", "7.5", "float32"), ("gpu", "8.0", "bfloat16")),
        *(("tpu", None, "bfloat16"), ("cpu", None, "float32")),
    ):
        device = SimpleNamespace(platform=platform, compute_capability=capability)
        assert resolve_dtype("auto", device, is_int8=True) == found
    t4 = SimpleNamespace(platform="gpu", compute_capability="7.5")
    assert resolve_dtype("auto", t4) == "float16"
    with pytest.raises(ConfigError, match="int8 weights cannot be used with --dtype float16"):
        PrepareConfig(preset=Path("p"), output=Path("o"), dtype="float16")


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
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_pipeline_equals_single(models, test_set, predict, mode):
    flags = (*models["gemma2"].flags(), "--input", str(test_set), *FLAGS, "--quantization", mode)
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
