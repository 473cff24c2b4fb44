"""A plan's input and the ways to run -> the plan as JSON. Does not know how `text.py` shows it."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from runner.common.machine import Devices
from runner.planner.recommendation import asked_option, command_of, recommend
from runner.planner.records import Option, PlanInput
from sharding.batches import Plan
from sharding.buckets import bucket_of
from sharding.fit import plan_flops

SCHEMA = 1
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
# Parts of the memory that a worker needs.
PARTS = ("weights", "activations", "workspace", "total")


def describe(job: PlanInput, uncut: np.ndarray, options: list[Option]) -> dict[str, Any]:
    """Return the plan as a JSON object.

    uncut: (rows,) token counts before truncation.
    """
    config, shape, devices = job.config, job.preset.shape, job.devices
    best, why = recommend(job, options)
    asked = asked_option(job, options)
    shown = asked if asked.fits else best
    batches = shown.plan if shown else None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "config": config.as_json(),
        "rows": int(uncut.size),
        "lengths": _describe_lengths(job, uncut),
        "plan_of": _name(shown) if shown else None,
        "buckets": [],
        "shapes": [],
        "padding": None,
        "flops": {
            "per_token": shape.flops_per_token,
            "attention_per_token_and_length": shape.attention_flops(1),
            "real": shape.rows_flops(job.lengths),
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
            "command": ["python", "run.py", *command_of(job, best)],
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


def _histogram(uncut: np.ndarray, sequence_length: int) -> list[dict[str, int]]:
    """Return the number of rows by length before truncation, in about ten ranges.

    One range ends at the sequence length. The last has all longer rows.
    """
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


def _add_batches(document: dict[str, Any], job: PlanInput, batches: Plan) -> None:
    """Add the batches of the way that the plan shows."""
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


def _name(option: Option) -> dict[str, Any]:
    names = ("mode", "strategy", "dtype", "quantization", "workers", "group_size")
    return {name: getattr(option, name) for name in names}


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
            **{f"{name}_bytes": getattr(need, f"{name}_bytes", None) for name in PARTS},
            "memory_bytes": option.memory_bytes,
        },
        "host_bytes": option.host_bytes,
        "seconds": option.total_s,
        "seconds_range": list(option.range_s) if option.range_s else None,
        "seconds_by_stage": asdict(option.seconds) if option.seconds else None,
        "arithmetic": option.arithmetic,
    }
