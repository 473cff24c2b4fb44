"""python load_quantized.py PRESET MODE: prints what loading held and took at most, in bytes."""
# ruff: noqa: E402

import json
import math
import sys

from runner.model.process import peak_rss_bytes, prepare_process
from sharding.topology import WorkerSlot

prepare_process(WorkerSlot(0, "cpu"), verbose=False)

import jax

from runner.model.loading import build_backbone, load_backbone

preset, mode = sys.argv[1:]
shapes = [variable.shape for variable in build_backbone(preset, dtype="float32").variables]
jax.numpy.zeros(3).block_until_ready()
before = peak_rss_bytes()
backbone = load_backbone(preset, None, dtype="float32", quantization=mode)
found = {
    "held": sum(variable.value.nbytes for variable in backbone.variables),
    "peak": peak_rss_bytes() - before,
    "largest_float": 4 * max(math.prod(shape) for shape in shapes),
}
print(json.dumps(found))
