"""This runner, by its command line: each round is a run of its own, from start to submission.

Its steady state is the report's `seconds.predict`, from the first batch to the last result.
Options: flags.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.rivals.protocol import Job, Round, serve

RUN = Path(__file__).resolve().parent.parent.parent / "run.py"


def load(job: Job) -> Round:
    values = job.options["job"]
    folder = Path(tempfile.mkdtemp(prefix="arena-runner-bench-"))
    output = folder / "submission.csv"
    head = ("--head-kernel", values["head_kernel"], "--head-bias", values["head_bias"])
    command = [
        *(sys.executable, str(RUN), "--preset", job.preset, "--lora-weights", job.lora_weights),
        *(*head, "--input", values["test_set"], "--output", str(output)),
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
        return pd.read_csv(output).iloc[:, 1:].to_numpy(), report["seconds"]["predict"]

    return predict


if __name__ == "__main__":
    serve(load)
