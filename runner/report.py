"""Facts of a finished run -> the JSON report and a short summary in words."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner import __version__
from runner.accuracy import describe
from runner.config import RunConfig
from runner.records import Faults, WorkerInfo, WorkerStats
from runner.strategy import Strategy
from runner.submission import write_whole

SCHEMA = 1
PACKAGES = ("jax", "keras", "keras-hub", "keras-nlp", "numpy", "pandas", "ray", "sentencepiece")


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    found = {"arena-runner": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_report(
    config: RunConfig,
    *,
    fingerprint: str,
    rows: int,
    real_tokens: int,
    padded_tokens: int,
    model_flops: float,
    seconds: dict[str, float],
    info: WorkerInfo | None,
    workers: list[WorkerStats],
    faults: Faults,
    plan: dict[str, Any],
    strategy: Strategy | None = None,
    quantization: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report; every duration in seconds, every rate over `seconds["predict"]`.

    `rates.mfu` is model FLOPs of real tokens over what the workers' devices did in a large matmul
    measured in this run, all workers together.
    """
    predict_s = seconds["predict"]
    flops_per_s = model_flops / predict_s if predict_s else None
    peak = info.matmul_flops_per_s * len(workers) if info else 0.0
    return {
        "schema": SCHEMA,
        "config": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(config).items()
        },
        "versions": versions(),
        "fingerprint": fingerprint,
        "mode": config.mode,
        "strategy": strategy.name if strategy else None,
        "rows": {"total": rows, "predicted": rows, "resumed": 0, "shortened": 0, "filled": 0},
        "tokens": {"real": real_tokens, "padded": padded_tokens},
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "rates": {
            "rows_per_s": rows / predict_s if predict_s else None,
            "tokens_per_s": real_tokens / predict_s if predict_s else None,
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / peak if flops_per_s and peak else None,
        },
        "workers": [asdict(worker) for worker in workers],
        "faults": asdict(faults),
        "deadline": {
            "limit_s": None,
            "finished_s": round(seconds["total"], 4),
            "slack_s": None,
            "events": [],
        },
        "model": asdict(info) if info else None,
        "quantization": quantization,
        "plan": plan,
        "group": _describe_group(strategy, workers),
    }


def _describe_group(strategy: Strategy | None, workers: list[WorkerStats]) -> dict[str, Any] | None:
    """Why this strategy, what travels, and how long workers stood idle (a pipeline's bubble)."""
    if strategy is None:
        return None
    alive = sum(worker.busy_s + worker.idle_s for worker in workers)
    return {
        "why": strategy.why,
        "stages": [asdict(stage) for stage in strategy.stages],
        "bytes_between_members_per_token": strategy.bytes_per_token,
        "idle_share": sum(worker.idle_s for worker in workers) / alive if alive else None,
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report so that whoever looks sees the old one or all of the new one."""
    write_whole(path, json.dumps(report, indent=1) + "\n")


def summarize(report: dict[str, Any], config: RunConfig, *, is_demo_model: bool) -> str:
    """Return the few lines a person reads at the end."""
    rows, seconds = report["rows"], report["seconds"]
    lines = [
        f"{rows['total']:,} rows -> {config.output} in {seconds['total']:.1f} s "
        f"(starting and ending {seconds['total'] - seconds['predict'] - seconds['merge']:.1f} s, "
        f"predicting {seconds['predict']:.1f} s)"
    ]
    if report["rates"]["rows_per_s"]:
        padding = 1 - report["tokens"]["real"] / report["tokens"]["padded"]
        lines.append(
            f"{report['rates']['rows_per_s']:,.1f} rows/s, "
            f"{report['rates']['tokens_per_s']:,.0f} real tokens/s, {padding:.0%} padding; "
            f"{len(report['workers'])} x {report['model']['device'].split(',')[0]}, "
            f"{report['model']['dtype']}"
            f"{' and ' + report['quantization']['mode'] if report['quantization'] else ''}"
        )
    if report["quantization"]:
        lines.append(describe(report["quantization"]["mode"], report["quantization"]))
    if report["group"]:
        held = ", ".join(f"{worker['weight_bytes'] / 1e6:,.0f}" for worker in report["workers"])
        lines.append(
            f"{report['strategy']}: the members hold {held} MB of weights each; they stood idle "
            f"{report['group']['idle_share']:.0%} of the time"
        )
    faults = report["faults"]
    if faults["worker_deaths"]:
        lines.append(
            f"{faults['worker_deaths']} worker deaths were survived; "
            f"{faults['retried_batches']} batches in flight were computed again."
        )
    if is_demo_model:
        lines.append(
            "The model is the demo preset: its weights are random, so its probabilities mean "
            "nothing. Name your own with --preset, --head-kernel and --head-bias."
        )
    lines.append(f"Report: {config.report_path}")
    return "\n".join(lines)
