"""Ways to run and a device -> what XLA says of their programs, compiled here for that device.

A process of its own compiles (`runner/model/absent.py`): XLA reads its settings when it starts,
and may crash. Does not know how a plan is shown.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import runner
from runner.model.targets import CUDA, environment_for, extra_for
from runner.planner.recommendation import asked_option
from runner.planner.records import Option, PlanInput
from sharding.batches import BatchShape
from sharding.fit import Room
from sharding.memory import SHARE_IN_USE, cut_layers, weight_item_bytes

# Seconds in which all programs of a way must be compiled. 42 layers took 35 s a shape on two cores.
COMPILES_WITHIN_S = 900.0
# Extra -> the module whose presence shows that it is installed.
MODULES = {CUDA: "jax_plugins.xla_cuda12"}
TPU_MODULE = "libtpu"
COMPILER = (sys.executable, "-m", "runner.model.absent")
# The folder of the package.
ROOT = Path(runner.__file__).resolve().parents[1]


def compile_ways(
    job: PlanInput, options: list[Option], best: Option | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compile the recommended way and those beside it; return what came of each, as JSON.

    Args:
        best: the recommended way, None if there is none. say: shows what is being compiled.

    Returns:
        device; share: of its memory that may be in use; missing: what to install, or null; and
        programs: one for each way, stage and shape, with bytes, seconds, products and warnings, or
        with an error.
    """
    model = job.devices.model
    found: dict[str, Any] = {
        "device": model.name if model else job.devices.kind,
        "share": SHARE_IN_USE,
        "missing": None,
        "programs": [],
    }
    extra = extra_for(model.name) if model else None
    if extra is None:
        found["missing"] = "XLA compiles for no such device that is not here"
        return found
    if not is_installed(extra):
        found["missing"] = f"install the compiler for it: pip install 'arena-runner[{extra}]'"
        return found
    for option in _chosen(job, options, best):
        for layers in _stages(job, option):
            say(f"compiling {describe_way(option)}{describe_layers(layers)}")
            found["programs"] += _compile(job, option, layers, _shapes(job, option, best))
    return found


def is_installed(extra: str) -> bool:
    """Whether the compiler of an extra is here."""
    try:
        return find_spec(MODULES.get(extra, TPU_MODULE)) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def describe_way(option: Option) -> str:
    """Return a way in words: model-parallel pipeline float16."""
    quantization = None if option.quantization == "none" else option.quantization
    return " ".join(filter(None, [option.mode, option.strategy, option.dtype, quantization]))


def describe_layers(layers: tuple[int, int] | None) -> str:
    return f", layers {layers[0]} to {layers[1]}" if layers else ""


def _chosen(job: PlanInput, options: list[Option], best: Option | None) -> list[Option]:
    """Return the ways to compile: recommended, asked for, and the usual ones beside them."""
    usual = []
    for mode, strategy, quantization in (
        *(("data-parallel", None, "none"), ("data-parallel", None, "int8")),
        ("model-parallel", "pipeline", "none"),
    ):
        if quantization in job.quantizations:
            way = (mode, strategy, job.dtype, quantization)
            usual += [option for option in options if option.way == way]
    wanted = [*([best] if best else []), asked_option(job, options), *usual]
    # A group's members compile one program together, which is not done here yet.
    alone = [option for option in wanted if option.strategy != "tensor" and option.workers]
    return list({option.way: option for option in alone}.values())


def _stages(job: PlanInput, option: Option) -> list[tuple[int, int] | None]:
    """Return the layers of each stage of a pipeline; None for a whole model."""
    if option.strategy != "pipeline":
        return [None]
    item_bytes = weight_item_bytes(option.dtype, option.quantization)
    limit = _room(job).limit_bytes
    try:
        stages = cut_layers(job.preset.shape, option.group_size, item_bytes, limit)
    except ValueError:
        return []  # the plan says that the weights do not fit
    return [(stage.start, stage.stop) for stage in stages]


def _shapes(job: PlanInput, option: Option, best: Option | None) -> list[BatchShape]:
    """Return the shapes to compile; for a way that does not fit, those of the recommended one."""
    plan = option.plan or (best.plan if best else None)
    shapes = plan.shapes if plan else ()
    if not shapes:
        return [BatchShape(1, job.config.sequence_length)]
    return list(shapes) if job.config.compile == "all" else [max(shapes, key=_size)]


def _size(shape: BatchShape) -> tuple[int, int]:
    return shape.tokens, shape.length


def _room(job: PlanInput) -> Room:
    devices = job.devices
    return Room(kind=devices.kind, memory_bytes=devices.memory_bytes, host_bytes=devices.host_bytes)


def _compile(
    job: PlanInput, option: Option, layers: tuple[int, int] | None, shapes: list[BatchShape]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each shape of one program."""
    config, model = job.config, job.devices.model
    assert model is not None, "this is a bug: only devices of the table are compiled for"
    quantizes = option.quantization != "none" and job.preset.quantization is None
    request = {
        "device": model.name,
        "preset": str(job.preset.path.resolve()),
        "dtype": option.dtype,
        "quantization": option.quantization if quantizes else None,
        "pooling": config.pooling,
        "head": config.task.head,
        "classes": config.task.width(job.preset.shape.hidden_dim),
        "layers": layers,
        "heads": job.preset.shape.num_query_heads,
        "shapes": [[shape.rows, shape.length] for shape in shapes],
    }
    answers = ask_compiler(request, environment_for(model.name))
    limit = _room(job).memory_bytes * SHARE_IN_USE
    for shape in shapes:
        answer = next(answers)
        way = {"mode": option.mode, "strategy": option.strategy, "dtype": option.dtype,
               "quantization": option.quantization, "layers": layers,
               "rows": shape.rows, "length": shape.length}  # fmt: skip
        yield way | answer | ({} if "error" in answer else _fit(answer, shape, limit))


def _fit(answer: dict[str, Any], shape: BatchShape, limit: float) -> dict[str, Any]:
    """Return whether a program fits, and the most tokens of a batch that would.

    Temporaries and outputs go with the tokens of a batch; arguments are the weights.
    """
    weights, per_batch = (
        answer["argument_bytes"],
        answer["temporary_bytes"] + answer["output_bytes"],
    )
    left = limit - weights
    most = int(left / max(per_batch / shape.tokens, 1e-9)) if left > 0 else 0
    return {
        "fits": weights + per_batch <= limit,
        "limit_bytes": int(limit),
        "temporary_bytes_per_token": answer["temporary_bytes"] / shape.tokens,
        "largest_batch_tokens": most if most >= shape.length else 0,
    }


def ask_compiler(request: dict[str, Any], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield an answer for each shape of a request; an error if the process says no more."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            COMPILER,
            input=json.dumps(request),
            env=os.environ | environment | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=COMPILES_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"not compiled within {COMPILES_WITHIN_S:.0f} s"
    else:
        said = done.stdout
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = f"the compiler ended with exit status {done.returncode}: {last[:300]}"
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    yield from answers
    while True:
        yield {"error": why}
