"""This runner, by its command line: each round is a whole run, from start to submission.

A run starts new workers and predicts while they compile. Rivals stay loaded: they compile, and run
a first batch of each shape, before their first round. So a run gets several copies of the rows, and
its steady state is the time of one copy at the pace of the later batches. All copies must give the
same answers. Options: flags.
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
from runner.preset.families import model_shape
from sharding.batches import BatchShape

COPIES = 4
# Copies of a row may be in batches of different shapes; not checked if the run rounds.
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
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
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
    """Return the seconds that all batches take at the pace of those that nothing held up; NaN if a
    worker had none.

    A batch counts from the answer before it, so it includes dispatch and waiting. Left out are a
    worker's first batch of each shape (XLA prepares a program's parts when it first runs) and those
    during which it compiled. Waiting at the end, while others still work, counts too.

    Args:
        events: the events of a trace, as `runner/report/trace.py` makes it.
    """
    spans = [event for event in events if event["ph"] == "X"]
    compiles = [one for one in spans if "from_cache" in one["args"]]
    answered = [one for one in spans if "batch" in one["args"] and "is_copy" not in one["args"]]
    run_end = max(map(_end, answered))
    whole = pace = 0.0
    for worker in {one["pid"] for one in answered}:
        theirs = [one for one in answered if one["pid"] == worker]
        # The last member of a pipeline answers, those of a tensor group all at once.
        last = max(one["tid"] for one in theirs)
        theirs = sorted((one for one in theirs if one["tid"] == last), key=_end)
        held_up = [(one["ts"], _end(one)) for one in compiles if one["pid"] == worker]
        seen = set[BatchShape]()
        before, flops, took = theirs[0]["ts"], 0.0, run_end - _end(theirs[-1])
        for one in theirs:
            start, end, before = before, _end(one), _end(one)
            shape = BatchShape(one["args"]["padded_rows"], one["args"]["length"])
            whole += cost(shape)
            is_first = shape not in seen
            seen.add(shape)
            if not is_first and not any(a < end and start < b for a, b in held_up):
                flops, took = flops + cost(shape), took + end - start
        if not flops:
            return float("nan")
        pace += flops / took
    return whole / pace / 1e6


def _end(span: dict[str, Any]) -> float:
    return span["ts"] + span["dur"]


def write_copies(source: Path, target: Path) -> None:
    """Write `COPIES` copies of the rows, each with its own ids."""
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    copies = [table.assign(id=table["id"] + f"-{number}") for number in range(COPIES)]
    pd.concat(copies).to_csv(target, index=False)


if __name__ == "__main__":
    serve(load)
