"""Processes that begin with Keras, JAX, Ray and this project imported.

`python run.py` spends seconds of a core on imports before it does anything. `WarmPython` pays them
once: `python -m tests.support.warm` imports all of it, starts no thread and no JAX backend, and
forks a child for each command that it is asked to run. A child is a process of its own, with its
own environment, streams, folder, signals and exit code; what it shares is what it imported.

Ray's workers of such a command begin in the same way: instead of Python, Ray starts
`warm_worker.py`, which asks this server for a child and lives as long as it does.

Settings that a library reads while it is imported must not differ between children: a command that
sets one (see `NEEDS_COLD`) is to be started cold.
"""

import array
import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# A command whose environment names one of these starts cold: libraries read them on import.
NEEDS_COLD = ("JAX_", "KERAS_", "PYTHON", "RAY_", "TF_", "MPL")
STARTS_WITHIN_S = 300.0
MOST_REQUEST_BYTES = 1 << 18
# Words of a command line that needs no Ray.
WITHOUT_RAY = frozenset(("single", "--plan", "--help", "--version", "prepare"))
# In a child's environment: the socket at which `warm_worker.py` asks for children.
WORKERS_AT = "ARENA_TEST_WORKERS_AT"


# In a child's environment: what all processes of one run have in common, for `WarmPython.find`.
MARK = "ARENA_TEST_MARK"


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

    def close(self) -> None:
        """Let go of what is held of the process, which may still run."""
        for end in (self._status, self.stdout, self.stderr):
            if end is not None:
                end.close()

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
    """The server, started when the first command is; one for each process of tests.

    Args:
        tensorflow: imports what a plain Keras program does, TensorFlow too, and nothing of ours.
    """

    def __init__(self, *, tensorflow: bool = False) -> None:
        self._imports = "tensorflow" if tensorflow else "commands"
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        # A socket's path must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="arena-warm-", dir="/tmp")
        self._workers_at = f"{self._folder.name}/workers"

    @staticmethod
    def can_run(extra: dict[str, str]) -> bool:
        """Whether a child with these settings of its own is what a cold start would be."""
        return not any(name.startswith(NEEDS_COLD) for name in extra)

    def find(self, mark: str) -> list[int]:
        """Return the pids of all children, ended ones too, whose environment has this mark."""
        found = Path(self._folder.name).glob(f"{mark}.*")
        return [int(path.suffix[1:]) for path in found]

    def start(
        self,
        argv: Sequence[str],
        env: dict[str, str],
        *,
        cwd: Path | None = None,
        script: Path | None = None,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        warm_workers: bool = True,
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
            "env": env | ({WORKERS_AT: self._workers_at} if warm_workers else {}),
            "cwd": str(cwd or Path.cwd()),
            "is_worker": False,
        }
        pipes: dict[str, IO[str]] = {}
        given, opened = [], []
        for name, target in (("stdout", stdout), ("stderr", stderr)):
            if target == subprocess.PIPE:
                reader, writer = os.pipe()
                pipes[name] = open(reader, encoding="utf-8", errors="replace")  # noqa: SIM115 - the process closes it
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
        return subprocess.CompletedProcess(process.args, process.returncode, out or "", err or "")

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            self._server.wait(timeout=60)
        self._folder.cleanup()

    def _start_server(self, env: dict[str, str]) -> None:
        if self._server is not None and self._server.poll() is None:
            return
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.support.warm",
                    str(its.fileno()),
                    self._workers_at,
                    self._imports,
                ],
                cwd=ROOT,
                env=env | {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"},
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
            )


def import_all(what: str) -> None:
    """Import what plain Keras programs do, or what commands and workers do: without TensorFlow.

    Ray is left to the children, but for the libraries that it imports: it takes settings such as a
    worker's job from the environment of the process that loads it.
    """
    if what == "tensorflow":
        importlib.import_module("keras_hub")
        importlib.import_module("tensorflow_text")
        return
    for module in ("tensorflow", "tensorflow_text"):
        sys.modules[module] = None  # type: ignore[assignment]
    for module in (
        *("jax.numpy", "keras_hub", "matplotlib.pyplot", "matplotlib.backends.backend_svg"),
        *("google.protobuf.descriptor_pb2", "jsonschema", "msgpack", "psutil", "yaml"),
        *(
            "runner.cli",
            "runner.demo",
            "runner.driver.run",
            "runner.planner.command",
            "runner.prepare",
        ),
        *(
            "runner.report.page",
            "runner.executors.single",
            "runner.model.worker",
            "runner.model.attention",
        ),
        *(
            "runner.model.loading",
            "runner.model.predictor",
            "runner.model.quantization",
            "runner.model.cpu_rewrites",
        ),
    ):
        importlib.import_module(module)
    _draw_once()
    assert "ray" not in sys.modules


def _draw_once() -> None:
    """Draw a chart: matplotlib's first takes half a second more, for its fonts and styles."""
    from runner.report.canvas import draw

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], label="a line")
        axes.legend()

    draw("warm", "", 2.0, paint)


class Server:
    """Forks a child for each request until the other end of `control` is closed.

    Args:
        control: where `WarmPython` asks; each request brings a socket for its answers.
        workers: where `warm_worker.py` asks; its own connection is that socket, and its end is
            the end of the child.
    """

    def __init__(self, control: socket.socket, workers: socket.socket) -> None:
        self._control, self._workers = control, workers
        self._running: dict[int, socket.socket] = {}
        self._clients: dict[socket.socket, int] = {}
        self._woken, self._wake = os.pipe()

    def serve(self) -> bool:
        """Return True in a child that is to run a request, False in the server at its end."""
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Ctrl-C at a terminal is for the tests, which end this process by closing the socket.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            waited = [self._control, self._workers, self._woken, *self._clients]
            ready, _, _ = select.select(waited, [], [])
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                self._reap()
            for client in [client for client in self._clients if client in ready]:
                self._end(client)
            if self._workers in ready:
                client, _ = self._workers.accept()
                message, rights, _, _ = socket.recv_fds(client, MOST_REQUEST_BYTES, 2)
                if message and self._fork(message, rights, client):
                    return True
            if self._control in ready:
                message, rights, _, _ = socket.recv_fds(self._control, MOST_REQUEST_BYTES, 3)
                if not message:
                    break
                if self._fork(message, rights[:2], socket.socket(fileno=rights[2])):
                    return True
        for pid in self._running:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return False

    def _fork(self, message: bytes, streams: Sequence[int], answers: socket.socket) -> bool:
        """Fork; return whether this is the child, which is what its request asks for then."""
        request = json.loads(message)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            for one in (self._control, self._workers, answers, *self._running.values()):
                one.close()
            os.close(self._woken)
            os.close(self._wake)
            _become(request, *streams)
            return True
        for stream in streams:
            os.close(stream)
        self._running[pid] = answers
        if request["is_worker"]:
            self._clients[answers] = pid
        with contextlib.suppress(OSError):
            answers.sendall(f"{pid}\n".encode())
        return False

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self._running.pop(pid) as answers, contextlib.suppress(OSError):
                self._clients.pop(answers, None)
                answers.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def _end(self, client: socket.socket) -> None:
        """Kill a worker whose `warm_worker.py` has ended: it says nothing after its request."""
        with contextlib.suppress(OSError):
            os.kill(self._clients.pop(client), signal.SIGKILL)


_request: dict[str, Any] = {}


def _become(request: dict[str, Any], out: int, err: int) -> None:
    """Make this child what the command's process would be."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, place in ((out, 1), (err, 2)):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    if MARK in os.environ and WORKERS_AT in os.environ:
        # What the kernel shows of this process' environment is the server's.
        Path(os.environ[WORKERS_AT]).with_name(f"{os.environ[MARK]}.{os.getpid()}").touch()
    _request.update(request)


def run_child() -> None:
    """Run what the child was forked for, and leave as a script would."""
    script, is_worker = _request["script"], _request["is_worker"]
    sys.argv = [script or str(ROOT / "run.py"), *_request["argv"]]
    if not is_worker and WORKERS_AT in os.environ and not WITHOUT_RAY.intersection(sys.argv):
        _start_workers_warm()
    if script is None:
        from runner.cli import main

        sys.exit(main())
    import runpy

    runpy.run_path(script, run_name="__main__")


def _start_workers_warm() -> None:
    """Make the Ray of this process start `warm_worker.py` where it would start Python."""
    from ray._private import services

    start_process = services.start_ray_process
    shim = f"{sys.executable} -I -S {ROOT / 'tests' / 'support' / 'warm_worker.py'}"

    def start(command: list[str], *rest: Any, **options: Any) -> Any:
        command = [
            # PYTHON SETUP_WORKER.py default_worker.py --flags
            re.sub(r"^(--python_worker_command=)\S+ \S+", rf"\1{shim}", part)
            for part in command
        ]
        return start_process(command, *rest, **options)

    services.start_ray_process = start


def main(control: socket.socket, path: str, imports: str) -> None:
    import_all(imports)
    import gc

    gc.freeze()  # children copy no page for a collection
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as workers:
        workers.bind(path)
        workers.listen(64)
        if not Server(control, workers).serve():
            return
    run_child()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:])
