"""How far off are the forecasts of `--plan --calibrate`, and of the run itself?

Plans, then runs, each in its own process with the same flags; both start with an empty compilation
cache. The plan's error covers the whole run: start, load, compile, predict and end. The run's error
compares its forecast of the total, after a tenth of predicting, with the time when its submission
was in place. If the machine's speed drifts, the errors include that drift; the load is printed. The
last line is one JSON object.

    python benchmarks/forecast_error.py                                # the demo, two rounds
    python benchmarks/forecast_error.py --runs-only --warm -- --mode single --pooling mean
    python benchmarks/forecast_error.py --rounds 3 -- --pooling mean --mode single
    python benchmarks/forecast_error.py -- --preset DIR --head-kernel ... --input test.csv
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the forecast with the run.")
    parser.add_argument("--rounds", type=int, default=2, help="plan and run (default: 2)")
    parser.add_argument("--runs-only", action="store_true", help="make no plans")
    parser.add_argument(
        "--warm", action="store_true", help="compile the programs in an earlier run"
    )
    parser.add_argument("flags", nargs="*", help="flags of the run, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        if arguments.warm:
            one_run(arguments.flags, Path(kept), Path(kept, "warm"))
        rounds = [
            one_round(arguments.flags, arguments, Path(kept, "warm"))
            for _ in range(arguments.rounds)
        ]
    for number, one in enumerate(rounds, start=1):
        if "forecast_s" in one:
            print(
                f"round {number}: planned {one['forecast_s']:.1f} s, took {one['took_s']:.1f} s: "
                f"{one['error']:+.1%} (predicting {one['forecast_predict_s']:.1f} and "
                f"{one['took_predict_s']:.1f} s; calibrating took {one['plan_s']:.0f} s)"
            )
        during = one["during"]
        print(
            f"round {number}: at {during['at_s']:.1f} s of {during['stood_s']:.1f} s, a tenth of "
            f"predicting, the run forecast {during['forecast_s']:.1f} s: {during['error']:+.1%}; "
            f"largest error from then on {during['worst']:+.1%}; load average "
            f"{one['load_average'][0]:.1f}"
        )
    print(
        json.dumps(
            {
                "benchmark": "forecast_error",
                "flags": arguments.flags,
                "median_error": median(abs(one.get("error", 0.0)) for one in rounds),
                "median_error_during": median(abs(one["during"]["error"]) for one in rounds),
                "rounds": rounds,
            }
        )
    )


def one_round(flags: list[str], arguments: argparse.Namespace, warm: Path) -> dict[str, Any]:
    """Return the forecasts and the times of one plan and run, in seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        if not arguments.runs_only:
            found = one_plan(flags, folder)
        report = one_run(flags, folder, warm if arguments.warm else folder / "of-run")
    found |= {
        "took_s": report["seconds"]["total"],
        "took_predict_s": report["seconds"]["predict"],
        "during": during(report),
        "load_average": os.getloadavg(),
    }
    if "forecast_s" in found:
        found["error"] = found["forecast_s"] / found["took_s"] - 1
    return found


def one_plan(flags: list[str], folder: Path) -> dict[str, Any]:
    """Return what a plan forecasts."""
    output, started = folder / "submission.csv", time.monotonic()
    call([*flags, "--plan", "--calibrate"], output, folder / "of-plan")
    plan = json.loads(output.with_name(f"{output.name}.plan.json").read_text())
    asked = next(
        option
        for option in plan["options"]
        if all(option[key] == value for key, value in plan["asked"].items())
    )
    stages = asked["seconds_by_stage"]
    return {
        "plan_s": time.monotonic() - started,
        "forecast_s": asked["seconds"],
        # A CPU compiles the later shapes while it predicts.
        "forecast_predict_s": stages["predict"] + stages["compile"],
    }


def one_run(flags: list[str], folder: Path, cache: Path) -> dict[str, Any]:
    """Do one run; return its report."""
    output = folder / "submission.csv"
    call([*flags, "--resume", "never"], output, cache)
    return json.loads(output.with_name(f"{output.name}.report.json").read_text())


def during(report: dict[str, Any]) -> dict[str, float]:
    """Return the first forecast after a tenth of predicting."""
    stood_s, predict_s = report["deadline"]["finished_s"], report["seconds"]["predict"]
    later = [pair for pair in report["forecasts"] if pair[0] >= stood_s - 0.9 * predict_s]
    at_s, forecast_s = later[0]
    return {
        "at_s": at_s,
        "stood_s": stood_s,
        "forecast_s": forecast_s,
        "error": forecast_s / stood_s - 1,
        "worst": max((pair[1] / stood_s - 1 for pair in later), key=abs),
    }


def call(flags: list[str], output: Path, cache: Path) -> None:
    """Run the command with a cache folder that holds the demo if it exists, and no programs."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arena-runner"
    (cache / "arena-runner").mkdir(parents=True, exist_ok=True)
    for demo in usual.glob("demo-*"):
        if (cache / "arena-runner" / demo.name).exists():
            continue
        (cache / "arena-runner" / demo.name).symlink_to(demo)
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *flags, "--output", str(output)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    main()
