"""A finished run -> one self-contained page: figures, charts, faults and decisions in words.

The page has no scripts and no ids of rows, and fetches nothing. The HTML is in `templates/`, the
words are in `page_text.py` and the drawings in `charts.py`. Imported only when a page is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write_whole
from runner.common.units import mb, stopwatch
from runner.report import charts, lanes, page_text
from runner.report.canvas import COLOURS, draw, variable
from runner.report.lanes import PARTS, SLOWER, Lane
from runner.report.markup import Html, fill
from runner.telemetry.timeline import Event, Phase, Span
from sharding.kinds import KINDS

# The most rows in the table of workers, and the most events in the list.
MOST_LISTED = 200
# Points of the throughput curve.
FEWEST_POINTS, MOST_POINTS = 12, 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Everything that a page is made from.

    report: see `gather.py`. spans, phases, events: see `timeline.py`. lengths: int64 (rows,), the
    tokens of each row, zero if unknown. values: (rows, columns), the model's own predictions for
    one row in `every`, with a column for each of `labels`. summary: see `facts.what_happened`.
    """

    report: dict[str, Any]
    spans: Sequence[Span]
    phases: Sequence[Phase]
    events: Sequence[Event]
    lengths: np.ndarray
    values: np.ndarray
    every: int
    labels: Sequence[str]
    summary: Sequence[str]

    @property
    def end_s(self) -> float:
        total: float = self.report["seconds"]["total"]
        return max([total, *(span.end_s for span in self.spans)])

    @property
    def noun(self) -> str:
        return "group" if self.report["strategy"] else "worker"

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if event.replica is not None]

    @property
    def names(self) -> list[str]:
        """The name of each worker of the report."""
        is_group = bool(self.report["strategy"])
        return [
            f"{self.noun} {one['replica']}" + f", member {one['member']}" * is_group
            for one in self.report["workers"]
        ]


def write_page(path: Path, story: Story) -> None:
    """Write the page; readers see the old file or the whole new one."""
    write_whole(path, make_page(story), private=True)


def make_page(story: Story) -> Html:
    """Return the page as HTML."""
    report = story.report
    workers = [(one["replica"], one["member"]) for one in report["workers"]]
    own = lanes.make_lanes(story.spans, workers, end_s=story.end_s)
    doubts = page_text.doubts(story.values, story.labels, report)
    return fill(
        "page",
        title=page_text.title(report),
        style=_style(),
        subtitle=page_text.subtitle(report),
        doubts=[fill("doubt", text=sentence) for sentence in doubts],
        tiles=[fill("tile", value=value, what=what) for value, what in page_text.tiles(report)],
        sections=[
            *_workers(story, own),
            *_where_time_went(story, own),
            *_speed(story),
            *_forecasts(story),
            *_lengths(story),
            *_answers(story),
            *_memory(story),
            *_faults(story),
            *_tables(story),
        ],
    )


def _workers(story: Story, own: Sequence[Lane]) -> Iterator[Html]:
    title = "What each worker did"
    if not own:
        yield _section(title, page_text.why_no_workers(story.report["rows"]))
        return
    decisions_s = [float(event["at_s"]) for event in story.report["deadline"]["events"]]
    seen = {state for lane in own for state, seconds in lane.seconds().items() if seconds > 0}
    seen |= {span.what for span in story.spans}
    svg = draw(
        "gantt",
        "What each worker did over the time of the run",
        charts.gantt_height(len(own)),
        charts.gantt,
        *(own, story.names),
        spans=story.spans,
        phases=story.phases,
        faults=story.faults,
        decisions_s=decisions_s,
        end_s=story.end_s,
    )
    yield _section(
        title,
        page_text.how_to_read_workers(bool(story.faults), bool(decisions_s)),
        _legend([(state, said) for state, said in page_text.STATES.items() if state in seen]),
        svg,
    )


def _where_time_went(story: Story, own: Sequence[Lane]) -> Iterator[Html]:
    report = story.report
    done = [span for span in lanes.answers(story.spans, copies=True) if span.batch is not None]
    padded = sum(span.batch.shape.tokens for span in done if span.batch is not None)
    real = int(lanes.real_tokens(done, story.lengths).sum())
    rate = report["rates"]["model_flops_per_s"]
    limit_s = None
    if report["model"] and rate and report["tokens"]["real"]:
        # The report counts one pass over the rows; the lanes also have extra passes and copies.
        flops = rate * report["seconds"]["predict"] * real / report["tokens"]["real"]
        limit_s = flops / report["model"]["matmul_flops_per_s"]
    parts = lanes.shares(own, padding=1 - real / padded if padded else 0.0, limit_s=limit_s)
    parts = {part: share for part, share in parts.items() if share > 0}
    if not parts:
        return
    svg = draw("shares", "Shares of all workers' time", 0.75, charts.shares_bar, parts)
    described = {part: page_text.describe_part(part, parts) for part in PARTS if part in parts}
    rows = [
        (_swatch(part, name), f"{parts[part]:.1%}", what)
        for part, (name, what) in described.items()
    ]
    table = _table(("what", "share", "what it is"), rows, numbers=(1,))
    yield _section("Where the time went", page_text.how_to_read_shares(report, parts), svg, table)


def _speed(story: Story) -> Iterator[Html]:
    done = [span for span in lanes.answers(story.spans) if span.batch is not None]
    tokens = lanes.real_tokens(done, story.lengths)
    if not tokens.sum():
        return
    # Use several batches a point: with one each, the curve only shows when batches start and end.
    points = min(MOST_POINTS, max(FEWEST_POINTS, len(done) // 3))
    edges = np.linspace(0, story.end_s, points + 1)
    first, last = min(span.start_s for span in done), max(span.end_s for span in done)
    svg = draw(
        "throughput",
        "Real tokens per second over the time of the run",
        2.4,
        charts.throughput,
        *(edges, lanes.rate_over_time(done, tokens, edges)),
        mean=float(tokens.sum()) / max(last - first, 1e-6),
        faults_s=[event.at_s for event in story.faults],
        end_s=story.end_s,
    )
    yield _section("Throughput", page_text.how_to_read_throughput(bool(story.faults)), svg)


def _forecasts(story: Story) -> Iterator[Html]:
    pairs, deadline = story.report["forecasts"], story.report["deadline"]
    if len(pairs) < 2:
        return
    extra = story.report["extra_passes"]
    truth_s = deadline["finished_s"] - (extra["seconds"] if extra else 0.0)
    svg = draw(
        "forecasts",
        "Forecasts of the end of the run, and its actual end",
        2.4,
        charts.forecasts,
        pairs,
        truth_s=truth_s,
        limit_s=deadline["limit_s"],
        end_s=story.end_s,
    )
    said = page_text.how_to_read_forecasts(pairs, truth_s)
    yield _section("Forecasts and actual end", said, svg)


def _lengths(story: Story) -> Iterator[Html]:
    counted, report = story.lengths[story.lengths > 0], story.report
    if not counted.size:
        return
    buckets = sorted({shape["length"] for shape in report["plan"]["shapes"]})
    limit = report["config"]["sequence_length"]
    described = "How many rows have how many tokens"
    svg = draw("lengths", described, 2.4, charts.lengths, counted, buckets, limit)
    yield _section("Lengths", page_text.how_to_read_lengths(report, counted, len(buckets)), svg)


def _answers(story: Story) -> Iterator[Html]:
    values, labels = story.values, story.labels
    if not values.size:
        return
    if page_text.are_probabilities(values):
        described = "The predicted classes and the confidence in them"
        height = 0.9 + 0.32 * max(4, min(len(labels), charts.MOST_BARS))
        svg = draw("answers", described, height, charts.classes_and_confidence, labels, values)
    else:
        described = "The distribution of the predicted values"
        svg = draw("answers", described, 2.4, charts.scores, labels, values)
    said = page_text.how_to_read_answers(
        values, story.every, bars=charts.MOST_BARS, curves=charts.MOST_CURVES
    )
    yield _section("What was predicted", said, svg)


def _memory(story: Story) -> Iterator[Html]:
    workers = story.report["workers"]
    if not any(worker["peak_rss_bytes"] for worker in workers):
        return
    imports = [worker["rss_after_imports_bytes"] for worker in workers]
    on_host = KINDS[story.report["model"]["kind"]].is_host
    weights = [worker["weight_bytes"] if on_host else 0 for worker in workers]
    rest = [
        max(0, worker["peak_rss_bytes"] - imported - weight)
        for worker, imported, weight in zip(workers, imports, weights, strict=True)
    ]
    parts = [
        ("libraries", "idle", imports),
        ("weights", "accent", weights),
        ("everything else at the peak", SLOWER, rest),
    ]
    parts = [part for part in parts if any(part[2])]
    height = charts.memory_height(len(workers))
    svg = draw("memory", "Memory of each worker", height, charts.memory, story.names, parts)
    said = page_text.how_to_read_memory(story.report, charts.MOST_BARS)
    yield _section("Memory", said, _legend([(role, what) for what, role, _ in parts]), svg)


def _faults(story: Story) -> Iterator[Html]:
    said = [
        *((event.at_s, page_text.describe_event(event, story.noun)) for event in story.events),
        *((float(one["at_s"]), str(one["what"])) for one in story.report["deadline"]["events"]),
    ]
    entries = [fill("event", at=stopwatch(at_s), what=what) for at_s, what in sorted(said)]
    if len(entries) > MOST_LISTED:
        more = fill("event", at="", what=f"and {len(entries) - MOST_LISTED:,} more")
        entries = [*entries[:MOST_LISTED], more]
    sentences = [*story.summary]
    if not sentences and not entries:
        sentences = ["Nothing went wrong: no faults, and no decisions about a time limit."]
    yield _section(
        "Faults and decisions",
        *sentences,
        *([fill("events", entries=entries)] if entries else []),
    )


def _tables(story: Story) -> Iterator[Html]:
    report = story.report
    workers = report["workers"]
    names = ("", "device", "rows", "batches", "busy", "idle", "loaded in", "compiled", "from cache",
             "peak memory", "restarts")  # fmt: skip
    rows = [
        (
            name,
            str(one["device"]),
            f"{one['rows']:,}",
            f"{one['batches']:,}",
            stopwatch(one["busy_s"]),
            stopwatch(one["idle_s"]),
            stopwatch(one["load_s"]),
            f"{one['compiled_shapes']} in {stopwatch(one['compile_s'] - one['cached_s'])}",
            f"{one['cached_shapes']} in {stopwatch(one['cached_s'])}",
            mb(one["peak_rss_bytes"]),
            str(one["restarts"]),
        )
        for name, one in zip(story.names, workers[:MOST_LISTED], strict=False)
    ]
    if rows:
        title = "Workers" + f" (the first {MOST_LISTED})" * (len(workers) > MOST_LISTED)
        yield _folded(title, names, rows, numbers=range(2, len(names)))
    seconds = [(key, f"{value:,.2f}") for key, value in report["seconds"].items()]
    yield _folded("Seconds of each phase", ("phase", "seconds"), seconds, numbers=(1,))
    settings = [(key, str(value)) for key, value in report["config"].items()]
    yield _folded("Settings", ("setting", "value"), settings)
    yield _folded("Versions", ("package", "version"), [*report["versions"].items()])


def _section(title: str, *parts: str) -> Html:
    """Return a section. Parts that are plain text become paragraphs."""
    made = [part if isinstance(part, Html) else fill("paragraph", text=part) for part in parts]
    return fill("section", title=title, parts=made)


def _legend(entries: Sequence[tuple[str, str]]) -> Html:
    swatches = [_swatch(role, what) for role, what in entries]
    return fill("legend", entries=[fill("entry", swatch=swatch) for swatch in swatches])


def _swatch(role: str, what: str) -> Html:
    return fill("swatch", variable=variable(role), what=what)


def _folded(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Html:
    return fill("folded", title=title, table=_table(names, rows, numbers=numbers))


def _table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()
) -> Html:
    """Return a table. numbers: the places of columns that hold numbers."""

    def line(cells: Sequence[str], text: str, number: str) -> Html:
        kinds = [number if place in numbers else text for place in range(len(cells))]
        filled = [fill(kind, text=cell) for kind, cell in zip(kinds, cells, strict=True)]
        return fill("row", cells=filled)

    return fill(
        "table",
        names=line(names, "name", "name of numbers"),
        rows=[line(cells, "cell", "number") for cells in rows],
    )


def _style() -> Html:
    light, dark = (
        "".join(f"{variable(role)}:{colours[place]};" for role, colours in COLOURS.items())
        for place in (0, 1)
    )
    return fill("style", light=light, dark=dark)
