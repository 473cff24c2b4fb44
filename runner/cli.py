"""The command line: flags -> RunConfig -> a run -> an exit code.

Exit codes: 0, --output is a complete, validated submission; 2, bad usage or input, reported in one
or two lines, nothing written; 3, the deadline passed with --on-deadline fail; 130, interrupted,
journal kept; 1, anything else.
"""

import _thread
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from runner.common.errors import (
    BUSY_THREAD,
    EXIT_BAD_INPUT,
    EXIT_DEADLINE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ArenaRunnerError,
    ConfigError,
    DataError,
    DeadlineError,
    first_line,
    on_one_line,
)
from runner.config.parser import parse_arguments, parse_prepare_arguments
from runner.telemetry.logs import DRIVER_LOG, LogEvent

# Seconds until a lost signal is raised again.
AGAIN_AFTER_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: None for the process' own arguments. The process then exits here if a thread would
            keep it from exiting by itself.
    """
    code = _main(argv)
    if argv is None and any(thread.name == BUSY_THREAD for thread in threading.enumerate()):
        # The thread is in native code that nothing can interrupt: exiting would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:  # noqa: PLR0911 - one return per way to end
    started = time.monotonic() - (process_age_s() if argv is None else 0.0)
    interrupts = _Interrupts()
    interrupts.install()
    verbose = False
    arguments = list(sys.argv[1:] if argv is None else argv)
    fail = _Failure(arguments)
    try:
        if arguments[:1] == ["prepare"]:
            from runner.prepare import prepare

            prepare(parse_prepare_arguments(arguments[1:]), started=started)
            return 0
        config = parse_arguments(arguments)
        verbose = config.verbose and config.log_format != "json"
        fail.is_json = config.log_format == "json"
        if config.plan:
            from runner.planner.command import plan

            plan(config, started=started)
            return 0
        from runner.driver.run import run  # takes half a second, which --help should not

        fail.log = config.log_folder / DRIVER_LOG
        run(config, started=started, on_signals_taken=interrupts.install, owns_process=True)
        return 0
    except (ConfigError, DataError) as error:
        return fail(f"error: {on_one_line(error)}", EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        return fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except DeadlineError as error:
        return fail(f"error: {error}", EXIT_DEADLINE)
    except ArenaRunnerError as error:
        if verbose:
            raise
        return fail(f"error: {error}", EXIT_FAILED)
    except Exception as error:
        if verbose:
            raise
        where = f"{fail.log} says" if fail.log and fail.log.is_file() else "--verbose shows"
        return fail(
            f"error: {type(error).__name__}: {first_line(error)}\n"
            f"This is a bug or a machine fault: {where} where it happened.",
            EXIT_FAILED,
        )
    finally:
        interrupts.stop_watching()


def process_age_s() -> float:
    """Return how many seconds this process has been running; 0 if the system does not say."""
    try:
        # Field 22 of proc(5), in ticks since boot; the name before it may contain spaces.
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(stat[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class _Interrupts:
    """SIGINT and SIGTERM: the first unwinds the run, the second ends the process at once.

    Ray and others replace handlers when they start, so `install` is called again after that.
    Python runs a handler only when the main thread leaves native code, where Ray may stay long
    while it shuts down. A thread that reads the wakeup pipe sees the second signal at once.
    """

    def __init__(self) -> None:
        self._interrupted = False
        # Signals received, and how many of them were raised again.
        self._signals = self._again = 0
        self._wakeup: int | None = None

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # called from another program's thread, which handles its own signals
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if self._wakeup is None:
            self._others_hook = sys.unraisablehook
            sys.unraisablehook = self._take_ignored
            reader, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def stop_watching(self) -> None:
        """Restore the wakeup pipe and the hook; the handlers stay."""
        if self._wakeup is not None:
            sys.unraisablehook = self._others_hook
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            self._wakeup = None

    def _watch(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                self._signals += number[0] in (signal.SIGINT, signal.SIGTERM)
                if self._signals - self._again > 1:
                    os._exit(EXIT_INTERRUPTED)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(EXIT_INTERRUPTED)
        self._interrupted = True
        raise KeyboardInterrupt

    def _take_ignored(self, ignored: "sys.UnraisableHookArgs") -> None:
        """Raise a signal again a moment later if it arrived in a destructor or in JAX's garbage
        collection callback, which drop exceptions."""
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            self._others_hook(ignored)
            return
        self._interrupted = False
        self._again += 1
        again = threading.Timer(AGAIN_AFTER_S, _thread.interrupt_main)
        again.daemon = True
        again.start()


class _Failure:
    """Prints why the command failed, as text or JSON, and returns its exit code.

    Attributes:
        is_json: taken from the arguments until there is a config.
        log: path of the run's log, once there is a config.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        named = ("--log-format", "json") in pairwise(arguments)
        self.is_json = named or "--log-format=json" in arguments
        self.log: Path | None = None

    def __call__(self, message: str, code: int) -> int:
        if self.is_json:
            error = sys.exception()
            facts: dict[str, Any] = {"exit_code": code, "error": type(error).__name__}
            if code == EXIT_FAILED and error is not None:
                facts["traceback"] = traceback.format_exception(error)
            event = LogEvent("end", message.removeprefix("error: "), "error", facts)
            message = event.as_json()
        print(message, file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
