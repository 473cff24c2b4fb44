"""Events and output of a run's processes -> lines of text or JSON, in one folder of logs.

The folder, which only its owner can read:

    driver.log        the run's messages with times, and the traceback of a failure
    driver.err        what libraries wrote to the driver's standard error and output
    worker-R-M.log    the output of all processes of member M of replica R
    ray/              the logs of Ray's own processes, if the run failed
    previous/         the same files of the previous run

A file that exceeds `MOST_BYTES` is copied to NAME.1 and truncated. Texts of rows are never logged.
Does not know rows, Ray or JAX. Workers import it, so it imports only the standard library and
`common/errors.py`.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from runner.common.errors import ArenaRunnerError, ConfigError, DataError, on_one_line

DRIVER_LOG, DRIVER_ERRORS, RAY_FOLDER, PREVIOUS = "driver.log", "driver.err", "ray", "previous"
MOST_BYTES = 4 << 20
# The most bytes to keep from the end of each log of Ray's processes, and the most logs to keep.
MOST_RAY_BYTES, MOST_RAY_FILES = 256 << 10, 40
# Seconds between checks for new output.
LOOK_S = 0.3
STDOUT, STDERR = 1, 2


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One message of a run.

    event: its kind, one word. level: info, warning or error. fields: facts for programs; a text log
    shows only the lines of `traceback`. time: seconds since the epoch.
    """

    event: str
    message: str
    level: str = "info"
    fields: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def as_json(self) -> str:
        """Return one line: time, level, event, message, then the fields."""
        named = {"time": _iso(self.time), "level": self.level, "event": self.event}
        return json.dumps({**named, "message": self.message, **self.fields}, default=str)

    def as_text(self) -> str:
        """Return the line for driver.log."""
        line = f"{_iso(self.time)} {self.level:7} {self.event:8} {on_one_line(self.message)}"
        trace = self.fields.get("traceback", "")
        return "\n    ".join([line, *trace.splitlines()])


def _iso(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RunLogs:
    """The log folder of a run, and what it echoes to the terminal. A context manager.

    Args:
        takes_streams: whether the process belongs to the command. If so, what libraries write to
            standard error and output goes to the folder, and is echoed from there.
        workers_too: whether to echo the output of workers.

    Attributes:
        terminal: the stream for the run's own messages.
        folder: None until `open` has made it.
    """

    def __init__(
        self, path: Path, *, takes_streams: bool = False, workers_too: bool = False
    ) -> None:
        self._path = path
        self._takes_streams = takes_streams and _are_real_streams()
        self._workers_too = workers_too
        self._early: list[LogEvent] = []
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._saved: dict[int, int] = {}
        self._seen: dict[str, int] = {}
        self._echo: Callable[[str], None] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.folder: Path | None = None
        self.terminal: TextIO = sys.stderr
        if self._takes_streams:
            self.terminal = open(  # noqa: SIM115
                os.dup(STDERR), "w", buffering=1, encoding=sys.stderr.encoding, errors="replace"
            )

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.release()
        if self._takes_streams:
            self.terminal.close()
        if self.folder is None:
            return
        if isinstance(error, (ConfigError, DataError)):
            self._remove()
            return
        if error is not None:
            said = {"traceback": "".join(traceback.format_exception(error))}
            self.record(LogEvent("end", f"{type(error).__name__}: {error}", "error", said))
        if self._file is not None:
            self._file.close()
        if isinstance(error, ArenaRunnerError):
            error.args = (f"{error}\nLogs: {self.folder / DRIVER_LOG}",)

    def check(self) -> None:
        """Check whether the folder can be created, without creating it.

        Raises:
            ConfigError: it cannot.
        """
        if self._path.is_dir():
            return
        if os.path.lexists(self._path) or not self._path.resolve().parent.is_dir():
            raise ConfigError(
                "--log-dir must name a folder, or a new one in a folder that exists. "
                f"Received: {self._path}"
            )

    def open(self, echo: Callable[[str], None] | None, *, leaves_stdout: bool = False) -> None:
        """Create the folder and start logging, once the user's files have been checked.

        Args:
            echo: shows a line that a library wrote; None to show none of them.
            leaves_stdout: whether standard output stays as it is, for a debugger's prompt.

        Raises:
            ConfigError: it cannot be created.
        """
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            _set_aside(self._path)
            self._file = open(  # noqa: SIM115
                _append_to(self._path / DRIVER_LOG), "w", buffering=1, encoding="utf-8",
                errors="backslashreplace",
            )  # fmt: skip
            errors = _append_to(self._path / DRIVER_ERRORS) if self._takes_streams else None
        except OSError as error:
            raise ConfigError(
                "--log-dir must name a folder that exists or can be created. Received: "
                f"{self._path} ({error.strerror or error})"
            ) from None
        self.folder, self._echo = self._path, echo
        early, self._early = self._early, []
        for event in early:
            self.record(event)
        if errors is not None:
            _flush()
            for number in (STDERR,) if leaves_stdout else (STDOUT, STDERR):
                self._saved[number] = os.dup(number)
                os.dup2(errors, number)
            os.close(errors)
        self._thread = threading.Thread(target=self._keep_looking, daemon=True, name="logs")
        self._thread.start()

    def record(self, event: LogEvent) -> None:
        """Write an event to driver.log once that is open. On a full disk the event is lost."""
        with self._lock:
            if self._file is None:
                if self.folder is None:
                    self._early.append(event)
                return
            try:
                self._file.write(event.as_text() + "\n")
            except (OSError, ValueError):
                self._file = None

    def release(self) -> None:
        """Restore the streams, and echo what was written so far."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
            self._thread = None
        if self._saved:
            _flush()
            for number, saved in self._saved.items():
                os.dup2(saved, number)
                os.close(saved)
            self._saved = {}
            self._look()
            errors = self._path / DRIVER_ERRORS
            with suppress(OSError):
                if not errors.stat().st_size:
                    errors.unlink()

    def _keep_looking(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        """Echo new output, and keep the files small."""
        assert self.folder is not None, "this is a bug: there is no log folder to look at"
        paths = [self.folder / DRIVER_ERRORS]
        with suppress(OSError):  # it was removed while the thread looked
            paths += sorted(self.folder.glob(worker_log("*", "*")))
        for path in paths:
            is_own = path.name == DRIVER_ERRORS
            try:
                if self._echo is not None and (is_own or self._workers_too):
                    self._show(path, "" if is_own else f"({path.stem}) ", self._echo)
                if path.stat().st_size > MOST_BYTES:
                    # Its writers append, so they continue at the new end.
                    shutil.copy2(path, path.with_name(path.name + ".1"))
                    os.truncate(path, 0)
                    self._seen[path.name] = 0
            except OSError:
                continue

    def _show(self, path: Path, name: str, echo: Callable[[str], None]) -> None:
        seen = self._seen.get(path.name, 0)
        with open(path, "rb") as file:
            file.seek(seen)
            new = file.read(MOST_BYTES)
        whole = new if self._stop.is_set() else new[: new.rfind(b"\n") + 1]
        self._seen[path.name] = seen + len(whole)
        for line in whole.decode(errors="replace").splitlines():
            echo(name + line)

    def _remove(self) -> None:
        """Remove the logs of this run, which ended with a user error."""
        assert self.folder is not None, "this is a bug: there is no log folder to remove"
        if self._file is not None:
            self._file.close()
        for path in _files_of_a_run(self.folder):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / RAY_FOLDER, ignore_errors=True)
        with suppress(OSError):  # it has other files, and stays
            self.folder.rmdir()


def worker_log(replica: int | str, member: int | str) -> str:
    """Return the name of a worker's log."""
    return f"worker-{replica}-{member}.log"


def write_to_folder(folder: str | None, replica: int, member: int) -> None:
    """Redirect this worker's standard output and error to its file in the log folder.

    If the folder is not on this machine, the output stays in Ray's own logs.
    """
    if folder is None or not os.path.isdir(folder):
        return
    try:
        descriptor = _append_to(Path(folder, worker_log(replica, member)))
    except OSError:
        return
    _flush()
    for number in (STDOUT, STDERR):
        os.dup2(descriptor, number)
    os.close(descriptor)
    # Ray's own streams may buffer output until the process ends, and a killed process loses it.
    sys.stdout = open(STDOUT, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(STDERR, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    print(f"{_iso(time.time())} worker {replica}, member {member}: process {os.getpid()} starts")


def keep_logs_of_ray(session: Path, folder: Path) -> None:
    """Copy the ends of the latest logs of Ray's own processes into the folder of a failed run.

    Args:
        session: Ray's log folder. folder: the run's log folder.
    """
    written = [path for path in session.glob("*.*") if path.is_file() and path.stat().st_size]
    kept = folder / RAY_FOLDER
    with suppress(OSError):  # it must not hide the error that ended the run
        kept.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(written, key=lambda path: path.stat().st_mtime)[-MOST_RAY_FILES:]:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - MOST_RAY_BYTES))
                (kept / path.name).write_bytes(file.read())
            (kept / path.name).chmod(0o600)


def _append_to(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


def _set_aside(folder: Path) -> None:
    """Move the files of the previous run to `PREVIOUS`, replacing those of the one before."""
    found, previous = _files_of_a_run(folder), folder / PREVIOUS
    shutil.rmtree(previous, ignore_errors=True)
    if not found:
        return
    previous.mkdir(mode=0o700)
    for path in (*found, folder / RAY_FOLDER):
        if path.exists():
            path.rename(previous / path.name)


def _files_of_a_run(folder: Path) -> list[Path]:
    """Return the log files in a folder, and no others."""
    names = (DRIVER_LOG, DRIVER_ERRORS, worker_log("*", "*"))
    return sorted(path for name in names for path in folder.glob(f"{name}*"))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _are_real_streams() -> bool:
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (STDOUT, STDERR)
    except (AttributeError, OSError, ValueError):
        return False
