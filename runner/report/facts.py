"""A report -> a JSON file, a table of its rows, and a short summary in words."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from runner.common.files import write_whole
from runner.common.poolings import POOLINGS
from runner.common.units import mb, seconds_text, tenths
from runner.config.run_config import RunConfig
from runner.model.accuracy import describe
from runner.results.table import Merger

DEMO = "The model is the demo preset: its weights are random, so its predictions mean nothing."


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report; readers see the old file or the whole new one."""
    write_whole(path, json.dumps(report, indent=1) + "\n", private=True)


def write_rows(path: Path, merger: Merger, *, id_column: str) -> None:
    """Write a CSV beside the report: how each row was made, and from how many tokens."""
    table = pd.DataFrame({"how": merger.how, "tokens": merger.lengths})
    table.insert(0, id_column, pd.Series(merger.ids, dtype=object), allow_duplicates=True)
    write_whole(path, table.to_csv(index=False, lineterminator="\n"), private=True)


def say_summary(report: dict[str, Any], config: RunConfig) -> str:
    """Return what the command prints at the end: a few lines, or one JSON object."""
    said = summarize(report, config)
    if config.log_format != "json":
        return said
    figures = {name: report[name] for name in ("rows", "seconds", "rates", "faults")}
    paths = {"output": str(config.output), "report": str(config.report_path)}
    return json.dumps({"event": "summary", "message": said, **paths, **figures})


def summarize(report: dict[str, Any], config: RunConfig) -> str:
    """Return the summary of a run, a few lines."""
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
    """Return the number of workers on each device, such as 2 x cpu; skips those not loaded."""
    counts = Counter(worker["device"].split(",")[0] for worker in workers if worker["device"])
    return " and ".join(f"{count} x {device}" for device, count in counts.items())


def what_happened(report: dict[str, Any]) -> list[str]:
    """Return sentences on how the run departed from its settings, and on its faults."""
    return [*_describe_rows(report), *_describe_faults(report["faults"])]


def _describe_rows(report: dict[str, Any]) -> Iterator[str]:
    rows, deadline = report["rows"], report["deadline"]
    if rows["resumed"]:
        yield f"The journal already had {_count(rows['resumed'], 'finished row')}."
    if rows["shortened"]:
        said = f"{_count(rows['shortened'], 'row')} used fewer tokens than asked for"
        if POOLINGS[report["config"]["pooling"]].sees_padding:
            said += ", so pooling used a length that the head was not trained with"
        yield said + "."
    if rows["filled"]:
        yield f"The fallback fills {_count(rows['filled'], 'row')} without a prediction."
    if extra := report["extra_passes"]:
        # Some of these rows may be from an earlier run.
        yield (
            f"Averaged {_count(extra['rows'], 'row')} with predictions for swapped responses; this "
            f"run spent {tenths(extra['seconds'])} on it."
        )
    if deadline["limit_s"] is not None:
        slack_s = deadline["slack_s"]
        yield (
            f"The submission was written {tenths(abs(slack_s))} "
            f"{'before' if slack_s >= 0 else 'after'} the time limit of "
            f"{seconds_text(deadline['limit_s'])}."
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
