"""A contender as a process: it loads once, then predicts whenever it is told to.

The argument is a JSON object with the job. A line on standard input starts a round; a JSON line on
standard output ends it. So contenders can alternate, and loading and compiling are timed separately
from predicting. Rivals share this file and `tokens.py`, but nothing with the runner.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Returns probabilities (rows, classes) and the seconds of the steady state; None if that is all.
Round = Callable[[], tuple[np.ndarray, float | None]]


class Job:
    """What to compute: the same files for every contender, and the contender's own options."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.preset = values["preset"]
        self.lora_weights = values["lora_weights"]
        self.length = int(values["length"])
        self.pooling = values["pooling"]
        self.options: dict[str, Any] = values["options"]
        tokens = np.load(values["tokens"])
        # int32 (rows, length), padded; int32 (rows,).
        self.tokens, self.lengths = tokens["tokens"], tokens["lengths"]
        self.head = np.load(values["head_kernel"]), np.load(values["head_bias"])

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.length) < self.lengths[:, None]


def serve(load: Callable[[Job], Round]) -> None:
    """Load, report it, and predict once for each line on standard input."""
    # What libraries print must not come between the lines of the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(json.loads(sys.argv[1]))
    started = time.perf_counter()
    round_ = load(job)
    load_s = time.perf_counter() - started
    print(json.dumps({"load_s": load_s}), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        probabilities, steady_s = round_()
        total_s = time.perf_counter() - started
        np.save(Path(line.strip()), probabilities)
        message = {"steady_s": steady_s or total_s, "total_s": total_s}
        print(json.dumps(message), file=answers, flush=True)
