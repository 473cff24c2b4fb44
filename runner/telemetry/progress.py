"""Phases, counts and forecasts of a run -> the status line, and events for the log.

The status line shows the current phase, then the progress of the rows. On a terminal it is a tqdm
line, in a notebook a bar in the cell, elsewhere plain lines or one JSON object a line. A thread
redraws it while the main thread is inside Ray or JAX. Does not know what the phases do.
"""

import html
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm

from runner.common.units import clock
from runner.telemetry.logs import LogEvent

REDRAW_S = 0.5
# A notebook queues each message until its page has drawn it.
NOTEBOOK_REDRAW_S = 1.0
# Seconds between progress lines as JSON, and between those in the log.
JSON_PROGRESS_S, RECORD_PROGRESS_S = 5.0, 30.0
# The longest silence of plain lines, before the first row and after it.
PLAIN_WAITING_S = 5.0
PLAIN_RUNNING_S = 30.0
# The states of more workers than this are counted instead of listed.
LISTED_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of a run. Rates are since the first finished batch; None means not known yet.

    workers: the state of each replica, by its number. left_s: forecast of the remaining work.
    slack_s: time to the limit minus that, negative if the run would end too late.
    """

    phase: str
    workers: dict[int, str]
    elapsed_s: float
    rows_done: int
    rows_total: int
    rows_per_s: float | None
    tokens_per_s: float | None
    left_s: float | None
    slack_s: float | None


class Progress:
    """The status line of a run. A context manager; any thread may call its methods.

    Args:
        started: `time.monotonic()` at the start of the process, None for now.
        stream: None for standard error.
        log_format: text, or json for one object a line and nothing else.
        record: gets every event, and the progress every `RECORD_PROGRESS_S` seconds.
    """

    def __init__(
        self,
        *,
        started: float | None = None,
        stream: TextIO | None = None,
        log_format: str = "text",
        record: Callable[[LogEvent], None] = lambda event: None,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_json = log_format == "json"
        self._record = record
        self._started = time.monotonic() if started is None else started
        self._lock = threading.RLock()
        self._phase = "starting"
        self._states: dict[int, str] = {}
        self._rows = self._rows_before = self._total_rows = 0
        self._tokens = self._timed_rows = 0
        self._left_s: float | None = None
        self._slack_s: float | None = None
        self._forecast_at = 0.0
        self._first_row_at: float | None = None
        is_terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._is_terminal = is_terminal and not self._is_json
        self._bar: tqdm | None = None
        self._cell: _Cell | None = None
        self._last_plain = self._last_recorded = self._started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        if self._is_terminal:
            # A terminal of unknown width reports 0, for which tqdm would draw nothing.
            knows_width = os.get_terminal_size(self._stream.fileno()).columns > 0
            self._bar = tqdm(
                total=1,
                file=self._stream,
                ncols=None if knows_width else 100,
                dynamic_ncols=knows_width,
                bar_format="{desc}",
                leave=False,
            )
        elif self._stream is sys.stderr and not self._is_json and _is_notebook():
            self._cell = _Cell()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._bar is not None:
            self._bar.close()
        elif self._cell is not None:
            self._draw_cell(self._cell)

    def phase(self, text: str) -> None:
        """Show the current phase of the run, such as `planning`."""
        with self._lock:
            # If only the counts in its text change, it is the same phase and not an event.
            is_new = re.sub("[0-9,]+", "", text) != re.sub("[0-9,]+", "", self._phase)
            self._phase = text
            if is_new:
                self._say(LogEvent("stage", text))

    def note(self, text: str, *, event: str = "note", **fields: Any) -> None:
        """Show a message that stays on the screen.

        Args:
            text: a warning begins with `warning: `, an error with `error: `, and a decision about
                the time limit with `deadline: `.
            event: its kind, one word.
            fields: its facts, for programs.
        """
        kind, _, rest = text.partition(": ")
        said, level = (rest, kind) if kind in ("warning", "error") else (text, "info")
        if kind == "deadline":
            said, event = rest, "decision"
        with self._lock:
            if not self._is_json:
                self.show(text)
            self._say(LogEvent(event, said, level, fields))

    def keep(self, error: BaseException) -> None:
        """Record the traceback of an error that the run recovers from; a note tells the user."""
        trace = "".join(traceback.format_exception(error))
        self._record(LogEvent("fault", type(error).__name__, fields={"traceback": trace}))

    def show(self, text: str) -> None:
        """Show a line that a library or a worker wrote."""
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                self._print(text)

    def status(self) -> Status:
        """Return the progress of the run."""
        with self._lock:
            now = time.monotonic()
            rows_per_s = tokens_per_s = left_s = None
            if self._tokens and self._first_row_at is not None:
                took = now - self._first_row_at
                rows_per_s, tokens_per_s = self._timed_rows / took, self._tokens / took
            if self._left_s is not None:
                left_s = max(0.0, self._left_s - (now - self._forecast_at))
            return Status(
                phase=self._phase,
                workers=dict(sorted(self._states.items())),
                elapsed_s=now - self._started,
                rows_done=self._rows_before + self._rows,
                rows_total=self._total_rows,
                rows_per_s=rows_per_s,
                tokens_per_s=tokens_per_s,
                left_s=left_s,
                slack_s=self._slack_s,
            )

    def set_worker(self, number: int, state: str) -> None:
        """Set the state of a replica, such as `busy`."""
        with self._lock:
            self._states[number] = state

    def expect(self, *, rows: int, done: int = 0) -> None:
        """Set how many rows there are in all, and how many of them are already done."""
        with self._lock:
            self._total_rows, self._rows_before = rows, done

    def advance(self, *, rows: int, tokens: int) -> None:
        """Count a finished batch."""
        with self._lock:
            if self._first_row_at is None:
                # Rates start here: how long the first batch took is not known.
                self._first_row_at = time.monotonic()
            else:
                self._tokens += tokens
                self._timed_rows += rows
            self._rows += rows

    def forecast(self, *, left_s: float, slack_s: float | None) -> None:
        """Set how many seconds of work are left.

        slack_s: how long before the time limit they end, None without a limit.
        """
        with self._lock:
            self._left_s, self._slack_s = left_s, slack_s
            self._forecast_at = time.monotonic()

    def _keep_drawing(self) -> None:
        while not self._stop.wait(REDRAW_S if self._cell is None else NOTEBOOK_REDRAW_S):
            with self._lock:
                now = time.monotonic()
                if self._bar is not None:
                    self._draw_bar(self._bar)
                elif self._cell is not None:
                    self._draw_cell(self._cell)
                else:
                    patience = PLAIN_RUNNING_S if self._rows else PLAIN_WAITING_S
                    patience = JSON_PROGRESS_S if self._is_json else patience
                    if now - self._last_plain >= patience - REDRAW_S:
                        event = self._progress_event()
                        self._print(event.as_json() if self._is_json else event.message)
                if now - self._last_recorded >= RECORD_PROGRESS_S:
                    self._last_recorded = now
                    self._record(self._progress_event())

    def _say(self, event: LogEvent) -> None:
        self._record(event)
        if self._is_json:
            # Not with _print, which would postpone the next progress line.
            print(event.as_json(), file=self._stream, flush=True)

    def _progress_event(self) -> LogEvent:
        now = self.status()
        fields = {
            "stage": now.phase,
            "rows_done": now.rows_done,
            "rows_total": now.rows_total,
            "rows_per_s": now.rows_per_s,
            "tokens_per_s": now.tokens_per_s,
            "seconds_elapsed": now.elapsed_s,
            "seconds_left": now.left_s,
            "seconds_slack": now.slack_s,
            "workers": now.workers,
        }
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in fields.items()}
        return LogEvent("progress", self._line(), fields=rounded)

    def _draw_bar(self, bar: tqdm) -> None:
        if self._rows:
            now = self.status()
            bar.total, bar.n = now.rows_total, now.rows_done
            bar.bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows, {desc}"
            bar.set_description_str(f"{_rates(now)}; {_workers(now)}", refresh=False)
        else:
            bar.set_description_str(self._line(), refresh=False)
        bar.refresh()

    def _draw_cell(self, cell: "_Cell") -> None:
        now = self.status()
        cell.show(now.rows_done / now.rows_total if self._rows else None, self._line())

    def _line(self) -> str:
        now = self.status()
        what = f"{now.rows_done}/{now.rows_total} rows, {_rates(now)}" if self._rows else now.phase
        return f"[{clock(now.elapsed_s)}] " + "; ".join(filter(None, [what, _workers(now)]))

    def _print(self, text: str) -> None:
        self._last_plain = time.monotonic()
        print(text, file=self._stream, flush=True)


def _rates(now: Status) -> str:
    if now.left_s is None:
        return "time left ?"
    said = f"{clock(now.left_s)} left"
    if now.tokens_per_s is not None:
        said = f"{now.tokens_per_s:,.0f} tokens/s, {said}"
    if now.slack_s is not None:
        said += f", {clock(abs(now.slack_s))} {'too long' if now.slack_s < 0 else 'to spare'}"
    return said


def _workers(now: Status) -> str:
    if len(now.workers) <= LISTED_WORKERS:
        return ", ".join(f"w{number} {state}" for number, state in now.workers.items())
    counts = Counter(state.split()[0] for state in now.workers.values())
    return "workers: " + ", ".join(f"{count} {state}" for state, count in counts.most_common())


class _Cell:
    """A bar and a line in the output of a notebook's cell, updated in place.

    It uses IPython's display, which every notebook has. Widgets need a package in the notebook's
    front end, and show nothing in a notebook that was run without one.
    """

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex
        self._is_there = False

    def show(self, share: float | None, text: str) -> None:
        from IPython.display import display

        bar = "" if share is None else f'<progress max="1" value="{share:.4f}"></progress> '
        line = f"<pre style='display:inline'>{html.escape(text)}</pre>"
        data = {"text/plain": text, "text/html": bar + line}
        display(data, raw=True, display_id=self._id, update=self._is_there)
        self._is_there = True


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})
