"""A timeline -> a trace file that opens in Perfetto (ui.perfetto.dev) or chrome://tracing.

The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
Each replica is a process; each member has a thread, and one more for what it compiles. Process 0
is the driver. Holds no ids and no texts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write_whole
from runner.report.lanes import answers, rate_over_time
from runner.telemetry.timeline import COMPILING, Event, Phase, Span

# The most points in the curve of rows per second.
MOST_POINTS = 200
RUN = 0


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """Write the trace; readers see the old file or the whole new one."""
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))
    write_whole(path, text + "\n", private=True)


def make_trace(
    spans: Sequence[Span],
    phases: Iterable[Phase],
    events: Iterable[Event],
    *,
    devices: dict[tuple[int, int], str],
    noun: str,
) -> list[dict[str, Any]]:
    """Return the trace's events, with times in microseconds since the process started.

    Args:
        devices: of each worker, by (replica, member). noun: for a replica, `worker` or `group`.
    """
    made = [*_names(devices, noun)]
    made += [_complete(phase, phase.what, RUN, 0, {}) for phase in phases]
    for span in spans:
        thread = 2 * span.member + (span.what == COMPILING)
        made.append(_complete(span, _name(span), span.replica + 1, thread, _arguments(span)))
    for event in events:
        process = RUN if event.replica is None else event.replica + 1
        instant = {"ph": "i", "name": event.what, "ts": _us(event.at_s), "s": "p"}
        made.append(instant | {"pid": process, "tid": 0})
    return [*made, *_rates(spans)]


def _names(devices: dict[tuple[int, int], str], noun: str) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", RUN, 0, "the run")
    yield _metadata("thread_name", RUN, 0, "reading, tokenizing, merging")
    for (replica, member), device in devices.items():
        process = replica + 1
        if member == 0:
            yield _metadata("process_name", process, 0, f"{noun} {replica}")
        who = f"member {member}, {device}"
        yield _metadata("thread_name", process, 2 * member, who)
        yield _metadata("thread_name", process, 2 * member + 1, f"member {member}, compiling")


def _metadata(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _complete(
    what: Span | Phase, name: str, process: int, thread: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    start, end = _us(what.start_s), _us(what.end_s)
    where = {"pid": process, "tid": thread, "ts": start, "dur": max(0, end - start)}
    return {"ph": "X", "name": name, **where, "args": arguments}


def _name(span: Span) -> str:
    shape = span.shape or (span.batch.shape if span.batch else None)
    return f"{span.what} {shape.rows} x {shape.length}" if shape else span.what


def _arguments(span: Span) -> dict[str, Any]:
    if span.shape is not None:
        return {"from_cache": span.is_cached}
    if span.batch is None:
        return {}
    batch = span.batch
    shape = {"padded_rows": batch.shape.rows, "length": batch.shape.length}
    found = {"batch": batch.index, "rows": len(batch.rows), **shape}
    return {**found, "is_copy": True} if span.is_copy else found


def _rates(spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """Yield the curve of rows per second."""
    answered = [span for span in answers(spans) if span.batch is not None]
    if not answered:
        return
    start, end = min(span.start_s for span in answered), max(span.end_s for span in answered)
    edges = np.linspace(start, max(end, start + 1e-3), min(MOST_POINTS, 2 * len(answered)) + 1)
    rows = np.array([len(span.batch.rows) for span in answered if span.batch is not None])
    rates = [*rate_over_time(answered, rows, edges).tolist(), 0.0]
    for at_s, rate in zip(edges.tolist(), rates, strict=True):
        counter = {"ph": "C", "name": "rows/s", "pid": RUN, "tid": 0, "ts": _us(at_s)}
        yield counter | {"args": {"rows/s": round(rate, 3)}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
