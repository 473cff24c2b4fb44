"""Is anything lost if workers, Ray and the driver are killed at random, again and again?

Runs the 905 rows once without faults, in one process: the reference. Then starts the same job
repeatedly, each time in a random mode, and strikes it every few seconds: it kills or stops workers
and members of groups, kills Ray's own processes, and kills, interrupts or terminates the driver. A
run that ends early is followed by one with `--resume auto`, until the submission is complete; then
the next job begins with an empty journal.

After every run, all its processes must be gone within 30 s, its exit code must match what was done
to it, its message must say how to resume, and the journal must be readable and still hold every row
it had. At the end of every job, the submission must have each id once and the reference's
probabilities. The last line is one JSON object. The exit code is 1 if anything was violated.

    python benchmarks/soak.py                       # at most 15 minutes
    python benchmarks/soak.py --seed 7 --minutes 3 --pace 1.5
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # started by its path, as above

from runner.config.task import CONTEST  # noqa: E402
from runner.demo import ensure_demo, make_rows, write_test_set  # noqa: E402
from runner.model.injected_faults import VARIABLE  # noqa: E402
from runner.telemetry.progress import Progress  # noqa: E402

REAL_ROWS = ROOT.parent / "shared" / "data" / "arena_dev.csv"
ROWS = 905
TOLERANCE = 1e-5
MARK = "ARENA_SOAK_MARK"
MODES = {
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline"),
    "tensor": ("--mode", "model-parallel", "--strategy", "tensor"),
    "single": ("--mode", "single"),
}
# What is done to a run, and how often in a hundred times.
BLOWS = {
    "worker killed": 64,
    "two workers killed": 8,
    "worker stopped": 5,
    "raylet killed": 2,
    "gcs_server killed": 1,
    "driver killed": 8,
    "driver interrupted": 4,
    "driver terminated": 3,
    "all terminated": 2,
    "interrupted twice": 3,
}
SIGNALS_TO_THE_DRIVER = {
    "driver killed": signal.SIGKILL,
    "driver interrupted": signal.SIGINT,
    "driver terminated": signal.SIGTERM,
}
# Pauses are longer in `single`, where every blow hits the driver.
SLOWER_IN_SINGLE = 4.0
# Batches sleep until they have taken this many times as long, so that there is time to strike.
SLOW = 4.0
OF_THE_DRIVER = tuple(name for name in BLOWS if "worker" not in name and "server" not in name
                      and "raylet" not in name)  # fmt: skip
GONE_WITHIN_S = 30
# An undisturbed run takes half a minute; a worker stopped at a batch is killed after at most four
# minutes. (At a load or a compile it would have ten and thirty, so workers are not stopped there.)
RUN_WITHIN_S = 330
# Before that, the handlers may not be installed: a signal ends the process, which has done nothing.
PYTHON_STARTS_WITHIN_S = 3
AT_A_BATCH = (".predict", ".begin", ".carry_on", ".finish")
# The most blows to one run, so that some runs complete.
MOST_BLOWS = 9
# Half of the runs are struck from the start, the others when rows arrive or after this time.
ROWS_WITHIN_S = 60
CLASSES = len(CONTEST.label_columns)


class Violation(Exception):
    """Something that must not happen."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill at random, resume, and compare.")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock")
    parser.add_argument("--minutes", type=float, default=9.0, help="until the last blow")
    parser.add_argument("--pace", type=float, default=2.5, help="mean seconds between blows")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--keep", type=Path, help="folder in which to keep the runs' files")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, a blow every {arguments.pace} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, random.Random(arguments.seed), arguments.pace, arguments.modes)
        soak.refer()
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            soak.do_job(end)
        summary = {"benchmark": "soak", "seed": arguments.seed} | soak.summary()
    print(
        f"{summary['kills']} kills and signals in {summary['runs']} runs of {summary['jobs']} jobs:"
        + "".join(f"\n  {count:4} {name}" for name, count in sorted(soak.blows.items())),
        f"rows lost {summary['rows_lost']}, duplicated {summary['rows_duplicated']}, changed by "
        f"more than {TOLERANCE:.0e} {summary['rows_changed']}; largest difference "
        f"{summary['largest_difference']:.1e}",
        *(f"VIOLATION: {what}" for what in soak.violations),
        json.dumps(summary),
        sep="\n",
    )
    sys.exit(1 if soak.violations else 0)


class Soak:
    """The jobs of one soak and their results."""

    def __init__(self, folder: Path, rng: random.Random, pace_s: float, modes: list[str]) -> None:
        self._folder, self._rng, self._pace_s, self._modes = folder, rng, pace_s, modes
        self._cache = folder / "cache"
        self._output = folder / "submission.csv"
        self._journal = folder / "submission.csv.journal"
        self.blows: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.violations: list[str] = []
        self._runs = self._jobs = self._resumed = 0
        self._without_a_word = 0
        self._lost = self._duplicated = self._changed = 0
        self._largest = 0.0
        with Progress() as progress:
            demo = ensure_demo(self._cache / "arena-runner", progress)
        test_set = REAL_ROWS
        if not test_set.is_file():
            test_set = folder / "test.csv"
            write_test_set(test_set, make_rows(ROWS, seed=ROWS))
        self._flags = ["--input", str(test_set), "--pooling", "mean", "--sequence-length", "256"]
        for name, path in demo.model_files.items():
            self._flags += ["--" + name.replace("_", "-"), str(path)]

    def refer(self) -> None:
        """Run without faults: the answers that all other runs must give."""
        output = self._folder / "reference.csv"
        run = Run([*MODES["single"], *self._flags, "--output", str(output)], self._cache)
        code, said = run.finish(RUN_WITHIN_S)
        if code != 0:
            sys.exit(f"The undisturbed run failed: {said}")
        self._ids, self._reference = read_submission(output)
        self._by_row = self._reference.astype(np.float32)

    def do_job(self, end: float) -> None:
        """Start with an empty journal and resume until the submission is complete."""
        for path in self._folder.glob("submission.csv*"):
            if path.is_file():  # else the folder of logs, in which each run cleans up itself
                path.unlink()
        self._rows: dict[int, np.ndarray] = {}
        self._jobs += 1
        stands = False
        while not stands:
            # After the end, the last runs are left alone.
            stands = self.do_run(strike=time.monotonic() < end)
        try:
            self.compare()
        except Violation as violation:
            self._violated(str(violation))

    def do_run(self, *, strike: bool) -> bool:
        """Do one run of a job; return whether the submission is complete."""
        mode = self._rng.choice(self._modes)
        flags = [*MODES[mode], *self._flags, "--output", str(self._output), "--resume", "auto"]
        run = Run(flags, self._cache, slow=SLOW)
        self._runs += 1
        done: list[str] = []
        begun = time.monotonic()
        try:
            left = self._rng.randint(1, MOST_BLOWS) if strike else 0
            if self._rng.random() < 0.5:
                self._wait_for_rows(run)
            while left and run.process.poll() is None:
                pause_s = self._rng.expovariate(1 / self._pace_s)
                pause_s *= SLOWER_IN_SINGLE if mode == "single" else 1.0
                if not run.ends_within(pause_s) and (blow := self._strike(run, mode)):
                    if not done and time.time() < run.started_at + PYTHON_STARTS_WITHIN_S:
                        blow += " early"
                    done.append(blow)
                    left -= 1
            code, said = run.finish(max(1.0, RUN_WITHIN_S - (time.monotonic() - begun)))
            self._check_end(code, said, done)
            run.check_nothing_is_left()
            self._check_journal()
        except Violation as violation:
            self._violated(f"run {self._runs} ({mode}; {', '.join(done) or 'left alone'}): "
                           f"{violation}")  # fmt: skip
            run.end()
            code = run.process.returncode
        self.ends[str(code)] += 1
        print(
            f"run {self._runs:3} of job {self._jobs}: {mode:13} exit {code:4}, "
            f"{len(self._rows):3} rows, {time.monotonic() - begun:5.1f} s: {', '.join(done)}",
            flush=True,
        )
        return code == 0

    def _wait_for_rows(self, run: "Run") -> None:
        """Wait until rows arrive; otherwise most runs would end before they predict."""
        while not run.ends_within(0.2):
            with contextlib.suppress(OSError):
                written_at = self._journal.with_name(self._journal.name + "-wal").stat().st_mtime
                if written_at > run.started_at + 1:
                    return
            if time.time() > run.started_at + ROWS_WITHIN_S:
                return

    def compare(self) -> None:
        """Compare a submission with the reference.

        Raises:
            Violation: rows are lost, repeated or changed.
        """
        ids, values = read_submission(self._output)
        counts = Counter(ids)
        lost = [row_id for row_id in self._ids if not counts[row_id]]
        repeated = [row_id for row_id, count in counts.items() if count > 1]
        self._lost += len(lost)
        self._duplicated += len(repeated)
        if ids != self._ids:
            raise Violation(f"lost: {lost[:5]}; repeated: {repeated[:5]}; or in another order")
        difference = np.abs(values - self._reference).max(axis=1)
        self._largest = max(self._largest, float(difference.max()))
        changed = np.flatnonzero(difference > TOLERANCE)
        self._changed += len(changed)
        report = json.loads(self._output.with_name("submission.csv.report.json").read_text())
        rows = report["rows"]
        self._resumed += rows["resumed"]
        if len(changed):
            raise Violation(f"{len(changed)} rows changed, by {difference.max():.1e} at most: "
                            f"{[ids[row] for row in changed[:5]]}; {report['faults']}")  # fmt: skip
        if rows["resumed"] + rows["predicted"] != rows["total"] or rows["total"] != len(ids):
            raise Violation(f"the report counts {rows}")

    def summary(self) -> dict[str, Any]:
        return {
            "jobs": self._jobs,
            "runs": self._runs,
            "kills": sum(self.blows.values()),
            "blows": dict(self.blows),
            "exit_codes": dict(self.ends),
            "ended_by_ray_without_a_word": self._without_a_word,
            "rows_resumed": self._resumed,
            "rows_lost": self._lost,
            "rows_duplicated": self._duplicated,
            "rows_changed": self._changed,
            "largest_difference": self._largest,
            "violations": self.violations,
        }

    def _violated(self, what: str) -> None:
        self.violations.append(what)
        print(f"VIOLATION: {what}", flush=True)

    def _strike(self, run: "Run", mode: str) -> str | None:
        """Do something bad to a run; return what, or None if it had no such process."""
        names = [name for name in BLOWS if mode != "single" or name in OF_THE_DRIVER]
        blow = self._rng.choices(names, [BLOWS[name] for name in names])[0]
        driver = run.process
        if blow in ("worker killed", "two workers killed", "worker stopped"):
            workers = sorted(run.workers(), key=lambda process: process.pid)
            count = 2 if blow.startswith("two") else 1
            if blow == "worker stopped":
                workers = [one for one in workers if any(map(title_of(one).count, AT_A_BATCH))]
            if len(workers) < count:
                return None
            number = signal.SIGSTOP if blow == "worker stopped" else signal.SIGKILL
            for worker in self._rng.sample(workers, count):
                send(worker.pid, number)
        elif blow in ("raylet killed", "gcs_server killed"):
            servers = run.named(blow.split()[0])
            if not servers:
                return None
            send(servers[0].pid, signal.SIGKILL)
        elif blow in SIGNALS_TO_THE_DRIVER:
            send(driver.pid, SIGNALS_TO_THE_DRIVER[blow])
        elif blow == "all terminated":
            # To each process of the group, as a batch system or a terminal does.
            for process in run.family():
                send(process.pid, signal.SIGTERM)
        else:
            send(driver.pid, signal.SIGINT)
            time.sleep(self._rng.uniform(0, 1))
            send(driver.pid, signal.SIGINT)
        self.blows[blow] += 1
        return blow

    def _check_end(self, code: int, said: str, done: list[str]) -> None:
        """Check exit code and message against what was done to the run.

        Raises:
            Violation: they do not fit.
        """
        if code == 0:
            return
        if not done:
            raise Violation(f"exit code {code} of an undisturbed run: {said[-1500:]}")
        if done[0].endswith(" early") and code in (-signal.SIGTERM, -signal.SIGINT):
            return
        done = [blow.removesuffix(" early") for blow in done]
        if "Traceback" in said:
            raise Violation(f"a traceback: {said[-1500:]}")
        asked = {"driver killed": {-signal.SIGKILL}, "driver interrupted": {130},
                 "driver terminated": {130}, "all terminated": {130, 1},
                 "interrupted twice": {130}}  # fmt: skip
        allowed = set().union(*(asked.get(name, {1}) for name in done))
        if sum(name in ("driver terminated", "all terminated") for name in done) > 1:
            # Ray restores the default SIGTERM handler on its way out: a second SIGTERM ends the
            # process at once, as it should, but by the signal.
            allowed.add(-signal.SIGTERM)
        if code not in allowed:
            raise Violation(f"exit code {code}; allowed are {sorted(allowed)}: {said[-1500:]}")
        if code == 1 and not re.search("the same command (goes on|resumes)|did not start", said):
            # Ray's own code ended the driver: its raylet left, or was gone before Ray had started,
            # or there was no GCS for a minute. No journal was open, or it is intact.
            self._without_a_word += 1
            starting = not re.search("loading|tokenizing|resuming", said)
            struck = {"raylet killed", "gcs_server killed"} & set(done)
            if "all terminated" not in done and not (struck and starting):
                raise Violation(f"nothing says how to resume: {said[-1500:]}")

    def _check_journal(self) -> None:
        """Check the journal against the reference and the rows it had before.

        Raises:
            Violation: it cannot be read, or a row is gone or changed.
        """
        rows = read_journal(self._journal)
        if gone := self._rows.keys() - rows.keys():
            raise Violation(f"{len(gone)} rows are gone from the journal")
        for row, values in rows.items():
            if np.abs(values - self._by_row[row]).max() > TOLERANCE:
                raise Violation(f"row {row} of the journal differs from the reference")
        self._rows = rows


class Run:
    """A run in the background and all its processes, found by a mark in their environment."""

    def __init__(self, flags: list[str], cache: Path, *, slow: float = 1.0) -> None:
        self.mark = uuid.uuid4().hex
        self.started_at = time.time()
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "JAX_", "XLA_"))
        }
        # Not a pipe, which could fill up.
        self._said = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *flags],
            env=environment
            | {"XDG_CACHE_HOME": str(cache), MARK: self.mark}
            | {VARIABLE: json.dumps([{"kind": "slow", "factor": slow}])},
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,
        )

    def family(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def named(self, name: str) -> list[psutil.Process]:
        return [process for process in self.family() if name_of(process) == name]

    def workers(self) -> list[psutil.Process]:
        """Processes of actors; Ray names them after class and method."""
        kinds = ("ray::Replica", "ray::PipelineStage", "ray::TensorMember")
        return [process for process in self.family() if title_of(process).startswith(kinds)]

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """Return the exit code and the text on standard error.

        Raises:
            Violation: the run does not end.
        """
        if not self.ends_within(timeout_s):
            raise Violation(f"it does not end: {self._text()[-1500:]}")
        return self.process.returncode, self._text()

    def check_nothing_is_left(self) -> None:
        """Check that no process is left.

        Raises:
            Violation: some are still there 30 s after the driver's end.
        """
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := self.family():
            if time.monotonic() > deadline:
                raise Violation(f"processes are left: {[title_of(one) for one in left]}")
            time.sleep(0.2)

    def end(self) -> None:
        for process in self.family():
            send(process.pid, signal.SIGKILL)
        self.process.wait()

    def _text(self) -> str:
        self._said.seek(0)
        return self._said.read()


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def read_submission(path: Path) -> tuple[list[str], np.ndarray]:
    """Return its ids and probabilities, (rows, classes)."""
    table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
    return table["id"].tolist(), table.iloc[:, 1:].to_numpy(dtype=float)


def read_journal(path: Path) -> dict[int, np.ndarray]:
    """Return the probabilities of each row of a journal, read from a copy to leave it unchanged.

    Raises:
        Violation: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "journal")
        for suffix in ("", "-wal"):
            file = path.with_name(path.name + suffix)
            if file.is_file():
                shutil.copyfile(file, copy.with_name(copy.name + suffix))
        if not copy.is_file() or not copy.stat().st_size:
            return {}
        try:
            connection = sqlite3.connect(copy)
            try:
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    return {}  # killed before the tables were made
                found = connection.execute("SELECT row, probabilities FROM rows").fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise Violation(f"the journal cannot be read: {error}") from None
    return {row: np.frombuffer(blob, "<f4") for row, blob in found}


if __name__ == "__main__":
    main()
