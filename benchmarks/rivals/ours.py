"""This runner, by its command line: each round is a run of its own, from start to submission.

A run starts its workers anew, and works while they compile. Rivals that stay loaded did that before
their first round. So a run gets the rows several times over, and its steady state is what it does
from the moment at which every worker has every shape to the last answer: the time of that, over the
part of a copy's cost that it computed. All copies must give the same answers. Options: flags.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.rivals.protocol import Job, Round, serve
from runner.families import model_shape
from sharding.batches import BatchShape

COPIES = 4
# Of the work, what must be left when all is compiled.
LEAST_STEADY = 0.1
# Copies of a row may lie in batches of another shape; where a run rounds, nothing is promised.
TOLERANCE = 1e-5
ROUNDING = ("--dtype", "--quantization")

RUN = Path(__file__).resolve().parent.parent.parent / "run.py"


def load(job: Job) -> Round:
    values = job.options["job"]
    folder = Path(tempfile.mkdtemp(prefix="arena-runner-bench-"))
    output, test_set = folder / "submission.csv", folder / "test.csv"
    write_copies(Path(values["test_set"]), test_set)
    head = ("--head-kernel", values["head_kernel"], "--head-bias", values["head_bias"])
    command = [
        *(sys.executable, str(RUN), "--preset", job.preset, "--lora-weights", job.lora_weights),
        *(*head, "--input", str(test_set), "--output", str(output)),
        *("--pooling", job.pooling, "--sequence-length", str(job.length), *job.options["flags"]),
        # A round must not find the rows of the one before.
        *("--resume", "never", "--journal", str(folder / "journal")),
    ]

    def predict() -> tuple[np.ndarray, float]:
        for old in folder.glob("journal*"):
            old.unlink()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        report = json.loads((folder / "submission.csv.report.json").read_text())
        Path(job.options["report"]).write_text(json.dumps(report))
        answers = pd.read_csv(output).iloc[:, 1:].to_numpy()
        copies = answers.reshape(COPIES, -1, answers.shape[1])
        rounds = any(flag in job.options["flags"] for flag in ROUNDING)
        if not rounds and np.ptp(copies, axis=0).max() > TOLERANCE:
            sys.exit("Copies of the same row were answered differently.")
        trace = json.loads((folder / "submission.csv.trace.json").read_text())
        return copies[0], steady_seconds(trace["traceEvents"], cost) / COPIES

    config = json.loads(Path(job.preset, "config.json").read_text())
    cost = model_shape(config["class_name"], config["config"]).batch_flops
    return predict


def steady_seconds(events: list[dict[str, Any]], cost: Callable[[BatchShape], float]) -> float:
    """Return the seconds that all batches take at the pace after the last shape was ready, NaN
    where too little was left by then.

    Args:
        events: of a trace, as `runner/trace.py` makes it.
    """
    spans = [event for event in events if event["ph"] == "X"]
    answered = [one for one in spans if "batch" in one["args"] and "is_copy" not in one["args"]]
    # The last member of a pipeline answers, those of a tensor group all at once.
    last = {one["pid"]: 0 for one in answered}
    for one in answered:
        last[one["pid"]] = max(last[one["pid"]], one["tid"])
    answered = [one for one in answered if one["tid"] == last[one["pid"]]]
    ready = max(one["ts"] + one["dur"] for one in spans if "from_cache" in one["args"])
    end = max(one["ts"] + one["dur"] for one in answered)
    whole = within = 0.0
    for one in answered:
        flops = cost(BatchShape(one["args"]["padded_rows"], one["args"]["length"]))
        done = (one["ts"] + one["dur"] - max(one["ts"], ready)) / max(one["dur"], 1)
        whole += flops
        within += flops * min(1.0, max(0.0, done))
    if within < LEAST_STEADY * whole:
        return float("nan")
    return (end - ready) / 1e6 * whole / within


def write_copies(source: Path, target: Path) -> None:
    """Write the rows several times over, each copy under an id of its own."""
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    copies = [table.assign(id=table["id"] + f"-{number}") for number in range(COPIES)]
    pd.concat(copies).to_csv(target, index=False)


if __name__ == "__main__":
    serve(load)
