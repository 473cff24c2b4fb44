"""--plan --compile: a made-up compiler's answers, printed and as JSON, and what may go wrong."""

import json
import sys

import numpy as np
import pytest

from benchmarks.shapes import SHAPES
from runner.common.machine import named_devices
from runner.config.run_config import RunConfig
from runner.model.targets import CUDA, GPU_TARGETS, TPU, environment_for, extra_for
from runner.planner import compiling
from runner.planner.compiling import compile_ways
from runner.planner.recommendation import recommend
from runner.planner.records import PlanInput
from runner.planner.text import _compiled
from runner.planner.ways import all_options
from runner.preset.families import model_shape
from runner.preset.reader import Preset
from sharding.batches import BatchShape
from sharding.devices import DEVICES

pytestmark = pytest.mark.process  # the made-up compiler is one

SHAPE = model_shape("GemmaBackbone", {"vocabulary_size": 256_000, **SHAPES["gemma2_9b"]})
# Answers as XLA's for a T4: weights by what the request says, 90 kB of temporaries a token.
FAKE = """
import json, sys
request = json.load(sys.stdin)
if {broken!r}:
    sys.exit("the compiler crashed")
share = (request["layers"][1] - request["layers"][0]) / 42 if request["layers"] else 1
item = 1 if request["quantization"] else 2
for rows, length in request["shapes"]:
    print("a line of no JSON")
    print(json.dumps(dict(argument_bytes=int(9.24e9 * item * share), output_bytes=12 * rows,
        temporary_bytes=90_000 * rows * length, trace_s=1.0, compile_s=2.0, way="chunked",
        products={{"library call of f16": 4}}, squares=0, made_of_weights_bytes=0,
        warnings=["something is slow"], asked=request)), flush=True)
"""


@pytest.fixture
def compiler(monkeypatch):
    """Put a script in the place of the compiler, installed or not."""

    def use(broken="", *, installed=True, script=FAKE):
        code = script.format(broken=broken)
        monkeypatch.setattr(compiling, "COMPILER", (sys.executable, "-c", code))
        monkeypatch.setattr(compiling, "is_installed", lambda extra: installed)

    return use


def compiled(tmp_path, *, device="t4", which="largest", count=2, lengths=(512,) * 500, **flags):
    job = PlanInput(
        config=RunConfig(
            preset="p", plan=True, pooling="mean", compile=which, device=device, **flags
        ),
        preset=Preset(tmp_path, "GemmaBackbone", SHAPE, tokenizer=None, weight_files=()),
        devices=named_devices(device, count),
        lengths=np.array(lengths),
        read_s=0.0,
        tokenize_s=0.0,
        file_bytes=18.5e9,
    )
    options = all_options(job)
    said = []
    found = compile_ways(job, options, recommend(job, options)[0], said.append)
    text = "\n".join(_compiled({"compiled": found, "device": {"title": "NVIDIA T4"}}))
    assert all(len(line) <= 100 for line in text.splitlines())
    json.dumps(found)
    return found, text, said


def test_gemma_2_9b_on_two_t4(compiler, tmp_path):
    compiler()
    found, text, said = compiled(tmp_path, num_workers=2)
    ways = {
        (one["strategy"] or one["mode"], one["dtype"], one["quantization"], one["layers"]): one
        for one in found["programs"]
    }
    assert set(ways) == {
        ("pipeline", "float16", "none", (0, 21)), ("pipeline", "float16", "none", (21, 42)),
        ("data-parallel", "float16", "none", None), ("data-parallel", "float16", "int8", None),
    }  # fmt: skip
    whole = ways["data-parallel", "float16", "none", None]
    assert (whole["fits"], whole["largest_batch_tokens"]) == (False, 0)
    stage = ways["pipeline", "float16", "none", (0, 21)]
    assert stage["fits"]
    # 14.4 GB, less the weights, in 90 kB a token.
    assert stage["largest_batch_tokens"] == pytest.approx((14.4e9 - 9.24e9) / 90_000, rel=0.01)
    quantized = ways["data-parallel", "float16", "int8", None]
    assert quantized["fits"]
    assert quantized["asked"]["quantization"] == "int8"
    assert len(said) == 4
    assert "pipeline float16" in text
    assert "NO" in text
    assert "4 library calls of f16" in text
    assert "warning: something is slow" in text
    assert "Nothing was measured on a device." in text.replace("\n", " ")


def test_the_largest_shape_or_all(compiler, tmp_path):
    compiler()
    lengths = np.random.default_rng(0).integers(16, 512, 500)
    largest, _, _ = compiled(tmp_path, lengths=lengths, num_workers=2)
    every, _, _ = compiled(tmp_path, lengths=lengths, which="all", num_workers=2)
    assert len(every["programs"]) > 2 * len(largest["programs"])
    first = [one for one in every["programs"] if one["layers"] == (0, 21)]
    tokens = [BatchShape(one["rows"], one["length"]).tokens for one in first]
    chosen = next(one for one in largest["programs"] if one["layers"] == (0, 21))
    assert chosen["rows"] * chosen["length"] == max(tokens)


def test_a_missing_extra_is_named(compiler, tmp_path):
    compiler(installed=False)
    found, text, _ = compiled(tmp_path, num_workers=2)
    assert found["programs"] == []
    assert "pip install 'arena-runner[compile-cuda]'" in text
    _, text, _ = compiled(tmp_path, device="v5e", num_workers=2)
    assert "arena-runner[compile-tpu]" in text


def test_a_crash_is_said_and_the_plan_goes_on(compiler, tmp_path):
    compiler("yes")
    found, text, _ = compiled(tmp_path, num_workers=2)
    assert len(found["programs"]) == 4
    assert all("the compiler crashed" in one["error"] for one in found["programs"])
    assert text.count("not compiled: the compiler ended with exit status 1") == 4


def test_a_compiler_that_takes_too_long(compiler, tmp_path, monkeypatch):
    compiler(script="import time; time.sleep(600)")
    monkeypatch.setattr(compiling, "COMPILES_WITHIN_S", 0.2)
    found, _, _ = compiled(tmp_path, num_workers=2)
    assert {one["error"] for one in found["programs"]} == {"not compiled within 0 s"}


def test_every_device_of_the_table_has_a_compiler():
    for name in DEVICES:
        extra = extra_for(name)
        assert extra == (CUDA if DEVICES[name].kind == "gpu" else TPU)
        assert environment_for(name)["JAX_PLATFORMS"] == "cpu"
    for name, target in GPU_TARGETS.items():
        assert target.memory_bytes == pytest.approx(DEVICES[name].memory_bytes, rel=0.1)
        assert f"core_count: {target.cores}\n" in target.as_proto()
