"""python -m runner.model.absent < REQUEST.json: compile the runner's programs for an absent device.

XLA compiles for a GPU or TPU on a machine without one. Each `Program` is built from a preset's
config.json; weights are shapes, never arrays. The environment must be that of
`targets.environment_for`. If the compiler crashes, only this process ends.

The request is JSON on standard input:
    device: a key of `GPU_TARGETS` or `TPU_TOPOLOGIES`. preset: its folder. dtype, quantization,
    pooling, head: as in `ModelSpec`. classes: columns of the head. layers: [start, stop] of a
    stage, null for the whole model. shapes: [[rows, length], ...]. way: how to attend, a key of
    `attention.WAYS`; without it, in the way that all devices compile. heads: of queries, if they
    are known.
The answer is a line of JSON for each shape: XLA's bytes, seconds, and what `read_program` returns;
or {"error": why}.
"""

import json
import sys
import time
from typing import Any

from runner.model.optimized import read_program
from runner.model.process import prepare_process
from runner.model.targets import GPU_TARGETS, TPU_TOPOLOGIES
from sharding.batches import BatchShape
from sharding.topology import WorkerSlot

# What all devices compile. A worker may choose a faster way.
WAY = "chunked"


def main() -> None:
    request = json.load(sys.stdin)
    prepare_process(WorkerSlot(0, "cpu"), verbose=False)
    try:
        device = _device(request["device"])
        program, arguments = _program(request, device)
    except Exception as error:  # the plan goes on, whatever XLA or Keras raises
        for _ in request["shapes"]:
            _answer({"error": _why(error)})
        return
    for rows, length in request["shapes"]:
        try:
            heads, shape = request.get("heads", 0), BatchShape(rows, length)
            compiled = _compile(program, arguments, shape, device, heads)
            _answer(compiled | {"way": request.get("way", WAY)})
        except Exception as error:
            _answer({"error": _why(error)})


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:500]


def _device(name: str) -> Any:
    from jax.experimental import topologies

    if name in GPU_TARGETS:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=GPU_TARGETS[name].as_proto(), topology="1x1x1"
        )
    else:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TPU_TOPOLOGIES[name][0]
        )
    return topology.devices[0]


def _program(request: dict[str, Any], device: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the program of a whole model or of a stage, and its arguments as shapes."""
    import jax

    from runner.model.loading import build_backbone, cut_stage
    from runner.model.program import Program

    here = jax.sharding.SingleDeviceSharding(device)

    def shape_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)

    backbone = build_backbone(
        request["preset"],
        dtype=request["dtype"],
        quantization=request["quantization"],
        is_quantized=True,
    )
    layers = request["layers"]
    model = backbone if layers is None else cut_stage(backbone, *layers)
    has_head = layers is None or layers[1] == len(backbone.transformer_layers)
    output = backbone.output
    hidden = output["sequence_output"] if isinstance(output, dict) else output
    head = []
    if has_head and request["head"] != "none":
        head = [shape_of((hidden.shape[-1], request["classes"]), "float32"),
                shape_of((request["classes"],), "float32")]  # fmt: skip
    program = Program(
        model,
        pooling=request["pooling"],
        output=request["head"] if has_head else "hidden",
        way=request.get("way", WAY),
    )
    variables = (model.trainable_variables, model.non_trainable_variables)
    weights = ([shape_of(one.shape, one.dtype) for one in some] for some in variables)
    return program, (*weights, head)


def _compile(
    program: Any, arguments: tuple[Any, ...], shape: BatchShape, device: Any, heads: int
) -> dict[str, Any]:
    import jax

    started = time.perf_counter()
    here = jax.sharding.SingleDeviceSharding(device)
    with jax.default_device(device):  # fused kernels ask for it
        lowered = program.lower(arguments, shape, sharding=here)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "trace_s": round(traced - started, 3),
        "compile_s": round(ended - traced, 3),
        **read_program(
            compiled.as_text(),
            length=shape.length,
            scores=heads * shape.rows * shape.length**2,
        ),
    }


if __name__ == "__main__":
    main()
