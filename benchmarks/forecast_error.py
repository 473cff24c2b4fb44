"""How far is the forecast of `--plan --calibrate` from what the run then takes?

Plans, then runs, each in a process of its own and with the same flags; both start with an empty
compilation cache. The error is of the whole: start, load, compile, predict and end. On a machine
whose speed drifts it says how much that drifted; the report names the load. The last line is one
JSON object.

    python benchmarks/forecast_error.py                                # the demo, two rounds
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
    parser.add_argument("--rounds", type=int, default=2, help="forecast and run (default: 2)")
    parser.add_argument("flags", nargs="*", help="flags of the run, after --")
    arguments = parser.parse_args()
    rounds = [one_round(arguments.flags) for _ in range(arguments.rounds)]
    for number, one in enumerate(rounds, start=1):
        print(
            f"round {number}: forecast {one['forecast_s']:.1f} s, took {one['took_s']:.1f} s: "
            f"{one['error']:+.1%} (predicting {one['forecast_predict_s']:.1f} and "
            f"{one['took_predict_s']:.1f} s; calibrating took {one['plan_s']:.0f} s; load average "
            f"{one['load_average'][0]:.1f})"
        )
    print(
        json.dumps(
            {
                "benchmark": "forecast_error",
                "flags": arguments.flags,
                "median_error": median(abs(one["error"]) for one in rounds),
                "rounds": rounds,
            }
        )
    )


def one_round(flags: list[str]) -> dict[str, Any]:
    """Return the forecast and what the run took, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "submission.csv")
        started = time.monotonic()
        call([*flags, "--plan", "--calibrate"], output, Path(folder, "of-plan"))
        plan_s = time.monotonic() - started
        plan = json.loads(output.with_name(f"{output.name}.plan.json").read_text())
        asked = next(
            option
            for option in plan["options"]
            if all(option[key] == value for key, value in plan["asked"].items())
        )
        call(flags, output, Path(folder, "of-run"))
        report = json.loads(output.with_name(f"{output.name}.report.json").read_text())
    stages = asked["seconds_by_stage"]
    took = report["seconds"]["total"]
    return {
        "forecast_s": asked["seconds"],
        "took_s": took,
        "error": asked["seconds"] / took - 1,
        # A CPU compiles the later shapes while it predicts.
        "forecast_predict_s": stages["predict"] + stages["compile"],
        "took_predict_s": report["seconds"]["predict"],
        "plan_s": plan_s,
        "load_average": os.getloadavg(),
    }


def call(flags: list[str], output: Path, cache: Path) -> None:
    """Run the command with a cache folder that holds the demo, if there is one, and no program."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arena-runner"
    (cache / "arena-runner").mkdir(parents=True)
    for demo in usual.glob("demo-*"):
        (cache / "arena-runner" / demo.name).symlink_to(demo)
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *flags, "--output", str(output)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    main()
