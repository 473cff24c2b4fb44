"""Processes that begin with Keras, JAX, Ray and this project imported.

`python run.py` spends seconds of a core on imports before it does anything. `WarmPython` pays them
once: `python -m tests.warm` imports all of it, starts no thread and no JAX backend, and forks a
child for each command that it is asked to run. A child is a process of its own, with its own
environment, streams, folder, signals and exit code; what it shares is what it imported.

Settings that a library reads while it is imported must not differ between children: a command that
sets one (see `NEEDS_COLD`) is to be started cold.
"""

import array
import contextlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
# A command whose environment names one of these starts cold: libraries read them on import.
NEEDS_COLD = ("JAX_", "KERAS_", "PYTHON", "RAY_", "TF_", "MPL")
STARTS_WITHIN_S = 300.0
MOST_REQUEST_BYTES = 1 << 18
POLL_S = 0.02


class WarmProcess:
    """A child of the server, as `subprocess.Popen` shows it."""

    def __init__(self, status: socket.socket, args: Sequence[str]) -> None:
        self.args = args
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        self._status, self._pending = status, b""
        self.pid = int(self._line(STARTS_WITHIN_S))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read_status(STARTS_WITHIN_S)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._read_status(STARTS_WITHIN_S)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Read both streams to their end; those that were piped."""
        said: dict[str, str] = {}

        def read(name: str, stream: IO[str]) -> None:
            with contextlib.suppress(ValueError):
                said[name] = stream.read()

        streams = {"stdout": self.stdout, "stderr": self.stderr}
        threads = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in streams.items()
            if stream is not None and not stream.closed
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            # Others may hold the pipe: what a killed driver has started ends a moment later.
            thread.join(timeout)
        for stream in streams.values():
            if stream is not None and not any(thread.is_alive() for thread in threads):
                stream.close()
        return said.get("stdout"), said.get("stderr")

    def _read_status(self, timeout: float) -> None:
        self.returncode = int(self._line(timeout))
        self._status.close()

    def _line(self, timeout: float) -> str:
        end = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = max(0.0, end - time.monotonic())
            assert select.select([self._status], [], [], left)[0], "the warm Python does not answer"
            piece = self._status.recv(4096)
            assert piece, "the warm Python ended"
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()


class WarmPython:
    """The server, started when the first command is; one for each process of tests."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @staticmethod
    def can_run(env: dict[str, str]) -> bool:
        """Whether a child with this environment is what a cold start would be."""
        return not any(name.startswith(NEEDS_COLD) for name in env)

    def start(
        self,
        argv: Sequence[str],
        env: dict[str, str],
        *,
        cwd: Path | None = None,
        script: Path | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> WarmProcess:
        """Run `python run.py ARGV`, or `python SCRIPT ARGV`, in a child and a session of its own.

        Args:
            stdout, stderr: PIPE, or a file or descriptor that the child writes to.
        """
        self._start_server(env)
        assert self._control is not None
        mine, its = socket.socketpair()
        request = {
            "argv": [str(part) for part in argv],
            "script": str(script) if script else None,
            "env": env,
            "cwd": str(cwd or Path.cwd()),
        }
        pipes: dict[str, IO[str]] = {}
        given, opened = [], []
        for name, target in (("stdout", stdout), ("stderr", stderr)):
            if target == subprocess.PIPE:
                reader, writer = os.pipe()
                pipes[name] = io.open(reader, encoding="utf-8", errors="replace")
                opened.append(writer)
                given.append(writer)
            else:
                assert target is not None
                given.append(target if isinstance(target, int) else target.fileno())
        message = json.dumps(request).encode()
        assert len(message) < MOST_REQUEST_BYTES
        fds = array.array("i", [*given, its.fileno()])
        self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        its.close()
        for descriptor in opened:
            os.close(descriptor)
        process = WarmProcess(mine, [sys.executable, "run.py", *request["argv"]])
        process.stdout, process.stderr = pipes.get("stdout"), pipes.get("stderr")
        return process

    def run(
        self, argv: Sequence[str], env: dict[str, str], *, timeout: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as `subprocess.run` does."""
        process = self.start(argv, env, **options)
        try:
            out, err = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode is not None
        return subprocess.CompletedProcess(
            process.args, process.returncode, out or "", err or ""
        )

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            self._server.wait(timeout=60)

    def _start_server(self, env: dict[str, str]) -> None:
        if self._server is not None and self._server.poll() is None:
            return
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(its.fileno())],
                cwd=ROOT,
                env=env | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"},
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
            )


def import_all() -> None:
    """Import what commands import, as a worker does: without TensorFlow."""
    for module in ("tensorflow", "tensorflow_text"):
        sys.modules[module] = None  # type: ignore[assignment]
    import jax.numpy  # noqa: F401
    import keras_hub  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import runner.attention
    import runner.cli
    import runner.demo
    import runner.dispatch
    import runner.loading
    import runner.pipeline
    import runner.planner
    import runner.predictor
    import runner.prepare
    import runner.quantization
    import runner.report_page
    import runner.single  # noqa: F401


def serve(control: socket.socket) -> None:
    """Fork a child for each message until the other end is closed; say how each ended."""
    import_all()
    import gc

    gc.freeze()  # children copy no page for a collection
    own_threads = len(os.listdir("/proc/self/task"))
    if own_threads > 1:
        print(f"warning: the warm Python has {own_threads} threads", file=sys.stderr)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Ctrl-C at a terminal is for the tests, which end this process by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, reader], [], [])
        if reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with running.pop(pid) as waiting, contextlib.suppress(OSError):
                    waiting.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        if control in ready:
            message, rights, _, _ = socket.recv_fds(control, MOST_REQUEST_BYTES, 3)
            if not message:
                break
            out, err, status_fd = rights
            waiting = socket.socket(fileno=status_fd)
            pid = os.fork()
            if not pid:
                _become(json.loads(message), out, err, [control, waiting], [reader, writer])
                return
            for descriptor in (out, err):
                os.close(descriptor)
            running[pid] = waiting
            with contextlib.suppress(OSError):
                waiting.sendall(f"{pid}\n".encode())
    for pid in running:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


_request: dict[str, Any] = {}


def _become(
    request: dict[str, Any],
    out: int,
    err: int,
    sockets: list[socket.socket],
    descriptors: list[int],
) -> None:
    """Make this child what the command's process would be; `serve` returns then."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for one in sockets:
        one.close()
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in (out, err, *descriptors):
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    _request.update(request)


def run_child() -> None:
    """Run what the child was forked for, and leave as a script would."""
    script = _request["script"]
    if script is None:
        from runner.cli import main

        sys.argv = [str(ROOT / "run.py"), *_request["argv"]]
        sys.exit(main())
    import runpy

    sys.argv = [script, *_request["argv"]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    if _request:
        run_child()
