"""--plan: a config and the devices -> what fits, how long it takes, and what to choose, printed.

Starts no workers, Ray or JAX and needs no weights, except for --calibrate, which runs the ordinary
command on a few batches. `ways.py` does the arithmetic, `recommendation.py` chooses, `document.py`
and `text.py` present the plan as JSON and as text.
"""

import json
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from runner.common.files import check_writable, write_whole
from runner.common.machine import devices_here, named_devices
from runner.config.run_config import RunConfig
from runner.data.inputs import read_rows, to_tokens
from runner.demo import stand_in
from runner.planner.calibration import calibrate
from runner.planner.compiling import compile_ways
from runner.planner.document import describe
from runner.planner.recommendation import asked_option, recommend
from runner.planner.records import PlanInput
from runner.planner.text import render
from runner.planner.ways import all_options
from runner.preset.reader import Preset, read_preset
from runner.preset.resolve import check_head, named_files, settle
from runner.telemetry.progress import Progress
from sharding.memory import weight_item_bytes

# Longer than any row, since the plan shows lengths before truncation.
UNCUT = 1 << 24


def plan(config: RunConfig, *, started: float | None = None) -> dict[str, Any]:
    """Print the plan of a run, write it to `config.plan_path` and return it.

    Args:
        started: `time.monotonic()` at the start of the process, None for now.

    Raises:
        ConfigError, DataError: the user can fix it; nothing was written.
        WorkerError: the calibration run failed.
    """
    started = time.monotonic() if started is None else started
    with Progress(started=started) as progress:
        check_writable("the plan beside --output", config.plan_path)
        files = named_files(config, stand_in(config, progress))
        input_path = files["input"]
        preset = read_preset(files["preset"], needs_weights=config.calibrate)
        config = settle(config, preset)
        if config.calibrate and config.preset is not None and config.task.head != "none":
            check_head(preset, config.head_kernel, config.head_bias, config.task)
        devices = (
            named_devices(config.device, config.num_workers) if config.device else devices_here()
        )
        progress.phase(f"reading {input_path.name}")
        read_started = time.monotonic()
        examples, texts = read_rows(input_path, config)
        tokenize_started = time.monotonic()
        tokens = to_tokens(
            texts,
            preset,
            sequence_length=UNCUT,
            on_progress=lambda done: progress.phase(f"tokenizing {done:,}/{len(texts):,} rows"),
        )
        uncut = tokens.lengths
        job = PlanInput(
            config=config,
            preset=preset,
            devices=devices,
            lengths=np.minimum(uncut, config.sequence_length),
            read_s=tokenize_started - read_started,
            tokenize_s=time.monotonic() - tokenize_started,
            file_bytes=_file_bytes(preset),
        )
        progress.phase("planning")
        options = all_options(job)
        if config.calibrate and examples:
            measured = calibrate(job, asked_option(job, options), examples, progress)
            job = replace(job, measured=measured)
            options = all_options(job)
        document = describe(job, uncut, options)
        if config.compile is not None:
            best, _ = recommend(job, options)
            document["compiled"] = compile_ways(job, options, best, progress.phase)
        write_whole(config.plan_path, json.dumps(document, indent=1) + "\n")
    print(render(document, encoding=sys.stdout.encoding or "ascii"), flush=True)
    return document


def _file_bytes(preset: Preset) -> float:
    """Return the bytes of the weight files; if there are none, of 16-bit ones."""
    if preset.weight_files:
        return float(preset.stored_bytes)
    item_bytes = weight_item_bytes("float16", preset.quantization or "none")
    return preset.shape.weight_bytes(item_bytes)
