"""This runner, by its command line: each round is a run of its own, from start to submission.

A run starts its workers anew, and until the last of them has every shape compiled the first work
alone. Rivals that stay loaded pay for that once, before the first round. So a run gets the rows
several times over, and its steady state is the report's `seconds.predict`, from the first batch to
the last result, over the number of copies: what is left of the start in it is a quarter.
All copies must give the same answers. Options: flags.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.rivals.protocol import Job, Round, serve

COPIES = 4
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
        return copies[0], report["seconds"]["predict"] / COPIES

    return predict


def write_copies(source: Path, target: Path) -> None:
    """Write the rows several times over, each copy under an id of its own."""
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    copies = [table.assign(id=table["id"] + f"-{number}") for number in range(COPIES)]
    pd.concat(copies).to_csv(target, index=False)


if __name__ == "__main__":
    serve(load)
