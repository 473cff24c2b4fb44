"""Figures of a run -> drawings on a matplotlib figure, which `canvas.py` turns into SVG.

Imported only when a page is written. Does not know the report.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator, PercentFormatter

from runner.common.units import mb, stopwatch
from runner.report.canvas import (
    MARKS,
    axis_step,
    draw_boxes,
    label_line,
    mark_faults,
    name_bars,
    row_axis,
    time_axis,
)
from runner.report.lanes import PADDING, SLOWER, WORKING, Lane
from runner.telemetry.timeline import COMPILING, LOADING, LOST, Event, Phase, Span

# The most cells that a lane is cut into, and that all lanes have together.
CELLS, MOST_CELLS = 1200, 60_000
MOST_LABELLED_LANES = 48
# The most bars, and the most curves, in one chart.
MOST_BARS, MOST_CURVES = 40, 6


def gantt_height(lanes: int) -> float:
    """Return the height of `gantt` in inches."""
    return 0.75 + 0.42 * (1 + min(lanes, 8)) + 0.16 * max(0, min(lanes, 48) - 8)


def gantt(
    figure: Figure,
    lanes: Sequence[Lane],
    labels: Sequence[str],
    *,
    spans: Sequence[Span],
    phases: Sequence[Phase],
    faults: Sequence[Event],
    decisions_s: Sequence[float],
    end_s: float,
) -> None:
    """Draw a row for each worker, coloured by its state, above a strip of what it compiled."""
    axes = figure.subplots()
    cells = max(100, min(CELLS, MOST_CELLS // len(lanes)))
    runs: dict[str, list[tuple[float, float, float, float]]] = {}
    place = {(lane.replica, lane.member): row for row, lane in enumerate(lanes, start=1)}
    for row, lane in enumerate(lanes, start=1):
        for state, start, end in lane.runs(cells):
            runs.setdefault(state, []).append((start, end, row - 0.36, row + 0.2))
    least = end_s / cells
    for span in spans:
        row = place.get((span.replica, span.member), 0)
        if span.what == COMPILING and row:
            end = min(max(span.end_s, span.start_s + least), end_s)
            box = (span.start_s, end, row + 0.24, row + 0.38)
            runs.setdefault(COMPILING, []).append(box)
    for phase in phases:
        end = max(phase.end_s, phase.start_s + least)
        runs.setdefault("soft", []).append((phase.start_s, end, -0.2, 0.2))
    for state, boxes in runs.items():
        draw_boxes(axes, boxes, state)
    marked = [(event.at_s, place.get((event.replica or 0, 0), 0)) for event in faults]
    if marked:
        axes.plot(
            [at for at, _ in marked],
            [row - 0.36 for _, row in marked],
            linestyle="none",
            marker="v",
            markersize=6,
            color=MARKS["warn"],
            clip_on=False,
        )
    for at_s in decisions_s:
        axes.axvline(at_s, color=MARKS["ink"], linewidth=0.8, linestyle=(0, (2, 2)))
    time_axis(axes, end_s)
    axes.set_ylim(len(lanes) + 0.6, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if len(lanes) <= MOST_LABELLED_LANES:
        axes.set_yticks([0, *place.values()], ["run", *labels])
    else:
        axes.set_yticks([0, 1, len(lanes)], ["run", labels[0], labels[-1]])


def shares_bar(figure: Figure, parts: dict[str, float]) -> None:
    """Draw all workers' time as one bar, cut into parts that sum to one."""
    axes = figure.subplots()
    left = 0.0
    for part, share in parts.items():
        axes.barh(0, share, left=left, height=1, color=MARKS[part])
        if share >= 0.04:
            dark = part in (WORKING, LOADING, LOST)
            axes.text(
                *(left + share / 2, 0, f"{share:.0%}"),
                ha="center",
                va="center",
                color="white" if dark else MARKS["ink"],
            )
        left += share
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines["left"].set_visible(False)


def throughput(
    figure: Figure,
    edges: np.ndarray,
    rates: np.ndarray,
    *,
    mean: float,
    faults_s: Sequence[float],
    end_s: float,
) -> None:
    """Draw real tokens per second. rates: one between each pair of edges, which are in seconds."""
    axes = figure.subplots()
    axes.stairs(rates, edges, fill=True, color=MARKS[SLOWER], linewidth=0)
    axes.stairs(rates, edges, color=MARKS["accent"], linewidth=1.2, baseline=None)
    axes.axhline(mean, color=MARKS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
    label_line(axes, mean, f"mean {mean:,.0f}")
    mark_faults(axes, faults_s)
    time_axis(axes, end_s)
    axes.set_ylim(0, max(float(rates.max(initial=0.0)), mean) * 1.12 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.grid(axis="y")
    axes.set_ylabel("real tokens per second")


def forecasts(
    figure: Figure,
    pairs: Sequence[tuple[float, float]],
    *,
    truth_s: float,
    limit_s: float | None,
    end_s: float,
) -> None:
    """Draw when the run was expected to end, by the time of each forecast, and when it ended."""
    axes = figure.subplots()
    at, expected = np.array(pairs, dtype=float).T
    axes.axhspan(0.9 * truth_s, 1.1 * truth_s, color=MARKS[PADDING], alpha=0.5, linewidth=0)
    axes.axhline(truth_s, color=MARKS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
    label_line(axes, truth_s, "actual end, ±10%", is_below=True)
    axes.plot(at, expected, color=MARKS["accent"], linewidth=1.4, marker=".", markersize=4)
    top = max(float(expected.max()), 1.1 * truth_s)
    low = min(float(expected.min()), 0.9 * truth_s)
    if limit_s is not None and limit_s < 2 * top:
        axes.axhline(limit_s, color=MARKS["warn"], linewidth=1)
        label_line(axes, limit_s, "time limit", color=MARKS["warn"])
        top, low = max(top, limit_s), min(low, limit_s)
    room = 0.12 * (top - low)
    axes.set_ylim(max(0.0, low - room), top + room)
    time_axis(axes, end_s)
    axes.yaxis.set_major_locator(MultipleLocator(axis_step(top - low, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: stopwatch(value)))
    axes.grid(axis="y")
    axes.set_ylabel("forecast of the end")


def lengths(figure: Figure, tokens: np.ndarray, buckets: Sequence[int], limit: int) -> None:
    """Draw how many rows have how many tokens, and the lengths of the batches."""
    axes = figure.subplots()
    top = max(limit, int(tokens.max(initial=1)))
    bins = np.linspace(0, top, min(80, top) + 1)
    counts, _ = np.histogram(tokens, bins)
    axes.stairs(counts, bins, fill=True, color=MARKS[SLOWER], linewidth=0)
    for place, bucket in enumerate(buckets):
        axes.axvline(bucket, color=MARKS["accent"], linewidth=0.9)
        axes.annotate(
            str(bucket),
            (bucket, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 9 * (place % 2)),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=MARKS["accent"],
        )
    axes.set_xlim(0, top * 1.01)
    row_axis(axes)
    axes.set_xlabel("tokens in a row")


def classes_and_confidence(figure: Figure, labels: Sequence[str], values: np.ndarray) -> None:
    """Draw how often each class is the most likely, and how sure the model is.

    Args:
        values: (rows, classes), probabilities.
    """
    left, right = figure.subplots(1, 2)
    likeliest = np.bincount(values.argmax(axis=1), minlength=len(labels)) / len(values)
    means = values.mean(axis=0)
    shown = np.sort(np.argsort(-likeliest, kind="stable")[:MOST_BARS])
    places = np.arange(len(shown))
    left.barh(places, likeliest[shown], height=0.62, color=MARKS[SLOWER])
    left.plot(means[shown], places, linestyle="none", marker="|", markersize=14, mew=2,
              color=MARKS["ink"])  # fmt: skip
    for place, share in zip(places, likeliest[shown], strict=True):
        left.annotate(
            f"{share:.1%}",
            (1, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=8,
        )
    name_bars(left, [_short(labels[place]) for place in shown])
    left.set_xlim(0, max(likeliest.max(), means.max()) * 1.25)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_xlabel("rows predicted as this class; stroke: mean probability")
    top = values.max(axis=1)
    counts, bins = np.histogram(top, np.linspace(1 / len(labels), 1, 31))
    right.stairs(counts, bins, fill=True, color=MARKS[SLOWER], linewidth=0)
    right.axvline(float(np.median(top)), color=MARKS["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
    right.set_xlim(1 / len(labels), 1)
    row_axis(right)
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_xlabel("probability of the most likely class; dashed: median")


def scores(figure: Figure, labels: Sequence[str], values: np.ndarray) -> None:
    """Draw a histogram of each of the first columns. values: (rows, columns)."""
    axes = figure.subplots()
    bins = np.linspace(float(values.min()), float(values.max()) + 1e-9, 41)
    for place, label in enumerate(labels[:MOST_CURVES]):
        counts, _ = np.histogram(values[:, place], bins)
        axes.stairs(counts, bins, linewidth=1.4, label=_short(label))
    axes.legend()
    row_axis(axes)
    axes.set_xlabel("predicted value")


def memory_height(workers: int) -> float:
    """Return the height of `memory` in inches."""
    return 0.8 + 0.3 * min(workers, MOST_BARS)


def memory(
    figure: Figure, labels: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]]
) -> None:
    """Draw a bar for each worker. parts: (what, role of its colour, bytes of each worker)."""
    axes = figure.subplots()
    count = min(len(labels), MOST_BARS)
    places, left = np.arange(count), np.zeros(count)
    for _, role, sizes in parts:
        axes.barh(places, sizes[:count], left=left, height=0.62, color=MARKS[role])
        left += sizes[:count]
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            mb(total),
            (total, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    name_bars(axes, labels[:count])
    axes.set_xlim(0, max(float(left.max(initial=0.0)), 1e6) * 1.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: mb(value)))
    axes.set_xlabel("peak resident memory")


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,.0f}"


def _short(label: str, most: int = 28) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
