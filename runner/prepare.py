"""A float preset or checkpoint, and a LoRA file -> a merged and quantized preset directory.

The result is an ordinary KerasHub preset, which appears under its name when it is complete. This
process does the work on the CPU, with one layer in float at a time. A Hugging Face transformers
checkpoint is first converted to a preset. Does not know how a run uses a preset.
"""

import json
import os
import shutil
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.files import compilation_cache, whole_folder
from runner.common.records import Examples, ModelSpec
from runner.common.units import mb, tenths
from runner.config.run_config import PrepareConfig
from runner.config.task import Task
from runner.model.accuracy import compare, describe, reference_batch
from runner.preset.classifiers import TASK, TASK_WEIGHTS
from runner.preset.reader import ACCURACY_FILE, Preset, check_lora, checkpoint_type, read_preset
from runner.preset.resolve import check_head, settle
from runner.telemetry.progress import Progress

# Copied from the float preset; the weights and the backbone's config are written anew.
COPIED = ("tokenizer.json", "preprocessor.json", "assets", TASK, TASK_WEIGHTS)


def prepare(config: PrepareConfig, *, started: float | None = None) -> Preset:
    """Write the preset that `config` asks for, print a summary, and return the preset.

    Raises:
        ConfigError, DataError: the user can fix it; nothing was written.
    """
    started = time.monotonic() if started is None else started
    _check_output(config.output)
    if os.path.isdir(config.preset) and checkpoint_type(config.preset):
        return _convert(config, started)
    preset = _check(config)
    config = settle(config, preset)
    spec = ModelSpec(
        preset=str(preset.path.resolve()),
        lora_weights=str(config.lora_weights.resolve()) if config.lora_weights else None,
        head_kernel=str(config.head_kernel) if config.head_kernel else None,
        head_bias=str(config.head_bias) if config.head_bias else None,
        classes=config.task.width(preset.shape.hidden_dim),
        pooling=config.pooling,
        dtype="float32" if config.dtype == "auto" else config.dtype,
        quantization=None if config.quantization == "none" else config.quantization,
        compilation_cache=compilation_cache(),
        head=config.task.head,
    )
    named = config.head_kernel or preset.classifier
    has_head = named is not None or config.task.head == "none"
    with Progress(started=started) as progress, whole_folder(config.output) as folder:
        progress.phase(f"loading {preset.path}")
        _start_keras()
        from runner.model.loading import load_backbone

        backbone = load_backbone(
            spec.preset, spec.lora_weights, dtype=spec.dtype, quantization=spec.quantization
        )
        progress.phase(f"writing {config.output}")
        backbone.save_to_preset(str(folder))
        for name in COPIED:
            if (preset.path / name).is_dir():
                shutil.copytree(preset.path / name, folder / name)
            elif (preset.path / name).is_file():
                shutil.copy2(preset.path / name, folder / name)
        figures: dict[str, Any] = {"measured": "no head was named when the preset was prepared"}
        if spec.quantization and has_head:
            progress.phase("comparing with float32")
            figures = _measure(config, spec, preset, backbone)
        if spec.quantization:
            (folder / ACCURACY_FILE).write_text(json.dumps(figures, indent=1) + "\n")
    made = read_preset(config.output)
    print(
        f"{config.output}: {mb(made.stored_bytes)} of weights from {mb(preset.stored_bytes)}, "
        f"{'LoRA merged, ' if config.lora_weights else ''}{made.quantization or 'not quantized'}, "
        f"the rest in {spec.dtype}; {tenths(time.monotonic() - started)}",
        flush=True,
    )
    if made.quantization:
        print(describe(made.quantization, figures), flush=True)
    return made


def _convert(config: PrepareConfig, started: float) -> Preset:
    """Convert a checkpoint to a preset; merge and quantize that if asked to."""
    is_all = config.quantization == "none" and config.lora_weights is None
    made = config.output
    if not is_all:
        made = made.with_name(f".{made.name}.{os.getpid()}.converted")
    _start_keras()
    from runner.model.checkpoints import convert

    try:
        with Progress(started=started) as progress, whole_folder(made) as folder:
            progress.phase(f"converting {config.preset}")
            dtype = "float32" if config.dtype == "auto" else config.dtype
            convert(config.preset, folder, dtype=dtype)
        if not is_all:
            return prepare(replace(config, preset=made), started=started)
        preset = read_preset(made)
        print(
            f"{made}: {mb(preset.stored_bytes)} of weights of a {preset.class_name} in {dtype}; "
            f"{tenths(time.monotonic() - started)}",
            flush=True,
        )
        return preset
    finally:
        if not is_all:
            shutil.rmtree(made, ignore_errors=True)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output must be a new or empty folder. Received: {output}")
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"--output must be in a folder that exists. Received: {output}")


def _check(config: PrepareConfig) -> Preset:
    """Check the files before the work starts; return the float preset."""
    preset = read_preset(config.preset)
    if preset.quantization is not None:
        raise ConfigError(
            f"--preset must hold float weights. Received: {preset.path}, "
            f"which is already {preset.quantization}"
        )
    if config.lora_weights is not None:
        check_lora(config.lora_weights, preset.shape)
    named = config.head_kernel or preset.classifier
    if named is not None and config.task.head != "none" and config.quantization != "none":
        check_head(preset, config.head_kernel, config.head_bias, config.task)  # for the comparison
    return preset


def _start_keras() -> None:
    """Start Keras on the CPU, with the cache of compiled programs."""
    from runner.model.process import prepare_process, start_jax
    from sharding.topology import WorkerSlot

    prepare_process(WorkerSlot(0, "cpu"), verbose=False)
    start_jax("cpu", compilation_cache())


def _measure(
    config: PrepareConfig, spec: ModelSpec, preset: Preset, backbone: Any
) -> dict[str, Any]:
    """Compare the quantized model with float32 on a few rows; return the figures of `compare`."""
    from runner.data.inputs import read_rows, render, to_tokens
    from runner.model.predictor import Predictor
    from runner.model.worker import load_head, predict_in_float

    if config.input is not None:
        _, texts = read_rows(config.input, config)
    else:
        texts = render(_made_up(config.task), config)
    tokens = to_tokens(texts, preset, sequence_length=config.sequence_length)
    batch = reference_batch(
        tokens.lengths, pooling=config.pooling, sequence_length=config.sequence_length
    )
    arrays = tokens.batch_arrays(batch.rows, batch.shape.rows, batch.shape.length)
    started = time.monotonic()
    head = load_head(spec, backbone)
    predictor = Predictor(backbone, head, pooling=spec.pooling, output=spec.head)
    quantized = predictor.predict(*arrays)
    reference = predict_in_float(spec, *arrays)
    seconds = time.monotonic() - started
    figures = compare(quantized, reference, seconds=seconds, head=spec.head)
    rows = config.input.name if config.input is not None else "made-up rows"
    return figures | {"measured": f"on {rows}, when the preset was prepared"}


def _made_up(task: Task) -> Examples:
    """Return a few rows like the demo's, under a task's column names."""
    from runner.demo import make_rows

    ids, *columns = zip(*make_rows(8, seed=0), strict=True)
    return Examples(ids, dict(zip(task.text_columns, cycle(columns), strict=False)))
