"""A matplotlib figure -> inline SVG in the page's colours; and what all charts share.

Each role has a marker colour, which becomes a CSS variable, so one drawing serves light and dark
pages. Does not know what is drawn.
"""

import io
import logging
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from runner.common.units import stopwatch
from runner.report.lanes import ENDING, IDLE, PADDING, SLOWER, WORKING
from runner.report.markup import Html
from runner.telemetry.timeline import COMPILING, LOADING, LOST, PREDICTING, STARTING

P = ParamSpec("P")
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
# Stand-ins for the roles that matplotlib draws with; it never picks these colours by itself.
MARKS = {role: f"#01fe{place:02x}" for place, role in enumerate(COLOURS)}

WIDTH = 9.6  # inches, each 72 units of the drawing
# Steps of a time axis, in seconds.
STEPS_S = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900),
    *(1800, 3600, 7200, 14400, 28800),
)

# Hide its message about building a font cache, which is of no use to users.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def variable(role: str) -> str:
    """Return the CSS variable of a role."""
    return "--" + role.replace(" ", "-")


def draw(
    name: str,
    described: str,
    height: float,
    paint: Callable[Concatenate[Figure, P], None],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Html:
    """Return an <svg> element of what `paint(figure, *args, **kwargs)` draws.

    Args:
        name: unique on the page. described: what it shows, for screen readers. height: in inches.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's own settings
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure, *args, **kwargs)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Make it as wide as the page, with ids that no other drawing has.
    tag, rest = svg.split(">", maxsplit=1)
    svg = re.sub(r' (width|height)="[^"]*"', "", tag) + ">" + rest
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(described)}" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, mark in MARKS.items():
        svg = svg.replace(mark, f"var({variable(role)})")
    return Html(svg)


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


def draw_boxes(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], role: str) -> None:
    """Draw (left, right, top, bottom) rectangles as one path; a run may have thousands."""
    vertices = [
        corner
        for left, right, top, bottom in boxes
        for corner in ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
    ]
    codes = [Path.MOVETO, *(Path.LINETO,) * 3, Path.CLOSEPOLY] * len(boxes)
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor=MARKS[role], linewidth=0))


def time_axis(axes: Axes, end_s: float) -> None:
    """Make x the seconds since the start of the run."""
    step = axis_step(end_s, 10)
    axes.xaxis.set_major_locator(FixedLocator(np.arange(0, end_s + step / 2, step).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: stopwatch(value)))
    axes.set_xlim(0, end_s)


def axis_step(seconds: float, most: int) -> float:
    """Return the smallest step that cuts the seconds into at most `most` parts."""
    return next((step for step in STEPS_S if seconds / step <= most), STEPS_S[-1])


def mark_faults(axes: Axes, faults_s: Sequence[float]) -> None:
    """Draw a red line at each fault."""
    for at_s in faults_s:
        axes.axvline(at_s, color=MARKS["warn"], linewidth=0.8)


def label_line(
    axes: Axes, at: float, text: str, *, color: str = MARKS["ink"], is_below: bool = False
) -> None:
    """Label a horizontal line at its left end: nothing else is drawn where the run starts."""
    axes.annotate(
        text,
        (0, at),
        xycoords=("axes fraction", "data"),
        xytext=(4, -3 if is_below else 3),
        textcoords="offset points",
        va="top" if is_below else "bottom",
        color=color,
        fontsize=8,
    )


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars at y = 0, 1, ..., from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def row_axis(axes: Axes) -> None:
    """Make y a count of rows, from zero."""
    axes.set_ylim(0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    axes.set_ylabel("rows")
