"""--plan: config, preset facts, token lengths and devices -> what fits, how long, and what to take.

Starts no worker, neither Ray nor JAX, and needs no weights, except that --calibrate runs a few
batches by the ordinary command. `ways.py` does the arithmetic, `text.py` the words.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import check_writable, write_whole
from runner.common.machine import Devices, devices_here, named_devices
from runner.common.units import duration
from runner.config.command import command_flags
from runner.config.run_config import RunConfig
from runner.config.task import CONTEST
from runner.data.inputs import read_rows, to_tokens
from runner.demo import stand_in
from runner.planner.calibration import calibrate
from runner.planner.records import Option, PlanInput
from runner.planner.text import render
from runner.planner.ways import all_options, pipeline_over
from runner.preset.reader import Preset, read_preset
from runner.preset.resolve import check_head, named_files, settle
from runner.telemetry.progress import Progress
from sharding.batches import Plan
from sharding.buckets import bucket_of
from sharding.dtypes import dtype_beside
from sharding.fit import plan_flops
from sharding.memory import weight_item_bytes

SCHEMA = 1
# Longer than any row: lengths before the cut are what a person wants to see.
UNCUT = 1 << 24
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
# Ways within this share and these seconds of the quickest are as quick; then the simplest of them
# is taken.
AS_QUICK, AS_QUICK_S = 1.05, 30.0
# A way that gives other numbers is named where it takes less than this of the time.
MUCH_QUICKER = 0.8
MOST_MEMBERS = 64


def plan(config: RunConfig, *, started: float | None = None) -> dict[str, Any]:
    """Print the plan of a run, write it to `config.plan_path` and return it.

    Raises:
        ConfigError, DataError: the person's to mend; nothing was written.
        WorkerError: the calibrating run failed.
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
        progress.stage(f"reading {input_path.name}")
        read_started = time.monotonic()
        examples, texts = read_rows(input_path, config)
        tokenize_started = time.monotonic()
        tokens = to_tokens(
            texts,
            preset,
            sequence_length=UNCUT,
            on_progress=lambda done: progress.stage(f"tokenizing {done:,}/{len(texts):,} rows"),
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
        progress.stage("planning")
        options = all_options(job)
        if config.calibrate and examples:
            measured = calibrate(job, asked_option(job, options), examples, progress)
            job = replace(job, measured=measured)
            options = all_options(job)
        document = describe(job, uncut, options)
        write_whole(config.plan_path, json.dumps(document, indent=1) + "\n")
    print(render(document, encoding=sys.stdout.encoding or "ascii"), flush=True)
    return document


def asked_option(job: PlanInput, options: list[Option]) -> Option:
    """Return what the config asks for, whether it fits or not."""
    return next(option for option in options if option.way == job.asked)


def recommend(job: PlanInput, options: list[Option]) -> tuple[Option | None, str]:
    """Return the way to take and a sentence or two that say why; None where nothing fits.

    Numbers as the model was trained come first: dtype and quantization are those asked for, and
    another quantization is taken only where no way fits without. Then the quickest, and of those
    about as quick the simplest.
    """
    fitting = [option for option in options if option.fits]
    wanted = job.preset.quantization or job.config.quantization
    order = [wanted, *(name for name in job.quantizations if name != wanted)]
    for quantization in order:
        there = [
            option
            for option in fitting
            if option.quantization == quantization and option.dtype == job.dtype(quantization)
        ]
        if not there:
            continue
        times = [option.total_s for option in there if option.total_s is not None]
        quickest = min(times, default=0.0)
        best = next(
            option
            for option in there
            if option.total_s is None or option.total_s <= quickest * AS_QUICK + AS_QUICK_S
        )
        return best, " ".join(_reasons(job, best, wanted, options))
    return None, _what_would_fit(job)


def describe(job: PlanInput, uncut: np.ndarray, options: list[Option]) -> dict[str, Any]:
    """Return the plan as JSON has it.

    uncut: (rows,) token counts before the cut.
    """
    config, shape, devices = job.config, job.preset.shape, job.devices
    best, why = recommend(job, options)
    asked = asked_option(job, options)
    shown = asked if asked.fits else best
    batches = shown.plan if shown else None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "config": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(config).items()
        },
        "rows": int(uncut.size),
        "lengths": _describe_lengths(job, uncut),
        "plan_of": _name(shown) if shown else None,
        "buckets": [],
        "shapes": [],
        "padding": None,
        "flops": {
            "per_token": shape.flops_per_token,
            "attention_per_token_and_length": shape.attention_flops(1),
            "real": float(job.lengths.sum()) * shape.flops_per_token
            + float((job.lengths.astype(float) ** 2).sum()) * shape.attention_flops(1),
            "padded": None,
        },
        "model": {
            "family": job.preset.class_name,
            "parameters": int(shape.weight_bytes(1)),
            "layers": shape.num_layers,
            "weight_file_bytes": int(job.file_bytes),
            "weight_files_are_here": bool(job.preset.weight_files),
        },
        "device": _describe_devices(devices),
        "calibration": asdict(job.measured) if job.measured else None,
        "seconds": {"read": job.read_s, "tokenize": job.tokenize_s},
        "options": [_describe_option(option) for option in options],
        "asked": _name(asked),
        "recommendation": {"why": why, **(_name(best) if best else {"mode": None})},
    }
    if batches is not None and batches.batches:
        _add_batches(document, job, batches)
    if best is not None:
        document["recommendation"] |= {
            "seconds": best.total_s,
            "command": ["python", "run.py", *_command(job, best)],
        }
    return document


def _describe_lengths(job: PlanInput, uncut: np.ndarray) -> dict[str, Any]:
    most = job.config.sequence_length
    cut = uncut > most

    def percentiles(places: Sequence[int]) -> list[int]:
        return [int(value) for value in np.percentile(uncut, places)] if uncut.size else []

    return {
        "mean": float(uncut.mean()) if uncut.size else 0.0,
        "percentiles": {
            str(place): value
            for place, value in zip(PERCENTILES, percentiles(PERCENTILES), strict=False)
        },
        "quartiles": percentiles((0, 25, 50, 75, 100)),
        "histogram": _histogram(uncut, most),
        "cut": {
            "rows": int(cut.sum()),
            "share": float(cut.mean()) if uncut.size else 0.0,
            "tokens_lost": int((uncut - job.lengths).sum()),
        },
    }


def _add_batches(document: dict[str, Any], job: PlanInput, batches: Plan) -> None:
    """Fill in what is known of the batches."""
    shape = job.preset.shape
    of_shape = dict.fromkeys(batches.shapes, 0)
    for batch in batches.batches:
        of_shape[batch.shape] += 1
    edges = tuple(sorted(one.length for one in batches.shapes))
    rows = bucket_of(job.lengths, edges)
    document["buckets"] = [{"length": edge, "rows": int((rows == edge).sum())} for edge in edges]
    document["shapes"] = [
        {"rows": one.rows, "length": one.length, "batches": count}
        for one, count in of_shape.items()
    ]
    document["padding"] = 1 - batches.real_tokens / batches.padded_tokens
    document["tokens"] = {"real": batches.real_tokens, "padded": batches.padded_tokens}
    padded = plan_flops(shape, batches)
    matmuls = batches.padded_tokens * shape.flops_per_token
    document["flops"] |= {"padded": padded, "attention_share": padded / matmuls - 1}


def _file_bytes(preset: Preset) -> float:
    """Bytes of the weight files, or what they would be in 16 bits."""
    if preset.weight_files:
        return float(sum(path.stat().st_size for path in preset.weight_files))
    item_bytes = weight_item_bytes("float16", preset.quantization or "none")
    return preset.shape.weight_bytes(item_bytes)


def _reasons(job: PlanInput, best: Option, wanted: str, options: list[Option]) -> list[str]:
    """Say why `best`: what it beats, and what would be quicker at a price."""
    said = []
    if best.quantization != wanted:
        without = next(
            option
            for option in options
            if (option.quantization, option.dtype) == (wanted, job.dtype(wanted))
        )
        said.append(
            f"Nothing fits with {'float' if wanted == 'none' else wanted} weights "
            f"({_label(without)} {without.why_not}); {best.quantization} does, and the report says "
            "how far it moves the answers."
        )
    alike = [option for option in options if option.way[2:] == best.way[2:]]
    replica = next(option for option in alike if option.mode == "data-parallel")
    if best.mode == "data-parallel":
        said.append("One device holds a replica, so nothing travels between workers.")
    elif best.mode == "model-parallel" and not replica.fits:
        said.append(
            f"A {best.dtype} replica does not fit one device ({replica.why_not}); "
            f"{best.group_size} hold it together."
        )
    timed = [(o.total_s, o) for o in options if o.fits and o.total_s]
    others = [(s, o) for s, o in timed if o.way[2:] == best.way[2:] and o is not best]
    if others and best.total_s:
        seconds, other = min(others, key=lambda one: one[0])
        said.append(
            f"{_label(other).capitalize()} should take {seconds / best.total_s:.2f} times as long"
            f"{'.' if seconds > best.total_s else ', about the same, and is less simple.'}"
        )
    rounding = [(s, o) for s, o in timed if o.way[2:] != best.way[2:]]
    if rounding and best.total_s:
        seconds, other = min(rounding, key=lambda one: one[0])
        if seconds < MUCH_QUICKER * best.total_s:
            forms = " and ".join(name for name in other.way[2:] if name != "none")
            said.append(
                f"{_label(other).capitalize()} in {forms} should take {duration(seconds)}, but "
                "its numbers are rounder."
            )
    limit = job.config.time_limit
    if limit is not None and best.range_s is not None:
        fast, slow = best.range_s
        within = "is" if slow <= limit else "may be" if fast <= limit else "is not"
        said.append(f"That {within} within the time limit of {duration(limit)}.")
    if best.total_s is None:
        said.append("How long it takes is not known: --calibrate measures it.")
    return said


def _what_would_fit(job: PlanInput) -> str:
    """Say how many devices would do, where none of the ways fits."""
    if job.devices.is_host:
        return "Nothing fits the memory of this machine."
    quantization = job.preset.quantization or job.config.quantization
    for members in range(2, min(MOST_MEMBERS, job.preset.shape.num_layers) + 1):
        if not pipeline_over(job, members, job.dtype(quantization), quantization).fits:
            continue
        return (
            f"Nothing fits {job.devices.count} x {job.devices.title}. A pipeline over {members} of "
            f"them would hold {job.dtype(quantization)} weights: --mode model-parallel "
            f"--group-size {members}."
        )
    return f"Nothing fits, nor would {MOST_MEMBERS} x {job.devices.title} together."


def _command(job: PlanInput, best: Option) -> list[str]:
    """The flags of the run that is recommended."""
    config = job.config
    auto = dtype_beside(best.quantization, job.devices.native_dtype)
    is_group = best.mode == "model-parallel"
    keeps_count = config.num_workers is not None and best.mode != "single"
    changes: dict[str, object] = {
        "mode": best.mode,
        "strategy": best.strategy if best.strategy == "tensor" else None,
        "group_size": best.group_size if is_group and best.group_size != 2 else None,
        "num_workers": best.workers if keeps_count else None,
        "dtype": best.dtype if best.dtype != auto else "auto",
        "quantization": "none" if job.preset.quantization else best.quantization,
    }
    has_head = config.task.head != "none"
    if config.preset is not None and config.head_kernel is None and has_head:
        changes |= {"head_kernel": "FILE.npy", "head_bias": "FILE.npy"}
    own_task = [] if config.task == CONTEST else ["--config", "FILE.toml"]
    return [*own_task, *command_flags(config, **changes)]


def _name(option: Option) -> dict[str, Any]:
    return {
        "mode": option.mode,
        "strategy": option.strategy,
        "dtype": option.dtype,
        "quantization": option.quantization,
        "workers": option.workers,
        "group_size": option.group_size,
    }


def _label(option: Option) -> str:
    return option.strategy or option.mode


def _describe_devices(devices: Devices) -> dict[str, Any]:
    model = devices.model
    return {
        "name": model.name if model else devices.kind,
        "title": devices.title,
        "kind": devices.kind,
        "count": devices.count,
        "is_here": devices.is_here,
        "memory_bytes": devices.memory_bytes,
        "host_bytes": devices.host_bytes,
        "auto_dtype": devices.native_dtype,
        "rates": {
            name: {"nominal": rate.nominal, "measured": rate.measured, "used": rate.sustained}
            for name, rate in (model.rates if model else {}).items()
        },
        "core_flops_per_s": devices.core_flops_per_s or None,
        "bandwidth_bytes_per_s": model.bandwidth_bytes_per_s if model else None,
        "link": model.link if model else None,
        "link_bytes_per_s": devices.link_bytes_per_s,
        "sources": list(model.sources) if model else ["float32 matmul on one core, measured now"],
        "notes": list(devices.notes),
    }


def _describe_option(option: Option) -> dict[str, Any]:
    need = option.need
    return {
        **_name(option),
        "fits": option.fits,
        "why_not": option.why_not,
        "per_device": {
            "weights_bytes": need.weights_bytes if need else None,
            "activations_bytes": need.activations_bytes if need else None,
            "workspace_bytes": need.workspace_bytes if need else None,
            "total_bytes": need.total_bytes if need else None,
            "memory_bytes": option.memory_bytes,
        },
        "host_bytes": option.host_bytes,
        "seconds": option.total_s,
        "seconds_range": list(option.range_s) if option.range_s else None,
        "seconds_by_stage": asdict(option.seconds) if option.seconds else None,
        "arithmetic": option.arithmetic,
    }


def _histogram(uncut: np.ndarray, sequence_length: int) -> list[dict[str, int]]:
    """Rows by length before the cut: some ten ranges with an edge at the sequence length, and the
    last for all that is longer."""
    if not uncut.size:
        return []
    longest, step = max(1, int(uncut.max())), max(1, sequence_length // 4)
    while np.percentile(uncut, 97) > 10 * step:
        step *= 2
    edges = [edge for edge in range(0, 11 * step, step) if edge < longest] + [longest]
    return [
        {"from": low + 1, "to": high, "rows": int(((uncut > low) & (uncut <= high)).sum())}
        for low, high in pairwise(edges)
    ]
