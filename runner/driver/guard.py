"""A time and an action -> the action, even if the main thread is in a call that does not return.

Starting Ray or a device may hang, and so may a disk or a driver. Does not know the action, nor what
a run is.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

from runner.common.errors import EXIT_FAILED, first_line


class Guard:
    """A context manager that calls `act` in a separate thread at a given time, and ends the process
    with the exit code that it returns, unless the guard is called off before.

    Args:
        at: by `time.monotonic()`, None for never.
        act: must not need anything that the main thread has yet to make.
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

    def __exit__(self, *exception: object) -> None:
        self.call_off()

    def call_off(self) -> None:
        """Stop guarding. If the guard already acts, this does not return: the process ends."""
        with self._lock:
            self._is_off.set()
        self._stop_if_it_acts()

    def postpone(self, at: float | None) -> None:
        """Act at another time, which must not be earlier."""
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
