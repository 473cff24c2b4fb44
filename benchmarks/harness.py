"""Starts contenders as processes, checks them against the reference, and times them in turn.

Does not know what a contender computes: `rivals/` does.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
# Seconds between looks at a contender's memory.
LOOK_S = 0.2
# Which worker compiles what is random: a round may leave one without a batch that counts.
TRIES = 3


@dataclass(frozen=True)
class Contender:
    """rival: a module of `rivals/`. tolerance: largest allowed difference in a probability. cores:
    the ones it may use; None for all."""

    name: str
    rival: str
    options: dict[str, Any]
    pooling: str
    tolerance: float = 1e-5
    cores: tuple[int, ...] | None = None


@dataclass
class Measured:
    """The times of a contender, round by round."""

    load_s: float = 0.0
    compile_s: float | None = None
    difference: float = float("nan")
    steady_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    report: dict[str, Any] | None = None


class Running:
    """A contender's process, which waits while others take their turn."""

    def __init__(self, contender: Contender, job: dict[str, Any], folder: Path) -> None:
        self.contender, self.measured = contender, Measured()
        self._answers = folder / f"{contender.name}.npy".replace(" ", "-").replace("/", "-")
        self._report = self._answers.with_suffix(".json")
        job = job | {"pooling": contender.pooling}
        values = job | {"options": contender.options | {"job": job, "report": str(self._report)}}
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        }
        environment |= {
            "KERAS_BACKEND": "jax",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        threads = len(contender.cores) if contender.cores else os.cpu_count()
        environment |= {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", f"benchmarks.rivals.{contender.rival}", json.dumps(values)]
        if contender.cores:
            command = ["taskset", "-c", ",".join(map(str, contender.cores)), *command]
            environment["NPROC"] = str(len(contender.cores))
        self._log = self._answers.with_suffix(".log")
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        with self._memory_watched():
            self.measured.load_s = self._next()["load_s"]

    def predict(self) -> tuple[np.ndarray, dict[str, float]]:
        """Do one round; return probabilities (rows, classes) and the round's seconds."""
        assert self._process.stdin is not None, "this is a bug: the process has no pipe"
        self._process.stdin.write(f"{self._answers}\n")
        self._process.stdin.flush()
        seconds = self._next()
        if self._report.is_file():
            self.measured.report = json.loads(self._report.read_text())
        return np.load(self._answers), seconds

    def check(self, expected: np.ndarray) -> None:
        """Warm up; end the benchmark if the answers differ from the reference."""
        with self._memory_watched():
            answers, _ = self.predict()
        self.measured.difference = float(np.abs(answers - expected).max())
        if self.measured.report is not None:
            self.measured.compile_s = self.measured.report["seconds"]["compile"]
        name, tolerance = self.contender.name, self.contender.tolerance
        print(
            f"outputs: {name}: {self.measured.difference:.1e} from the reference at most "
            f"(tolerance {tolerance:.0e})",
            flush=True,
        )
        if not self.measured.difference <= tolerance:
            sys.exit(f"{name} gives different answers, so no speed is reported.")

    def time(self) -> None:
        """Do one round that counts; try again if there were too few batches to tell the pace."""
        for _ in range(TRIES):
            _, seconds = self.predict()
            if not isnan(seconds["steady_s"]):
                break
        else:
            sys.exit(f"{self.contender.name} compiled for most of its time: use more --rows.")
        self.measured.steady_s.append(seconds["steady_s"])
        self.measured.total_s.append(seconds["total_s"])

    def stop(self) -> None:
        for process in [*psutil.Process(self._process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()

    def _next(self) -> dict[str, float]:
        assert self._process.stdout is not None, "this is a bug: the process has no pipe"
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.contender.name} ended: {self._log.read_text()[-2000:]}")
        return json.loads(line)

    @contextlib.contextmanager
    def _memory_watched(self) -> Iterator[None]:
        """Record the peak memory of all its processes.

        Not used in a round that counts: with Ray, each look takes 50 ms of a core.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.wait(LOOK_S):
                held = memory_of_tree(self._process.pid)
                self.measured.peak_bytes = max(self.measured.peak_bytes, held)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def memory_of_tree(pid: int) -> int:
    """Return the proportional set size of a process and its descendants, in bytes; a page that they
    share counts once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error, AttributeError):
                total += process.memory_full_info().pss
    return total


def matmul_peaks(cores: tuple[int, ...]) -> dict[str, float]:
    """Return the FLOP/s of the fastest large float32 matmul on these cores, by library."""
    peaks = {}
    for library in ("jax", "numpy", "torch"):
        command = [
            *("taskset", "-c", ",".join(map(str, cores)), sys.executable, "-c"),
            f"from benchmarks.harness import measure_peak; print(measure_peak({library!r}))",
        ]
        threads = str(len(cores))
        names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            peaks[library] = float(done.stdout.split()[-1])
    return peaks


def measure_peak(library: str, size: int = 2048, seconds: float = 4.0) -> float:
    """Return the FLOP/s of the fastest square float32 matmul in `seconds` of trying."""
    values = np.full((size, size), 1 / size, np.float32)
    if library == "jax":
        import jax

        array, function = jax.device_put(values), jax.jit(jax.numpy.matmul)

        def multiply() -> Any:
            return function(array, array).block_until_ready()
    elif library == "torch":
        import torch

        tensor = torch.from_numpy(values)

        def multiply() -> Any:
            return tensor @ tensor
    else:

        def multiply() -> Any:
            return values @ values

    multiply()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as long theirs took: the median over alternating rounds."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))
