"""A moment and what to do then -> done, though the main thread is inside something that does not
return.

Starting Ray or a device, a hung disk or driver: none of them looks at a clock. Does not know what
is done, nor what a run is.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from runner.common.errors import EXIT_FAILED, first_line


class Guard:
    """A context manager: within, at a moment, `act` is called in a thread of its own and the
    process ends with the exit code it returns, unless the guard has been called off before.

    Args:
        at: by `time.monotonic()`, None for never.
        act: what the main thread did not come to. Whatever it needs must be there by then.
    """

    def __init__(self, at: float | None, act: Callable[[], int]) -> None:
        self._at = at
        self._act = act
        self._lock = threading.Lock()
        self._is_off = threading.Event()
        self._acts = False

    def __enter__(self) -> "Guard":
        if self._at is not None:
            threading.Thread(target=self._watch, daemon=True, name="guard").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.call_off()

    def call_off(self) -> None:
        """Go on without the guard. If it acts already, this does not return: the process ends."""
        with self._lock:
            self._is_off.set()
        self._stop_if_it_acts()

    def postpone(self, at: float | None) -> None:
        """Let it act at another moment, no earlier than before."""
        with self._lock:
            self._at = at
        self._stop_if_it_acts()

    def _stop_if_it_acts(self) -> None:
        while self._acts:
            time.sleep(1)

    def _watch(self) -> None:
        while self._at is not None:
            if self._is_off.wait(max(0.0, self._at - time.monotonic())):
                return
            with self._lock:
                if self._is_off.is_set():
                    return
                self._acts = self._at is not None and time.monotonic() >= self._at
            if self._acts:
                break
        else:
            return
        code = EXIT_FAILED
        try:
            code = self._act()
        except Exception as error:
            print(f"error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
