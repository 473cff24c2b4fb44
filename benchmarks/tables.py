"""Contenders' times -> a table on the terminal, a JSON line, a Markdown report and a plot."""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, Contender, Measured, ratio
from benchmarks.rivals.ours import COPIES
from runner.common.versions import installed
from runner.preset.families import model_shape

PACKAGES = ("jax", "keras", "keras-hub", "numpy", "ray", "tensorflow", "torch", "transformers")
# The contender that the others are compared with, by pooling.
YARDSTICKS = {"padded-mean": "ours, 2 workers", "mean": "ours, 2 workers, mean"}


def write_results(
    options: argparse.Namespace,
    *,
    contenders: list[Contender],
    measured: dict[str, Measured],
    peaks: dict[str, dict[str, float]],
    lengths: np.ndarray,
    config: dict[str, Any],
    tuned: dict[str, Any],
) -> None:
    """Print the results and write the files.

    Args:
        peaks: FLOP/s by cores and library.
        lengths: (rows,) token counts, truncated at the sequence length.
        config: the preset's config.json.
    """
    best = {cores: max(rates.values()) for cores, rates in peaks.items()}
    flops = model_flops(lengths, config)
    rows = [
        summarize(contender, measured, best, flops=flops, lengths=lengths)
        for contender in contenders
    ]
    facts = {
        "benchmark": "throughput",
        "command": shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": f"{os.cpu_count()} cores, {processor()}",
        "versions": versions(),
        "preset_shape": options.preset_shape,
        "sequence_length": options.sequence_length,
        "rounds": options.rounds,
        "lengths": describe_lengths(lengths, options.sequence_length),
        "model_gflop": flops / 1e9,
        "matmul_peak_gflops": {
            cores: {library: round(rate / 1e9, 1) for library, rate in rates.items()}
            for cores, rates in peaks.items()
        },
        "tuned": tuned,
        "contenders": rows,
    }
    table = as_table(rows)
    print("\n".join(table))
    options.results.mkdir(parents=True, exist_ok=True)
    base = options.results / f"{facts['date']}-{options.name}"
    plot(rows, best, base.with_suffix(".png"))
    base.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    base.with_suffix(".md").write_text(as_markdown(facts, table, base.with_suffix(".png").name))
    print(json.dumps(facts))


def model_flops(lengths: np.ndarray, config: dict[str, Any]) -> float:
    """Return the FLOPs that the real tokens need: matrix products, and causal attention."""
    shape = model_shape(config["class_name"], config["config"])
    attention = float((lengths.astype(float) ** 2).sum()) * shape.attention_flops(1)
    return float(lengths.sum()) * shape.flops_per_token + attention


def summarize(
    contender: Contender,
    measured: dict[str, Measured],
    peaks: dict[str, float],
    *,
    flops: float,
    lengths: np.ndarray,
) -> dict[str, Any]:
    """Return one contender's figures; times are medians over the rounds."""
    mine = measured[contender.name]
    steady = median(mine.steady_s)
    yardstick = measured.get(YARDSTICKS[contender.pooling])
    alone = contender.cores is not None and len(contender.cores) == 1
    report = mine.report
    padded = report["tokens"]["padded"] if report else None
    return {
        "name": contender.name,
        "pooling": contender.pooling,
        "options": {k: v for k, v in contender.options.items() if k != "job"},
        "difference": mine.difference,
        "tolerance": contender.tolerance,
        "steady_s": steady,
        "steady_min_s": min(mine.steady_s),
        "steady_max_s": max(mine.steady_s),
        "times_ours": ratio(mine.steady_s, yardstick.steady_s) if yardstick else None,
        "rows_per_s": len(lengths) / steady,
        "real_tokens_per_s": int(lengths.sum()) / steady,
        "padded_tokens_per_s": padded / report["seconds"]["predict"] if padded else None,
        "model_gflops": flops / steady / 1e9,
        "mfu": flops / steady / peaks["one core" if alone else "all cores"],
        "load_s": report["seconds"]["load"] if report else mine.load_s,
        "compile_first_s": mine.compile_s,
        "total_s": median(mine.total_s),
        "peak_mb": mine.peak_bytes / 1e6,
        "journal_share": report["journal"]["seconds"] / report["seconds"]["predict"]
        if report
        else None,
    }


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table that is also readable on a terminal."""
    head = (
        "contender", "steady s (min-max)", "x ours", "rows/s", "real tok/s", "GFLOP/s", "MFU",
        "largest diff.", "load s", "first compile s", "start to end s", "peak MB", "journal",
    )  # fmt: skip
    lines = []
    for row in rows:
        steady = f"{row['steady_s']:.2f} ({row['steady_min_s']:.2f}-{row['steady_max_s']:.2f})"
        first = row["compile_first_s"]
        lines.append(
            (
                row["name"],
                steady,
                f"{row['times_ours']:.2f}" if row["times_ours"] else "-",
                f"{row['rows_per_s']:.2f}",
                f"{row['real_tokens_per_s']:,.0f}",
                f"{row['model_gflops']:.0f}",
                f"{row['mfu']:.2f}",
                f"{row['difference']:.0e}",
                f"{row['load_s']:.1f}",
                f"{first:.1f}" if first is not None else "in load",
                f"{row['total_s']:.1f}",
                f"{row['peak_mb']:,.0f}",
                f"{row['journal_share']:.2%}" if row["journal_share"] is not None else "-",
            )
        )
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def format_line(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [format_line(head), "| " + " | ".join(rule) + " |", *map(format_line, lines)]


def as_markdown(facts: dict[str, Any], table: list[str], picture: str) -> str:
    versions_ = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lengths = facts["lengths"]
    peaks = "; ".join(
        f"{cores}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        for cores, rates in facts["matmul_peak_gflops"].items()
    )
    tuned = "; ".join(f"{name} {choice}" for name, choice in facts["tuned"].items())
    return f"""# {facts["preset_shape"]}, {facts["sequence_length"]} tokens, {facts["date"]}

`{facts["command"]}`, commit {facts["commit"]}, {facts["hardware"]}, no accelerator. {versions_}.

{lengths["rows"]} rows, {lengths["mean"]:.0f} real tokens on average (quartiles \
{lengths["quartiles"]}, {lengths["cut"]:.0%} truncated at {facts["sequence_length"]}), \
{facts["model_gflop"]:,.0f} GFLOP for the real tokens. Large float32 matmul on the same cores, \
GFLOP/s: {peaks}; MFU is relative to the largest, also for contenders that round below float32.

Medians of {facts["rounds"]} alternating rounds. "Steady" is predicting alone; for ours, at the \
pace of a run over {COPIES} copies of the rows, without each worker's first batch of a shape. "x \
ours" is how many times as long it took as our two workers with the same pooling. "Load" and \
"first compile" are separate (rivals compile while they load). "Start to end" is a whole round: \
for ours, a run of the command over all copies, from start to submission; for others, predicting \
once. "Peak" is the proportional set size of all processes of a contender, while it loads and in \
its first round, which does not count. "Journal" is the share of predicting spent on saving rows. \
Options: {tuned}.

{chr(10).join(table)}

![steady state]({picture})
"""


def plot(rows: list[dict[str, Any]], peaks: dict[str, float], path: Path) -> None:
    """Draw each contender's model GFLOP/s, with the matmul peak as the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.4))
    names = [row["name"] for row in rows]
    rates = [row["model_gflops"] for row in rows]
    colours = ["#2a6f97" if name.startswith("ours") else "#b0b0b0" for name in names]
    bars = axes.barh(names, rates, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.axvline(peaks["all cores"] / 1e9, color="#c1121f", linestyle="--", linewidth=1)
    axes.text(
        peaks["all cores"] / 1e9,
        -0.9,
        "float32 matmul peak",
        color="#c1121f",
        fontsize=8,
        ha="center",
    )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("model GFLOP/s on real tokens (higher is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def describe_lengths(lengths: np.ndarray, sequence_length: int) -> dict[str, Any]:
    quartiles = np.percentile(lengths, (0, 25, 50, 75, 100)).astype(int).tolist()
    return {
        "rows": len(lengths),
        "mean": float(lengths.mean()),
        "quartiles": quartiles,
        "cut": float((lengths >= sequence_length).mean()),
    }


def versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | installed(PACKAGES)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
