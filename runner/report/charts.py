"""Figures of a run -> drawings as inline SVG, whose colours are the page's own.

matplotlib draws with a marked colour for each role, and the marks become CSS variables: one drawing
serves light and dark pages. Imported only where a page is written. Does not know the report.
"""

import io
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    PercentFormatter,
)

from runner.report.lanes import ENDING, IDLE, PADDING, SLOWER, WORKING, Lane
from runner.telemetry.timeline import (
    COMPILING,
    LOADING,
    LOST,
    PREDICTING,
    STARTING,
    Event,
    Span,
    Stage,
)

# Role -> (colour on a light page, on a dark one).
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"),
    "accent": ("#2f6fb3", "#5b9bdd"),
    "warn": ("#c93c37", "#f0716b"),
    PREDICTING: ("#2f6fb3", "#5b9bdd"),
    WORKING: ("#2f6fb3", "#5b9bdd"),
    SLOWER: ("#7fb0dc", "#2d5f8f"),
    PADDING: ("#c5dbef", "#234058"),
    COMPILING: ("#dba11c", "#c9951f"),
    LOADING: ("#8e6bbf", "#a48bd0"),
    STARTING: ("#c8b9e0", "#5d4b7d"),
    IDLE: ("#e3e6ea", "#2b3139"),
    LOST: ("#c93c37", "#f0716b"),
    ENDING: ("#aab4be", "#57606a"),
}
# What matplotlib draws with: no colour that it would choose by itself.
MARKS = {role: f"#01fe{place:02x}" for place, role in enumerate(COLOURS)}

WIDTH = 9.6  # inches, of 72 units of the drawing each
# Cells that a lane of a drawing is cut into, and those of all lanes together.
CELLS, MOST_CELLS = 1200, 60_000
MOST_LABELLED_LANES = 48
# Bars of one chart.
MOST_BARS = 40
# Sensible steps of a time axis, in seconds.
STEPS_S = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900),
    *(1800, 3600, 7200, 14400, 28800),
)

# It would tell the person that it builds its cache of fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def variable(role: str) -> str:
    """Return the CSS variable of a role."""
    return "--" + role.replace(" ", "-")


def draw(name: str, described: str, height: float, paint: Callable[[Figure], None]) -> str:
    """Return an <svg> element.

    Args:
        name: unique on the page. described: what it shows, for those who cannot see it; escaped
            already.
        height: in inches.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not those of the person's own plots
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # As wide as the page; names that no other drawing has.
    tag, rest = svg.split(">", maxsplit=1)
    svg = re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + rest
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, mark in MARKS.items():
        svg = svg.replace(mark, f"var({variable(role)})")
    return svg


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": MARKS["ink"],
    "axes.edgecolor": MARKS["line"],
    "axes.labelcolor": MARKS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": MARKS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": MARKS["line"],
    "ytick.color": MARKS["line"],
    "xtick.labelcolor": MARKS["soft"],
    "ytick.labelcolor": MARKS["soft"],
    "legend.frameon": False,
    "legend.labelcolor": MARKS["ink"],
}


def gantt_height(lanes: int) -> float:
    return 0.75 + 0.42 * (1 + min(lanes, 8)) + 0.16 * max(0, min(lanes, 48) - 8)


def gantt(
    figure: Figure,
    lanes: Sequence[Lane],
    labels: Sequence[str],
    *,
    spans: Sequence[Span],
    stages: Sequence[Stage],
    faults: Sequence[Event],
    decisions_s: Sequence[float],
    end_s: float,
) -> None:
    """A row a worker, coloured by what it was at; what it compiled beside that in a strip below."""
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
    for stage in stages:
        end = max(stage.end_s, stage.start_s + least)
        runs.setdefault("soft", []).append((stage.start_s, end, -0.2, 0.2))
    for state, boxes in runs.items():
        _boxes(axes, boxes, state)
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
    _time_axis(axes, end_s)
    axes.set_ylim(len(lanes) + 0.6, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if len(lanes) <= MOST_LABELLED_LANES:
        axes.set_yticks([0, *place.values()], ["the run", *labels])
    else:
        axes.set_yticks([0, 1, len(lanes)], ["the run", labels[0], labels[-1]])


def shares_bar(figure: Figure, parts: dict[str, float]) -> None:
    """One bar: all workers' time, cut into parts that sum to one."""
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
    """Real tokens a second."""
    axes = figure.subplots()
    axes.stairs(rates, edges, fill=True, color=MARKS[SLOWER], linewidth=0)
    axes.stairs(rates, edges, color=MARKS["accent"], linewidth=1.2, baseline=None)
    axes.axhline(mean, color=MARKS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
    _label_line(axes, mean, f"mean {mean:,.0f}")
    _mark_faults(axes, faults_s)
    _time_axis(axes, end_s)
    axes.set_ylim(0, max(float(rates.max(initial=0.0)), mean) * 1.12 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.grid(axis="y")
    axes.set_ylabel("real tokens a second")


def forecasts(
    figure: Figure,
    pairs: Sequence[tuple[float, float]],
    *,
    truth_s: float,
    limit_s: float | None,
    end_s: float,
) -> None:
    """When the run was expected to be done, by when that was said, against when it was."""
    axes = figure.subplots()
    at, expected = np.array(pairs, dtype=float).T
    axes.axhspan(0.9 * truth_s, 1.1 * truth_s, color=MARKS[PADDING], alpha=0.5, linewidth=0)
    axes.axhline(truth_s, color=MARKS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
    _label_line(axes, truth_s, "truth, and 10 % around it", is_below=True)
    axes.plot(at, expected, color=MARKS["accent"], linewidth=1.4, marker=".", markersize=4)
    top = max(float(expected.max()), 1.1 * truth_s)
    low = min(float(expected.min()), 0.9 * truth_s)
    if limit_s is not None and limit_s < 2 * top:
        axes.axhline(limit_s, color=MARKS["warn"], linewidth=1)
        _label_line(axes, limit_s, "the limit", color=MARKS["warn"])
        top, low = max(top, limit_s), min(low, limit_s)
    room = 0.12 * (top - low)
    axes.set_ylim(max(0.0, low - room), top + room)
    _time_axis(axes, end_s)
    axes.yaxis.set_major_locator(MultipleLocator(_step(top - low, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value)))
    axes.grid(axis="y")
    axes.set_ylabel("forecast end")


def lengths(figure: Figure, tokens: np.ndarray, buckets: Sequence[int], limit: int) -> None:
    """How many rows are how long, and the lengths that they are padded to."""
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
    axes.set_ylim(0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("rows")


def classes_and_confidence(figure: Figure, labels: Sequence[str], values: np.ndarray) -> None:
    """Which class is likeliest how often, and how sure the model is. values: (rows, classes)."""
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
    left.set_yticks(places, [_short(labels[place]) for place in shown])
    left.tick_params(axis="y", length=0)
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xlim(0, max(likeliest.max(), means.max()) * 1.25)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_xlabel("rows for which it is the likeliest; the stroke: mean probability")
    top = values.max(axis=1)
    counts, bins = np.histogram(top, np.linspace(1 / len(labels), 1, 31))
    right.stairs(counts, bins, fill=True, color=MARKS[SLOWER], linewidth=0)
    right.axvline(float(np.median(top)), color=MARKS["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
    right.set_xlim(1 / len(labels), 1)
    right.set_ylim(0)
    right.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.grid(axis="y")
    right.set_xlabel("probability of the likeliest class; dashed: median")
    right.set_ylabel("rows")


def scores(figure: Figure, labels: Sequence[str], values: np.ndarray) -> None:
    """How often which value comes out, where they are no shares of one. values: (rows, columns)."""
    axes = figure.subplots()
    bins = np.linspace(float(values.min()), float(values.max()) + 1e-9, 41)
    for place, label in enumerate(labels[:6]):
        counts, _ = np.histogram(values[:, place], bins)
        axes.stairs(counts, bins, linewidth=1.4, label=_short(label))
    axes.legend()
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    axes.set_xlabel("predicted value")
    axes.set_ylabel("rows")


def memory_height(workers: int) -> float:
    return 0.8 + 0.3 * min(workers, MOST_BARS)


def memory(
    figure: Figure, labels: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]]
) -> None:
    """A bar a worker; parts: (what, role of its colour, bytes of each worker)."""
    axes = figure.subplots()
    count = min(len(labels), MOST_BARS)
    places, left = np.arange(count), np.zeros(count)
    for _, role, sizes in parts:
        megabytes = np.array(sizes[:count]) / 1e6
        axes.barh(places, megabytes, left=left, height=0.62, color=MARKS[role])
        left += megabytes
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            f"{total:,.0f} MB",
            (total, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(places, labels[:count])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, max(float(left.max(initial=0.0)), 1.0) * 1.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("MB of the machine's memory, at most")


def clock(seconds: float) -> str:
    """7.25 -> 7.2 s, 73 -> 1:13, 3700 -> 1:01:40."""
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _boxes(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], role: str) -> None:
    """Draw (left, right, top, bottom) rectangles as one path: a run may have thousands."""
    vertices = [
        corner
        for left, right, top, bottom in boxes
        for corner in ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
    ]
    codes = [Path.MOVETO, *(Path.LINETO,) * 3, Path.CLOSEPOLY] * len(boxes)
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor=MARKS[role], linewidth=0))


def _time_axis(axes: Axes, end_s: float) -> None:
    step = _step(end_s, 10)
    axes.xaxis.set_major_locator(FixedLocator(np.arange(0, end_s + step / 2, step).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value)))
    axes.set_xlim(0, end_s)


def _step(seconds: float, most: int) -> float:
    return next((step for step in STEPS_S if seconds / step <= most), STEPS_S[-1])


def _mark_faults(axes: Axes, faults_s: Sequence[float]) -> None:
    for at_s in faults_s:
        axes.axvline(at_s, color=MARKS["warn"], linewidth=0.8)


def _label_line(
    axes: Axes, at: float, text: str, *, color: str = MARKS["ink"], is_below: bool = False
) -> None:
    axes.annotate(
        text,
        (0, at),  # there the run has just started, and nothing else is drawn
        xycoords=("axes fraction", "data"),
        xytext=(4, -3 if is_below else 3),
        textcoords="offset points",
        va="top" if is_below else "bottom",
        color=color,
        fontsize=8,
    )


def _count(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,.0f}"


def _short(label: str, most: int = 28) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
