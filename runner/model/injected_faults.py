"""Faults on purpose, so that tests can see them survived. Off unless ARENA_RUNNER_FAULTS is set.

The variable holds a JSON list of faults, read where a process starts, such as

    [{"kind": "hang", "rows": [17], "once": "/tmp/x"}, {"kind": "memory", "tokens": 512}]

kind: `hang` (never returns), `kill` (SIGKILL to itself), `error` (an exception), `memory` (what JAX
raises where a device has no room), `nan` (answers that are no numbers), `slow` (`factor` times as
long, or as a device would that computes `tokens_per_s`). A fault strikes batches that hold one of
`rows`, or of more than `tokens` tokens, or all; of all replicas, or of `replica`. `once`: a path
that is made when it strikes, and spares what follows. `wide`: strikes the float32 repetition too.

`patience` is no fault: a batch is taken to hang that takes `seconds` more than it should, where the
driver would wait longer, so that a test of a hang need not.
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
    """Return the most seconds that a batch may take beyond its forecast, infinite where there is no
    `patience`."""
    asked = (fault["seconds"] for fault in _asked_for() if fault["kind"] == "patience")
    return min(map(float, asked), default=float("inf"))


class InjectedFaults:
    """The faults of one worker's process."""

    def __init__(self, replica: int) -> None:
        self._faults = [fault for fault in _asked_for() if fault.get("replica", replica) == replica]
        self._lock = threading.Lock()
        self._free_at = 0.0

    def before(self, batch: Batch) -> None:
        """Strike before a batch is computed."""
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
        """Strike what a batch came to, float32 (rows, classes), or how long it took."""
        for fault in self._striking(batch, ("nan", "slow")):
            if fault["kind"] == "slow" and not wide:
                if "factor" in fault:
                    time.sleep(seconds * (fault["factor"] - 1))
                else:
                    self._wait_for_device(seconds, batch.shape.tokens / fault["tokens_per_s"])
            elif fault["kind"] == "nan" and (not wide or fault.get("wide")):
                probabilities = probabilities.copy()
                struck = np.isin(batch.rows, fault.get("rows", batch.rows))
                probabilities[struck] = np.nan
        return probabilities

    def _wait_for_device(self, took_s: float, takes_s: float) -> None:
        """Wait until a device that computes one batch at a time would be done with this one."""
        now = time.monotonic()
        with self._lock:
            self._free_at = done_at = max(self._free_at, now - took_s) + takes_s
        time.sleep(max(0.0, done_at - now))

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
