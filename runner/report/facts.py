"""Facts of a finished run -> the JSON report and a short summary in words."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from runner.common.files import write_whole
from runner.common.poolings import POOLINGS
from runner.common.records import Faults, Tally, WorkerInfo, WorkerStats
from runner.common.units import mb, tenths
from runner.common.versions import versions
from runner.config.run_config import RunConfig
from runner.model.accuracy import describe
from runner.results.table import Merger
from sharding.strategies import Strategy

SCHEMA = 1
DEMO = "The model is the demo preset: its weights are random, so its predictions mean nothing."


def make_report(
    config: RunConfig,
    *,
    fingerprint: str | None,
    rows: dict[str, int],
    tally: Tally,
    model_flops: float,
    seconds: dict[str, float],
    info: WorkerInfo | None,
    workers: list[WorkerStats],
    faults: Faults,
    plan: dict[str, Any],
    deadline: dict[str, Any],
    extra_passes: dict[str, float] | None,
    strategy: Strategy | None,
    quantization: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the report. Durations are in seconds, rates are over `seconds["predict"]`.

    `rates` cover the rows answered in this run, not those resumed. `rates.mfu` divides the model
    FLOPs of real tokens by what all workers' devices reached in a large matmul, measured in this
    run. `forecasts` are pairs: seconds since the start, and the total seconds forecast then.
    """
    predict_s = seconds["predict"]
    flops_per_s = model_flops / predict_s if predict_s else None
    peak = info.matmul_flops_per_s * len(workers) if info else 0.0
    return {
        "schema": SCHEMA,
        "config": config.as_json(),
        "versions": versions(),
        "fingerprint": fingerprint,
        "mode": config.mode,
        "strategy": strategy.name if strategy else None,
        "rows": rows,
        "tokens": {"real": tally.real_tokens, "padded": tally.padded_tokens},
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
        "rates": {
            "rows_per_s": tally.answered / predict_s if predict_s else None,
            "tokens_per_s": tally.real_tokens / predict_s if predict_s else None,
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / peak if flops_per_s and peak else None,
        },
        "workers": [asdict(worker) for worker in workers],
        "faults": asdict(faults),
        "deadline": deadline,
        "forecasts": tally.forecasts,
        "extra_passes": extra_passes,
        "journal": {"path": str(config.journal_path), "seconds": round(tally.journal_s, 4)},
        "model": asdict(info) if info else None,
        "quantization": quantization,
        "plan": plan,
        "group": _describe_group(strategy, workers) if workers else None,
    }


def _describe_group(strategy: Strategy | None, workers: list[WorkerStats]) -> dict[str, Any] | None:
    """Return why this strategy, what its members exchange, and how idle they were."""
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
    """Write the report; readers see the old file or the whole new one."""
    write_whole(path, json.dumps(report, indent=1) + "\n", private=True)


def write_rows(path: Path, merger: Merger, *, id_column: str) -> None:
    """Write how each row was made and from how many tokens, as a CSV beside the report."""
    table = pd.DataFrame({"how": merger.how, "tokens": merger.lengths})
    table.insert(0, id_column, pd.Series(merger.ids, dtype=object), allow_duplicates=True)
    write_whole(path, table.to_csv(index=False, lineterminator="\n"), private=True)


def say_summary(report: dict[str, Any], config: RunConfig) -> str:
    """Return what standard output gets at the end: a few lines, or one JSON object."""
    said = summarize(report, config)
    if config.log_format != "json":
        return said
    figures = {name: report[name] for name in ("rows", "seconds", "rates", "faults")}
    paths = {"output": str(config.output), "report": str(config.report_path)}
    return json.dumps({"event": "summary", "message": said, **paths, **figures})


def summarize(report: dict[str, Any], config: RunConfig) -> str:
    """Return the summary that a run ends with, a few lines."""
    rows, seconds, rates = report["rows"], report["seconds"], report["rates"]
    quantization = report["quantization"]
    lines = [
        f"{rows['total']:,} rows -> {config.output} in {tenths(seconds['total'])} "
        f"(predicting {tenths(seconds['predict'])}, merging {tenths(seconds['merge'])}, all else "
        f"{tenths(seconds['total'] - seconds['predict'] - seconds['merge'])})"
    ]
    if rates["rows_per_s"]:
        padding = 1 - report["tokens"]["real"] / report["tokens"]["padded"]
        lines.append(
            f"{rates['rows_per_s']:,.1f} rows/s, {rates['tokens_per_s']:,.0f} real tokens/s, "
            f"{padding:.0%} padding; {describe_devices(report['workers'])}, "
            f"{report['model']['dtype']}{' and ' + quantization['mode'] if quantization else ''}"
        )
    if quantization:
        lines.append(describe(quantization["mode"], quantization))
    if report["group"]:
        held = [mb(worker["weight_bytes"]).removesuffix(" MB") for worker in report["workers"]]
        idle = report["group"]["idle_share"]
        said = "" if idle is None else f"; they were idle {idle:.0%} of the time"
        lines.append(
            f"{report['strategy']}: the members hold {', '.join(held)} MB of weights{said}"
        )
    lines += what_happened(report)
    if config.preset is None:
        lines.append(f"{DEMO} Name your own with --preset, --head-kernel and --head-bias.")
    lines.append(f"Report: {config.report_path}; as a page: {config.page_path}")
    return "\n".join(lines)


def describe_devices(workers: Sequence[dict[str, Any]]) -> str:
    """Return how many workers have which device, such as 2 x cpu; those not loaded have none."""
    counts = Counter(worker["device"].split(",")[0] for worker in workers if worker["device"])
    return " and ".join(f"{count} x {device}" for device, count in counts.items())


def what_happened(report: dict[str, Any]) -> list[str]:
    """Return sentences on what the run did differently than asked, and on the faults in it."""
    return [*_describe_rows(report), *_describe_faults(report["faults"])]


def _describe_rows(report: dict[str, Any]) -> Iterator[str]:
    rows, deadline = report["rows"], report["deadline"]
    if rows["resumed"]:
        yield f"The journal already had {_count(rows['resumed'], 'finished row')}."
    if rows["shortened"]:
        said = f"{_count(rows['shortened'], 'row')} used fewer tokens than asked for"
        if POOLINGS[report["config"]["pooling"]].sees_padding:
            said += ", so pooling used another length than the head was trained with"
        yield said + "."
    if rows["filled"]:
        yield f"The fallback fills {_count(rows['filled'], 'row')} without a prediction."
    if extra := report["extra_passes"]:
        # Some of these rows may be an earlier run's.
        yield (
            f"Averaged {_count(extra['rows'], 'row')} with predictions for swapped responses; this "
            f"run spent {tenths(extra['seconds'])} on it."
        )
    if deadline["limit_s"] is not None:
        slack_s = deadline["slack_s"]
        yield (
            f"The submission was written {tenths(abs(slack_s))} "
            f"{'before' if slack_s >= 0 else 'after'} the time limit of "
            f"{deadline['limit_s']:,.0f} s."
        )


def _describe_faults(faults: dict[str, int]) -> Iterator[str]:
    again = "their rows were queued again unless given up."
    splits = faults["memory_splits"]
    if deaths := faults["worker_deaths"]:
        yield f"{_count(deaths, 'worker')} died; the run went on."
    if hangs := faults["hangs"]:
        yield f"{_count(hangs, 'worker')} hung; the run went on."
    if failed := faults["retried_batches"] - splits:
        yield f"{_count(failed, 'batch', 'batches')} failed; {again}"
    if splits:
        yield f"{_count(splits, 'batch', 'batches')} did not fit in device memory; {again}"
    if broken := faults["nonfinite_rows"]:
        yield f"{_count(broken, 'row')} came out as NaN or infinity at first."
    if skipped := faults["quarantined_rows"]:
        yield f"{_count(skipped, 'row')} could not be computed; warnings during the run name them."


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
