"""Facts of a finished run -> the JSON report and a short summary in words."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from runner.common.files import write_whole
from runner.common.poolings import POOLINGS
from runner.common.records import Faults, WorkerInfo, WorkerStats
from runner.common.versions import versions
from runner.config.run_config import RunConfig
from runner.model.accuracy import describe
from runner.results.table import Merger
from sharding.strategies import Strategy

SCHEMA = 1


def make_report(
    config: RunConfig,
    *,
    fingerprint: str | None,
    rows: dict[str, int],
    answered: int,
    real_tokens: int,
    padded_tokens: int,
    model_flops: float,
    seconds: dict[str, float],
    info: WorkerInfo | None,
    workers: list[WorkerStats],
    faults: Faults,
    plan: dict[str, Any],
    deadline: dict[str, Any],
    forecasts: list[tuple[float, float]],
    extra_passes: dict[str, float] | None,
    journal: dict[str, Any],
    strategy: Strategy | None,
    quantization: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the report; every duration in seconds, every rate over `seconds["predict"]`.

    `rates` are of the `answered` rows of this run, not of those resumed. `rates.mfu` is model FLOPs
    of real tokens over what the workers' devices did in a large matmul measured in this run, all
    workers together. `forecasts` are pairs: seconds since the start, and the total seconds that
    were forecast then.
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
        "rows": rows,
        "tokens": {"real": real_tokens, "padded": padded_tokens},
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "rates": {
            "rows_per_s": answered / predict_s if predict_s else None,
            "tokens_per_s": real_tokens / predict_s if predict_s else None,
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / peak if flops_per_s and peak else None,
        },
        "workers": [asdict(worker) for worker in workers],
        "faults": asdict(faults),
        "deadline": deadline,
        "forecasts": forecasts,
        "extra_passes": extra_passes,
        "journal": journal,
        "model": asdict(info) if info else None,
        "quantization": quantization,
        "plan": plan,
        "group": _describe_group(strategy, workers) if workers else None,
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
    write_whole(path, json.dumps(report, indent=1) + "\n", private=True)


def write_rows(path: Path, merger: Merger, *, id_column: str) -> None:
    """Write how each row was made and from how many tokens, beside the report."""
    table = pd.DataFrame({"how": merger.how, "tokens": merger.lengths})
    table.insert(0, id_column, pd.Series(merger.ids, dtype=object), allow_duplicates=True)
    write_whole(path, table.to_csv(index=False, lineterminator="\n"), private=True)


def say_summary(report: dict[str, Any], config: RunConfig) -> str:
    """Return what standard output gets at the end: the few lines, or one JSON object."""
    said = summarize(report, config)
    if config.log_format != "json":
        return said
    figures = {name: report[name] for name in ("rows", "seconds", "rates", "faults")}
    paths = {"output": str(config.output), "report": str(config.report_path)}
    return json.dumps({"event": "summary", "message": said, **paths, **figures})


def summarize(report: dict[str, Any], config: RunConfig) -> str:
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
        idle = report["group"]["idle_share"]
        stood_idle = "" if idle is None else f"; they stood idle {idle:.0%} of the time"
        lines.append(
            f"{report['strategy']}: the members hold {held} MB of weights each{stood_idle}"
        )
    lines += what_happened(report)
    if config.uses_demo_model:
        lines.append(
            "The model is the demo preset: its weights are random, so its probabilities mean "
            "nothing. Name your own with --preset, --head-kernel and --head-bias."
        )
    lines.append(f"Report: {config.report_path}, and to look at: {config.page_path}")
    return "\n".join(lines)


def what_happened(report: dict[str, Any]) -> list[str]:
    """Return sentences on what was not as asked for, and on what was survived."""
    return [*_describe_rows(report), *_describe_faults(report["faults"])]


def _describe_rows(report: dict[str, Any]) -> Iterator[str]:
    """Say what is not as it was asked for, and the deadline's part in it."""
    rows, deadline = report["rows"], report["deadline"]
    if rows["resumed"]:
        yield f"{rows['resumed']:,} rows were in the journal already."
    if rows["shortened"]:
        said = f"{rows['shortened']:,} rows were made from fewer tokens than asked for"
        if POOLINGS[report["config"]["pooling"]].sees_padding:
            said += ", and pooled over another length than the head was trained with"
        yield said + "."
    if rows["filled"]:
        yield f"{rows['filled']:,} rows have no answer of the model: they got the fallback."
    if extra := report["extra_passes"]:
        yield (
            f"{extra['rows']:,} rows were predicted again with their responses swapped, and "
            f"averaged, in {extra['seconds']:.1f} s."
        )
    if deadline["limit_s"] is not None:
        yield (
            f"The submission stood {deadline['slack_s']:.1f} s before the limit of "
            f"{deadline['limit_s']:,.0f} s."
        )


def _describe_faults(faults: dict[str, int]) -> Iterator[str]:
    """Say in words what was survived."""
    deaths, hangs, retried = faults["worker_deaths"], faults["hangs"], faults["retried_batches"]
    if deaths or hangs:
        what = [f"{deaths} worker deaths"] if deaths else []
        what += [f"{hangs} hung workers"] if hangs else []
        yield (
            f"{' and '.join(what)} were survived; {retried} batches in flight were computed again."
        )
    elif retried and not faults["memory_splits"]:
        yield f"{retried} batches failed and were computed again."
    if faults["memory_splits"]:
        yield (
            f"{faults['memory_splits']} batches did not fit the device's memory and were computed "
            "in smaller ones."
        )
    if faults["nonfinite_rows"]:
        yield f"{faults['nonfinite_rows']} rows came out as NaN or infinity at first."
    if faults["quarantined_rows"]:
        yield (
            f"{faults['quarantined_rows']} rows could not be computed by any worker; the lines "
            "above name them."
        )
