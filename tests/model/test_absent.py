"""The runner's own programs, compiled for devices that are not here; they need the compilers."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.shapes import SHAPES
from runner.model.targets import environment_for, extra_for
from runner.planner.compiling import COMPILER, is_installed
from tests.conftest import ROOT

pytestmark = pytest.mark.process

# Two layers of Gemma 2 9B with few tokens to embed.
SETTINGS = {"vocabulary_size": 1024, **SHAPES["gemma2_9b"], "num_layers": 2}
WEIGHTS = 2 * 198_000_000  # roughly, of both layers


@pytest.fixture
def compile_for(tmp_path):
    def run(device, command=COMPILER, **request):
        extra = extra_for(device)
        if not is_installed(extra):
            pytest.skip(f"needs the compiler: pip install 'arena-runner[{extra}]'")
        module = "keras_hub.src.models.gemma.gemma_backbone"
        config = {"module": module, "class_name": "GemmaBackbone", "config": SETTINGS,
                  "registered_name": "keras_hub>GemmaBackbone"}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = {"device": device, "preset": str(tmp_path), "dtype": "float16",
                 "quantization": None, "pooling": "mean", "head": "softmax", "classes": 3,
                 "layers": None, "shapes": [[4, 512]]} | request  # fmt: skip
        path = os.pathsep.join([str(ROOT), *sys.path])
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=1200,
            env=os.environ | environment_for(device) | {"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


def test_float16_on_a_t4(compile_for):
    (found,) = compile_for("t4")
    assert found["argument_bytes"] == pytest.approx(2 * WEIGHTS, rel=0.05)
    # 8 chunks of two products and 5 of weights in each layer: q, k and v are one.
    assert found["products"] == {"library call of f16": 42, "library call of f32": 1}
    assert found["squares"] == 0
    # 87 to 94 kB a token, as far as this has been looked at.
    assert 80e3 < found["temporary_bytes"] / (4 * 512) < 100e3


def test_int8_products_on_a_t4_are_library_calls(compile_for):
    (found,) = compile_for("t4", quantization="int8", dtype="float32")
    assert found["products"]["library call of s8"] == 10
    assert not [name for name in found["products"] if name.startswith("loop of s")]
    assert found["argument_bytes"] == pytest.approx(WEIGHTS, rel=0.05)


def test_a_stage_takes_and_gives_hidden_states(compile_for):
    (found,) = compile_for("t4", layers=[0, 1])
    assert found["output_bytes"] == 4 * 512 * 3584 * 2
    (found,) = compile_for("t4", layers=[1, 2])
    assert found["output_bytes"] < 1000


def test_what_does_not_compile_says_why(compile_for):
    (found,) = compile_for("t4", layers=[0, 7])
    assert "cannot be cut into stages" in found["error"]
    good, bad = compile_for("t4", shapes=[[1, 64], [1, -1]])
    assert "error" not in good
    assert bad["error"]


def test_int8_with_float16_around_it(compile_for):
    """Attention's products are of float16, those of weights of int8."""
    (found,) = compile_for("t4", quantization="int8")
    products = found["products"]
    assert products == {"library call of s8": 10, "library call of f16": 32,
                        "library call of f32": 1}  # fmt: skip


LOWERED = """
import json, os, re, sys
from runner.model.targets import environment_for
request = json.load(sys.stdin)
os.environ.update(environment_for(request["device"]))
from runner.model.process import prepare_process
from sharding.topology import WorkerSlot
prepare_process(WorkerSlot(0, "cpu"), verbose=False)
import jax
from runner.model import absent
from sharding.batches import BatchShape
device = absent._device(request["device"])
program, arguments = absent._program(request, device)
for rows, length in request["shapes"]:
    with jax.default_device(device):
        text = program.lower(arguments, BatchShape(rows, length),
                             sharding=jax.sharding.SingleDeviceSharding(device)).as_text()
    kernels = len(re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu\\w*|__gpu)", text))
    print(json.dumps({"kernels": kernels, "squares": text.count(f"{length}x{length}xf32>")}))
"""


@pytest.mark.parametrize(
    ("device", "kernel", "pooling", "has_kernel"),
    [
        ("v5e", "mosaic_tpu", "mean", True),
        ("v5e", "mosaic_tpu", "padded-mean", False),
        pytest.param("v6e", "mosaic_tpu", "mean", True, marks=pytest.mark.slow),
        ("a100", "triton", "padded-mean", True),
        ("h100", "mosaic_gpu", "padded-mean", True),
    ],
)
def test_fused_attention_is_in_the_traced_program(compile_for, device, kernel, pooling, has_kernel):
    """Traced only, so it takes seconds; at lengths that are no multiple of a tile, too."""
    whole, other = compile_for(
        device, command=[sys.executable, "-c", LOWERED], dtype="bfloat16",
        way=f"tokamax {kernel}", pooling=pooling, shapes=[[2, 512], [2, 1000]],
    )  # fmt: skip
    assert whole["squares"] == other["squares"] == 0
    assert bool(whole["kernels"]) == bool(other["kernels"]) == has_kernel


@pytest.mark.slow
def test_bfloat16_on_a_v5e(compile_for):
    (found,) = compile_for("v5e", dtype="bfloat16", shapes=[[1, 256]])
    assert found["products"]["matrix unit of bf16"] > 10
    assert found["argument_bytes"] == pytest.approx(2 * WEIGHTS, rel=0.05)
