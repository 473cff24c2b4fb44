"""ARENA_RUNNER_FAULTS -> faults in workers, so that tests can show that a run recovers from them.

Off unless the variable is set. It holds a JSON list of faults, read when a process starts:

    [{"kind": "hang", "rows": [17], "once": "/tmp/x"}, {"kind": "memory", "tokens": 512}]

kind: `hang` (never returns), `kill` (SIGKILL to itself), `error` (an exception), `memory` (JAX's
error if a device is out of memory), `nan` (NaN as answers), `slow` (`factor` times as long, or at
`tokens_per_s`). until: a path; `slow` ends once it exists.
rows, tokens, replica: limit a fault to batches that contain one of `rows`, to batches of more than
`tokens` tokens, to one replica. once: strike a single time; creates this path to remember it. wide:
also strike when rows are computed again in float32.

`patience` is not a fault. A batch may take at most `seconds` longer than its forecast before the
driver treats it as hung, so that tests of hangs are quick.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from sharding.batches import Batch

VARIABLE = "ARENA_RUNNER_FAULTS"


def patience_s() -> float:
    """Return how many seconds a batch may take beyond its forecast; infinite if not set."""
    asked = (fault["seconds"] for fault in _asked_for() if fault["kind"] == "patience")
    return min(map(float, asked), default=float("inf"))


class InjectedFaults:
    """The faults of one worker's process."""

    def __init__(self, replica: int) -> None:
        self._faults = [fault for fault in _asked_for() if fault.get("replica", replica) == replica]
        self._lock = threading.Lock()
        self._free_at = 0.0

    def before(self, batch: Batch) -> None:
        """Inject the faults that strike before a batch is computed.

        Raises:
            RuntimeError: the fault is `error` or `memory`.
        """
        for fault in self._striking(batch, ("hang", "kill", "error", "memory")):
            match fault["kind"]:
                case "hang":
                    time.sleep(1e6)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "memory":
                    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory, on purpose")
                case "error":
                    raise RuntimeError("a fault on purpose")

    def after(
        self, batch: Batch, probabilities: np.ndarray, seconds: float, *, wide: bool = False
    ) -> np.ndarray:
        """Inject the faults that change a batch's answer or time; return the answer.

        Args:
            probabilities: float32 (rows, classes). seconds: how long the batch took.
            wide: whether it was computed again in float32.
        """
        for fault in self._striking(batch, ("nan", "slow")):
            if fault["kind"] == "slow" and not wide:
                if "factor" in fault:
                    time.sleep(seconds * (fault["factor"] - 1))
                else:
                    takes_s = batch.shape.tokens / fault["tokens_per_s"]
                    self._wait_for_device(seconds, takes_s, fault.get("until"))
            elif fault["kind"] == "nan" and (not wide or fault.get("wide")):
                probabilities = probabilities.copy()
                struck = np.isin(batch.rows, fault.get("rows", batch.rows))
                probabilities[struck] = np.nan
        return probabilities

    def _wait_for_device(self, took_s: float, takes_s: float, until: str | None) -> None:
        """Wait until a slower device that takes one batch at a time would have finished it."""
        now = time.monotonic()
        with self._lock:
            self._free_at = done_at = max(self._free_at, now - took_s) + takes_s
        while (left_s := done_at - time.monotonic()) > 0:
            if until is not None and os.path.exists(until):
                break
            time.sleep(left_s if until is None else min(left_s, 0.1))

    def _striking(self, batch: Batch, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            fault
            for fault in self._faults
            if fault["kind"] in kinds
            and ("rows" not in fault or set(fault["rows"]) & set(batch.rows))
            and batch.shape.tokens > fault.get("tokens", 0)
            and self._is_first(fault)
        ]

    def _is_first(self, fault: dict[str, Any]) -> bool:
        if "once" not in fault:
            return True
        try:
            Path(fault["once"]).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _asked_for() -> list[dict[str, Any]]:
    faults: list[dict[str, Any]] = json.loads(os.environ.get(VARIABLE, "[]"))
    return faults
