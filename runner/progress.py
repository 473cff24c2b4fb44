"""What a person watches: one line that says what is waited for, then how far the rows are.

On a terminal a tqdm line; elsewhere plain lines. A thread of its own redraws it, so that it
lives while the main thread is inside Ray or JAX.
"""

import os
import sys
import threading
import time
from collections import Counter
from typing import TextIO

from tqdm import tqdm

REDRAW_S = 0.5
# Plain lines: before the first row no silence is longer than this, and after it than that.
PLAIN_WAITING_S = 5.0
PLAIN_RUNNING_S = 30.0
# With more workers than this their states are counted instead of listed.
LISTED_WORKERS = 4


class Progress:
    """A context manager. Every method may be called from any thread."""

    def __init__(self, *, started: float | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._started = time.monotonic() if started is None else started
        self._lock = threading.RLock()
        self._stage = "starting"
        self._states: dict[int, str] = {}
        self._rows = self._rows_before = self._total_rows = 0
        self._tokens = 0
        self._left_s: float | None = None
        self._slack_s: float | None = None
        self._forecast_at = 0.0
        self._first_row_at: float | None = None
        self._is_terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._bar: tqdm | None = None
        self._last_plain = self._started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        if self._is_terminal:
            # A terminal that does not know its width says 0, and tqdm would then draw nothing.
            knows_width = os.get_terminal_size(self._stream.fileno()).columns > 0
            self._bar = tqdm(
                total=1,
                file=self._stream,
                ncols=None if knows_width else 100,
                dynamic_ncols=knows_width,
                bar_format="{desc}",
                leave=False,
            )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._bar is not None:
            self._bar.close()

    def stage(self, text: str) -> None:
        """Say what is waited for."""
        with self._lock:
            self._stage = text

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                self._print(text)

    def set_worker(self, number: int, state: str) -> None:
        with self._lock:
            self._states[number] = state

    def expect(self, *, rows: int, done: int = 0) -> None:
        """Say how many rows there are to predict, and how many are done already."""
        with self._lock:
            self._total_rows, self._rows_before = rows, done

    def advance(self, *, rows: int, tokens: int) -> None:
        """Count a finished batch."""
        with self._lock:
            if self._first_row_at is None:
                # Work done before the clock started would flatter the rate.
                self._first_row_at = time.monotonic()
            else:
                self._tokens += tokens
            self._rows += rows

    def forecast(self, *, left_s: float, slack_s: float | None) -> None:
        """Say how many seconds of work are left, and how much time beyond them, if there is a
        limit."""
        with self._lock:
            self._left_s, self._slack_s = left_s, slack_s
            self._forecast_at = time.monotonic()

    def _keep_drawing(self) -> None:
        while not self._stop.wait(REDRAW_S):
            with self._lock:
                if self._bar is not None:
                    self._draw_bar(self._bar)
                else:
                    silence = time.monotonic() - self._last_plain
                    patience = PLAIN_RUNNING_S if self._rows else PLAIN_WAITING_S
                    if silence >= patience - REDRAW_S:
                        self._draw_plain()

    def _draw_bar(self, bar: tqdm) -> None:
        if self._rows:
            bar.total, bar.n = self._total_rows, self._rows_before + self._rows
            bar.bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows, {desc}"
            bar.set_description_str(f"{self._rates()}; {self._workers()}", refresh=False)
        else:
            text = f"[{_clock(self._elapsed())}] {self._stage}"
            bar.set_description_str(f"{text}; {self._workers()}".rstrip("; "), refresh=False)
        bar.refresh()

    def _draw_plain(self) -> None:
        what = self._stage
        if self._rows:
            what = f"{self._rows_before + self._rows}/{self._total_rows} rows, {self._rates()}"
        self._print(
            f"[{_clock(self._elapsed())}] " + "; ".join(filter(None, [what, self._workers()]))
        )

    def _print(self, text: str) -> None:
        self._last_plain = time.monotonic()
        print(text, file=self._stream, flush=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _rates(self) -> str:
        if self._left_s is None:
            return "time left ?"
        now = time.monotonic()
        said = f"{_clock(self._left_s - (now - self._forecast_at))} left"
        if self._tokens and self._first_row_at is not None:
            said = f"{self._tokens / (now - self._first_row_at):,.0f} tokens/s, {said}"
        if self._slack_s is not None:
            short = self._slack_s < 0
            said += f", {_clock(abs(self._slack_s))} {'too long' if short else 'to spare'}"
        return said

    def _workers(self) -> str:
        states = sorted(self._states.items())
        if not states:
            return ""
        if len(states) <= LISTED_WORKERS:
            return ", ".join(f"w{number} {state}" for number, state in states)
        counts = Counter(state.split()[0] for _, state in states)
        return "workers: " + ", ".join(f"{count} {state}" for state, count in counts.most_common())


def _clock(seconds: float) -> str:
    """73 -> 1:13, 3700 -> 1:01:40."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
