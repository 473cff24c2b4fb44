"""How fast are the modes on this machine, and what do start, load and compile cost?

Each contender is the command itself, run as a process on the demo preset and the same rows: single
mode on all cores, data-parallel with one and two workers, and a group of two as a pipeline and as
slices. Traffic between the members of a group is measured: what stages hand on, as the workers
count it, and for slices what crosses the loopback device, less what it does in data-parallel.

Rounds alternate the contenders, so that a machine whose speed drifts drifts for all. A first round,
not timed, fills the compilation cache and checks every contender's probabilities against single
mode's: no speed is quoted of wrong answers. Steady state is the time from the first batch to the
last result, as the run's own report gives it; load and compile stand beside it. The ceiling is a
large float32 matmul on the same cores, measured by the workers of the same run. The last line is
one JSON object.

    python benchmarks/throughput.py --rows 240 --rounds 3
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
CONTENDERS = {
    "single": ["--mode", "single"],
    "data-parallel, 1 worker": ["--mode", "data-parallel", "--num-workers", "1"],
    "data-parallel, 2 workers": ["--mode", "data-parallel", "--num-workers", "2"],
    "pipeline, group of 2": ["--mode", "model-parallel", "--strategy", "pipeline"],
    "tensor, group of 2": ["--mode", "model-parallel", "--strategy", "tensor"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the modes on the demo preset.")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pooling", default="padded-mean")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_set = write_rows(folder, options.rows)
        flags = ["--input", str(test_set), "--pooling", options.pooling]
        check_outputs(folder, flags)
        reports: dict[str, list[dict[str, Any]]] = {contender: [] for contender in CONTENDERS}
        for number in range(options.rounds):
            for contender in CONTENDERS:
                report, _ = run_once(folder, contender, flags)
                reports[contender].append(report)
                steady = report["seconds"]["predict"]
                print(f"round {number + 1}: {contender}: {steady:.2f} s steady", flush=True)
    summary = {contender: summarize(reports[contender]) for contender in CONTENDERS}
    quiet = median(report["loopback_bytes"] for report in reports["data-parallel, 2 workers"])
    for contender, row in summary.items():
        row["traffic_bytes_per_token"] = traffic(contender, reports[contender], quiet)
    print_table(summary, reports)
    first = reports["single"][0]
    print(
        json.dumps(
            {
                "benchmark": "throughput",
                "commit": commit(),
                "hardware": f"{os.cpu_count()} cores, {processor()}",
                "versions": first["versions"],
                "rows": options.rows,
                "rounds": options.rounds,
                "pooling": options.pooling,
                "tokens": first["tokens"],
                "contenders": summary,
            }
        )
    )


def write_rows(folder: Path, rows: int) -> Path:
    """The demo's kind of rows, as many as asked for."""
    sys.path.insert(0, str(ROOT))
    from runner.demo import SEED, make_rows, write_test_set

    path = folder / "test.csv"
    write_test_set(path, make_rows(rows, SEED))
    return path


def run_once(folder: Path, contender: str, flags: list[str]) -> tuple[dict[str, Any], np.ndarray]:
    """Run one contender to its end; return its report and its probabilities (rows, classes)."""
    output = folder / "submission.csv"
    command = [sys.executable, str(ROOT / "run.py"), *CONTENDERS[contender], *flags]
    before = loopback_bytes()
    subprocess.run(
        [*command, "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    report = json.loads((folder / "submission.csv.report.json").read_text())
    report["loopback_bytes"] = loopback_bytes() - before
    return report, pd.read_csv(output).iloc[:, 1:].to_numpy()


def loopback_bytes() -> int:
    """Bytes that have crossed the loopback device of this machine."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def traffic(contender: str, reports: list[dict[str, Any]], quiet: float) -> float:
    """Bytes between the members of a group for each token computed; 0 outside groups."""
    tokens = reports[0]["tokens"]["padded"]
    if "pipeline" in contender:
        return median(sum(w["sent_bytes"] for w in r["workers"]) for r in reports) / tokens
    if "tensor" in contender:
        return median(r["loopback_bytes"] - quiet for r in reports) / tokens
    return 0.0


def check_outputs(folder: Path, flags: list[str]) -> None:
    expected = run_once(folder, "single", flags)[1]
    for contender in CONTENDERS:
        difference = np.abs(run_once(folder, contender, flags)[1] - expected).max()
        print(f"outputs: {contender}: {difference:.1e} from single (tolerance {TOLERANCE})")
        if difference > TOLERANCE:
            sys.exit(f"{contender} gives other answers; no speed is quoted.")


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the range of the steady state."""

    def over(*path: str) -> list[float]:
        values = []
        for report in reports:
            value = report
            for key in path:
                value = value[key]
            values.append(float(value))  # type: ignore[arg-type]
        return values

    steady = over("seconds", "predict")
    peaks = [max(worker["peak_rss_bytes"] for worker in report["workers"]) for report in reports]
    return {
        "steady_s": {"median": median(steady), "min": min(steady), "max": max(steady)},
        "rows_per_s": median(over("rates", "rows_per_s")),
        "real_tokens_per_s": median(over("rates", "tokens_per_s")),
        "model_gflops_per_s": median(over("rates", "model_flops_per_s")) / 1e9,
        "mfu": median(over("rates", "mfu")),
        "start_workers_s": median(over("seconds", "start_workers")),
        "load_s": median(over("seconds", "load")),
        "compile_cached_s": median(over("seconds", "compile")),
        "total_s": median(over("seconds", "total")),
        "worker_peak_rss_mb": max(peaks) / 1e6,
        "idle_share": median(idle_share(report["workers"]) for report in reports),
    }


def idle_share(workers: list[dict[str, Any]]) -> float:
    """Of a pipeline this is the bubble."""
    idle = sum(worker["idle_s"] for worker in workers)
    return float(idle / (idle + sum(worker["busy_s"] for worker in workers)))


def print_table(
    summary: dict[str, dict[str, Any]], reports: dict[str, list[dict[str, Any]]]
) -> None:
    print(
        f"\n{'':26}{'steady s (min-max)':>22}{'x single':>10}{'rows/s':>9}{'tokens/s':>10}"
        f"{'GFLOP/s':>9}{'MFU':>6}{'load s':>8}{'compile s':>11}{'peak MB':>9}{'idle':>6}"
        f"{'kB/token':>10}"
    )
    single = [report["seconds"]["predict"] for report in reports["single"]]
    for contender, row in summary.items():
        mine = [report["seconds"]["predict"] for report in reports[contender]]
        ratio = median(theirs / own for theirs, own in zip(single, mine, strict=True))
        steady = row["steady_s"]
        spread = f"{steady['median']:.2f} ({steady['min']:.2f}-{steady['max']:.2f})"
        print(
            f"{contender:26}{spread:>22}{ratio:>10.2f}{row['rows_per_s']:>9.1f}"
            f"{row['real_tokens_per_s']:>10,.0f}{row['model_gflops_per_s']:>9.0f}"
            f"{row['mfu']:>6.2f}{row['load_s']:>8.1f}{row['compile_cached_s']:>11.2f}"
            f"{row['worker_peak_rss_mb']:>9.0f}{row['idle_share']:>6.0%}"
            f"{row['traffic_bytes_per_token'] / 1e3:>10.1f}"
        )


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
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


if __name__ == "__main__":
    main()
