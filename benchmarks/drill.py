"""Is a submission in place before the limit, whatever the limit and whatever fails?

Runs the demo preset on generated rows with time limits of 25, 50, 75 and 100 % of the time that the
whole job needs, in data-parallel and pipeline mode, without faults, with a worker killed, with one
slowed to a third, and with one hung. Each drill is its own process with injected faults
(`runner/model/injected_faults.py`). Workers sleep until a device of a known speed would have
finished a batch, so that predicting takes its share of the time and the machine's load matters
less. Every drill must end with exit code 0 and a complete, valid submission before the limit,
counted from before the process began. If rows were given up, `shorten` must have used 85 % of its
time. Prints one JSON object at the end; the exit code is 1 if any drill failed.

    python benchmarks/drill.py                                     # all 32, about 12 minutes
    python benchmarks/drill.py --modes pipeline --limits 50 --faults hung --repetitions 20
    python benchmarks/drill.py --on-deadline fill --faults none
    python benchmarks/drill.py --limits --random-limits 20 --faults none killed
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runner.demo import make_rows, write_test_set  # noqa: E402
from runner.model.injected_faults import VARIABLE  # noqa: E402

MODES = {
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline", "--num-workers", "2"),
    "single": ("--mode", "single"),
}
REPLICAS = {"data-parallel": 2, "pipeline": 1, "single": 1}
FAULTS = ("none", "killed", "slow", "hung")
LIMITS = (25, 50, 75, 100)
# Tokens per second of all devices of a mode together, and how many times as long a slow one takes.
TOKENS_PER_S, SLOW = 6000.0, 3.0
# Killed and hung workers fail at the batch that holds the row of this rank by length: an early one.
STRIKES_AT = 10
LEAST_USED = 0.85
# A process that still runs this long after its limit has failed.
GIVE_UP_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Drill deadlines.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["data-parallel", "pipeline"])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--limits", nargs="*", type=int, default=list(LIMITS), help="in percent")
    parser.add_argument("--random-limits", type=int, default=0, metavar="N", help="N more, drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the limits that are drawn")
    parser.add_argument("--repetitions", type=int, default=1, help="of every drill")
    parser.add_argument("--on-deadline", choices=("shorten", "fill"), default="shorten")
    parser.add_argument("--pooling", choices=("mean", "padded-mean", "last"), default="mean")
    parser.add_argument(
        "--rows", type=int, default=360, help="1200 or more are still predicted at 25 percent"
    )
    arguments = parser.parse_args()
    # Limits that fall into loading or the first batch find bugs that round ones do not.
    drawn = np.random.default_rng(arguments.seed).integers(10, 110, arguments.random_limits)
    arguments.limits += drawn.tolist()
    with tempfile.TemporaryDirectory(prefix="arena-runner-drill-") as folder:
        drills = list(drill_all(arguments, Path(folder)))
    failed = [drill for drill in drills if drill["violations"]]
    used = [drill["used"] for drill in drills if drill["given_up"] and drill["used"]]
    print(
        f"\n{len(drills) - len(failed)} of {len(drills)} drills passed; if rows were given up, at "
        f"least {min(used, default=1):.0%} of the limit was used, {median(used or [1]):.0%} in the "
        f"median; the closest submission was in place "
        f"{min(drill['limit_s'] - drill['stood_s'] for drill in drills):.2f} s before its limit; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    print(json.dumps({"benchmark": "drill", "arguments": vars(arguments), "drills": drills}))
    sys.exit(1 if failed else 0)


def drill_all(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Run every drill; print and yield its result."""
    test_set = folder / "test.csv"
    write_test_set(test_set, make_rows(arguments.rows, seed=25))
    common = ["--input", str(test_set), "--pooling", arguments.pooling]
    for mode in arguments.modes:
        flags = [*MODES[mode], *common]
        run(flags, folder / "warm", faults=[])  # makes the demo, fills the cache
        calm = run(flags, folder / "calm", faults=faults_of("none", mode))
        needed_s = calm["stood_s"]
        rows = pd.read_csv(folder / "calm.csv.rows.csv", dtype={"id": str})
        by_length = np.lexsort((np.arange(len(rows)), -rows["tokens"].to_numpy()))
        victim = int(by_length[min(STRIKES_AT, len(rows) - 1)])
        print(f"{mode}: the whole job needs {needed_s:.1f} s", flush=True)
        print(
            f"{'':14} {'fault':7} limit        stood    used  predicted/shortened/filled  "
            "decisions, load"
        )
        for fault in arguments.faults:
            for percent in arguments.limits:
                for number in range(arguments.repetitions):
                    name = f"{mode}-{fault}-{percent}-{number}"
                    drill = run(
                        [*flags, "--on-deadline", arguments.on_deadline],
                        folder / name,
                        limit_s=needed_s * percent / 100,
                        faults=faults_of(fault, mode, victim, folder / f"{name}.struck"),
                    )
                    drill["struck"] = (folder / f"{name}.struck").exists()
                    check(drill, folder / f"{name}.csv", test_set, arguments.on_deadline)
                    drill |= {"mode": mode, "fault": fault, "percent": percent}
                    show(drill)
                    yield drill


def faults_of(
    fault: str, mode: str, victim: int = 0, once: Path | None = None
) -> list[dict[str, Any]]:
    """Return the faults of a drill: devices of a known speed, and what happens to one of them."""
    speeds = [TOKENS_PER_S / REPLICAS[mode]] * REPLICAS[mode]
    if fault == "slow":
        speeds[0] /= SLOW
    faults: list[dict[str, Any]] = [
        {"kind": "slow", "tokens_per_s": speed, "replica": number}
        for number, speed in enumerate(speeds)
    ]
    if fault in ("killed", "hung"):
        kind = {"killed": "kill", "hung": "hang"}[fault]
        faults.append({"kind": kind, "rows": [victim], "once": str(once)})
    return faults


def run(
    flags: Sequence[str],
    stem: Path,
    *,
    faults: Sequence[dict[str, Any]],
    limit_s: float | None = None,
) -> dict[str, Any]:
    """Run the command to its end; return what it left, `stood_s` from before it was started."""
    output = stem.with_name(f"{stem.name}.csv")
    command = [sys.executable, str(ROOT / "run.py"), *flags, "--output", str(output)]
    if limit_s is not None:
        command += ["--time-limit", f"{limit_s:.2f}s"]
    else:
        command += ["--resume", "never"]
    started, load = time.time(), os.getloadavg()[0]
    process = subprocess.Popen(
        command,
        env=os.environ | {VARIABLE: json.dumps(list(faults))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=None if limit_s is None else limit_s + GIVE_UP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        errors = process.communicate()[1] or "it did not end"
    ended = time.time()
    found: dict[str, Any] = {
        "code": process.returncode,
        "limit_s": limit_s,
        "stood_s": float("inf"),
        "ended_s": ended - started,
        "load": load,
        "errors": errors.splitlines(),
        "report": {},
    }
    if output.is_file():
        found["stood_s"] = output.stat().st_mtime - started
    report = output.with_name(f"{output.name}.report.json")
    if report.is_file():
        found["report"] = json.loads(report.read_text())
    if limit_s is None and process.returncode:
        sys.exit(f"The run without a limit failed:\n{errors}")
    return found


def check(drill: dict[str, Any], output: Path, test_set: Path, policy: str) -> None:
    """Add to a drill its violations and the figures of its report."""
    report, wrong = drill.pop("report"), []
    rows = report.get("rows", {})
    drill["rows"] = {name: rows.get(name) for name in ("predicted", "shortened", "filled")}
    drill["given_up"] = bool(rows.get("shortened") or rows.get("filled"))
    drill["decisions"] = report.get("deadline", {}).get("events", [])
    finished_s = report.get("deadline", {}).get("finished_s")
    drill["used"] = finished_s / drill["limit_s"] if finished_s else None
    drill["faults"] = {name: n for name, n in report.get("faults", {}).items() if n}
    if drill["code"] != 0:
        wrong.append(f"exit code {drill['code']}")
    if drill["stood_s"] > drill["limit_s"]:
        wrong.append(f"stood {drill['stood_s'] - drill['limit_s']:.2f} s late")
    if drill["used"] is None or drill["used"] > 1:
        wrong.append("late by its own report")
    elif drill["given_up"] and policy == "shorten" and drill["used"] < LEAST_USED:
        wrong.append(f"used {drill['used']:.0%} of the time")
    if output.is_file():
        wrong += wrong_with(output, test_set, report)
    if not wrong:
        drill.pop("errors")
    drill["violations"] = wrong


def wrong_with(output: Path, test_set: Path, report: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a submission and its table of rows."""
    expected = pd.read_csv(test_set, dtype=str, keep_default_na=False)["id"].tolist()
    found = pd.read_csv(output, dtype={"id": str}, keep_default_na=False)
    values = found.iloc[:, 1:].to_numpy(dtype=float)
    if found["id"].tolist() != expected:
        yield "other ids"
    if list(found.columns) != ["id", "winner_model_a", "winner_model_b", "winner_tie"]:
        yield "other columns"
    if not (np.isfinite(values).all() and (values >= 0).all()):
        yield "no probabilities"
    elif np.abs(values.sum(axis=1) - 1).max() > 1e-6:
        yield "sums that are not one"
    rows = pd.read_csv(output.with_name(f"{output.name}.rows.csv"), dtype={"id": str})
    counts = rows["how"].value_counts()
    for how, count in report.get("rows", {}).items():
        if how in ("shortened", "filled") and counts.get(how, 0) != count:
            yield f"{counts.get(how, 0)} rows {how} in the table, {count} in the report"


def show(drill: dict[str, Any]) -> None:
    rows = drill["rows"]
    made = f"{rows['predicted']}/{rows['shortened']}/{rows['filled']}"
    used = f"{drill['used']:.0%}" if drill["used"] else "?"
    fault = drill["fault"]
    if fault in ("killed", "hung") and not drill["struck"]:
        fault = f"({fault})"  # it ended before the worker reached that batch
    print(
        f"{drill['mode']:14} {fault:8} {drill['percent']:3}% {drill['limit_s']:5.1f} s "
        f"{drill['stood_s']:6.1f} s  {used:>5}  {made:>16}  {len(drill['decisions'])}, "
        f"{drill['load']:.1f}  {'; '.join(drill['violations']) or 'ok'}",
        *(f"    {line}" for line in drill.get("errors", [])),
        sep="\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
