"""A finished run -> one self-contained page: figures, charts, faults and decisions in words.

No script, nothing fetched, no ids. All text from outside is escaped. `charts.py` draws, and
`page_text.py` has the words. Imported only where a page is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.files import write_whole
from runner.report import charts, lanes, page_text
from runner.report.lanes import PARTS, Lane
from runner.telemetry.timeline import COMPILING, PREDICTING, Event, Span, Stage
from sharding.kinds import KINDS

# Rows of the table of workers, and events in words.
MOST_LISTED = 200
# Points of the throughput's curve.
FEWEST_POINTS, MOST_POINTS = 12, 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """All that a page tells.

    report: see `facts.py`. spans, stages, events: see `timeline.py`. lengths: int64 (rows,), the
    tokens of each row. values: (rows, columns), the model's own answers, in the order of `labels`,
    those of one row in `every`. summary: sentences on what was not as asked for.
    """

    report: dict[str, Any]
    spans: Sequence[Span]
    stages: Sequence[Stage]
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


def write_page(path: Path, story: Story) -> None:
    """Write the page so that whoever looks sees the old one or all of the new one."""
    write_whole(path, make_page(story), private=True)


def make_page(story: Story) -> str:
    """Return the page as HTML."""
    end_s = story.end_s
    workers = [(one["replica"], one["member"]) for one in story.report["workers"]]
    own = lanes.make_lanes(story.spans, workers, end_s=end_s)
    sections = [
        *_header(story),
        *_workers(story, own),
        *_where_time_went(story, own),
        *_speed(story),
        *_forecasts(story),
        *_lengths(story),
        *_answers(story),
        *_memory(story),
        *_faults(story),
        *_tables(story),
    ]
    title = escape(page_text.title(story.report))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, whatever a text in it says.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(story: Story) -> Iterator[str]:
    report = story.report
    yield f"<header><h1>{escape(page_text.title(report))}</h1>"
    yield f"<p>{escape(page_text.subtitle(report))}</p></header>"
    doubts = page_text.doubts(story.values, story.labels, report)
    for sentence in doubts:
        yield f'<p class="doubt">{escape(sentence)}</p>'
    tiles = page_text.tiles(report)
    yield '<div class="tiles">'
    for value, what in tiles:
        yield f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>"
    yield "</div>"


def _workers(story: Story, own: Sequence[Lane]) -> Iterator[str]:
    if not own:
        said = "No worker was needed: every answer was in the journal already, or there is no row."
        yield _section("What each worker did", said)
        return
    faults = [event for event in story.events if event.replica is not None]
    decisions_s = [float(event["at_s"]) for event in story.report["deadline"]["events"]]
    states = {PREDICTING: "predicting", COMPILING: "compiling (a strip: beside other work)"}
    seen = {state for lane in own for state, seconds in lane.seconds().items() if seconds > 0}
    seen |= {span.what for span in story.spans}
    legend = [
        (state, states.get(state, page_text.STATES[state]))
        for state in page_text.STATES
        if state in seen
    ]
    svg = charts.draw(
        "gantt",
        "What each worker was at over the time of the run",
        charts.gantt_height(len(own)),
        lambda figure: charts.gantt(
            figure,
            own,
            [_lane_name(story, lane.replica, lane.member) for lane in own],
            spans=story.spans,
            stages=story.stages,
            faults=faults,
            decisions_s=decisions_s,
            end_s=story.end_s,
        ),
    )
    said = page_text.how_to_read_workers(bool(faults), bool(decisions_s))
    yield _section("What each worker did", said, svg, legend=legend)


def _where_time_went(story: Story, own: Sequence[Lane]) -> Iterator[str]:
    report = story.report
    done = [span for span in lanes.answers(story.spans, copies=True) if span.batch is not None]
    padded = sum(span.batch.shape.tokens for span in done if span.batch is not None)
    real = int(lanes.real_tokens(done, story.lengths).sum())
    rate = report["rates"]["model_flops_per_s"]
    limit_s = None
    if report["model"] and rate and report["tokens"]["real"]:
        # The report counts one pass over the rows, the lanes extra passes and copies too.
        flops = rate * report["seconds"]["predict"] * real / report["tokens"]["real"]
        limit_s = flops / report["model"]["matmul_flops_per_s"]
    parts = lanes.shares(own, padding=1 - real / padded if padded else 0.0, limit_s=limit_s)
    parts = {part: share for part, share in parts.items() if share > 0}
    if not parts:
        return
    svg = charts.draw(
        "shares",
        "Shares of all workers' time",
        0.75,
        lambda figure: charts.shares_bar(figure, parts),
    )
    rows = [
        (f'<i style="background:var({charts.variable(part)})"></i>{escape(part)}',
         f"{parts[part]:.1%}", escape(page_text.PARTS[part]))
        for part in PARTS if part in parts
    ]  # fmt: skip
    table = _table(("what", "share", "what it is"), rows, numbers=(1,))
    yield _section(
        "Where the time went", page_text.how_to_read_shares(report, parts, limit_s), svg, table
    )


def _speed(story: Story) -> Iterator[str]:
    done = [span for span in lanes.answers(story.spans) if span.batch is not None]
    tokens = lanes.real_tokens(done, story.lengths)
    if not tokens.sum():
        return
    end_s = story.end_s
    # Some batches a point: one alone would draw where it began and ended.
    edges = np.linspace(0, end_s, min(MOST_POINTS, max(FEWEST_POINTS, len(done) // 3)) + 1)
    rates = lanes.rate_over_time(done, tokens, edges)
    first, last = min(span.start_s for span in done), max(span.end_s for span in done)
    mean = float(tokens.sum()) / max(last - first, 1e-6)
    svg = charts.draw(
        "throughput",
        "Real tokens a second over the time of the run",
        2.4,
        lambda figure: charts.throughput(
            figure,
            edges,
            rates,
            mean=mean,
            faults_s=[event.at_s for event in story.events if event.replica is not None],
            end_s=end_s,
        ),
    )
    yield _section("Throughput", page_text.HOW_TO_READ_THROUGHPUT, svg)


def _forecasts(story: Story) -> Iterator[str]:
    report = story.report
    pairs, deadline = report["forecasts"], report["deadline"]
    if len(pairs) < 2:
        return
    extra = report["extra_passes"]
    truth_s = deadline["finished_s"] - (extra["seconds"] if extra else 0.0)
    svg = charts.draw(
        "forecasts",
        "The forecast of the run's end against the truth",
        2.4,
        lambda figure: charts.forecasts(
            figure, pairs, truth_s=truth_s, limit_s=deadline["limit_s"], end_s=story.end_s
        ),
    )
    yield _section("Forecast and truth", page_text.how_to_read_forecasts(pairs, truth_s), svg)


def _lengths(story: Story) -> Iterator[str]:
    if not story.lengths.size or not story.lengths.any():
        return
    report = story.report
    shapes = report["plan"]["shapes"]
    buckets = sorted({shape["length"] for shape in shapes})
    svg = charts.draw(
        "lengths",
        "How many rows have how many tokens",
        2.4,
        lambda figure: charts.lengths(
            figure, story.lengths, buckets, report["config"]["sequence_length"]
        ),
    )
    yield _section(
        "Lengths", page_text.how_to_read_lengths(report, story.lengths, len(buckets)), svg
    )


def _answers(story: Story) -> Iterator[str]:
    values = story.values
    if not values.size:
        return
    if page_text.are_shares_of_one(values):
        svg = charts.draw(
            "answers",
            "The predicted classes and the confidence in them",
            0.9 + 0.32 * max(4, min(len(story.labels), charts.MOST_BARS)),
            lambda figure: charts.classes_and_confidence(figure, story.labels, values),
        )
        said = page_text.HOW_TO_READ_CLASSES
    else:
        svg = charts.draw(
            "answers",
            "The distribution of the predicted values",
            2.4,
            lambda figure: charts.scores(figure, story.labels, values),
        )
        said = page_text.HOW_TO_READ_SCORES
    if story.every > 1:
        said += f" Drawn from one row in {story.every}."
    yield _section("What was predicted", said, svg)


def _memory(story: Story) -> Iterator[str]:
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
        ("all else at the peak", lanes.SLOWER, rest),
    ]
    parts = [part for part in parts if any(part[2])]
    svg = charts.draw(
        "memory",
        "Memory of each worker",
        charts.memory_height(len(workers)),
        lambda figure: charts.memory(
            figure, [_lane_name(story, one["replica"], one["member"]) for one in workers], parts
        ),
    )
    legend = [(role, what) for what, role, _ in parts]
    yield _section("Memory", page_text.how_to_read_memory(story.report), svg, legend=legend)


def _faults(story: Story) -> Iterator[str]:
    said = [
        *((event.at_s, page_text.event(event, story.noun)) for event in story.events),
        *((float(one["at_s"]), str(one["what"])) for one in story.report["deadline"]["events"]),
    ]
    lines = [
        f"<li><time>{charts.clock(at_s)}</time>{escape(what)}</li>"
        for at_s, what in sorted(said)[:MOST_LISTED]
    ]
    if len(said) > MOST_LISTED:
        lines.append(f"<li>and {len(said) - MOST_LISTED:,} more</li>")
    whole = "".join(f"<p>{escape(sentence)}</p>" for sentence in story.summary)
    if not whole and not lines:
        whole = "<p>Nothing went wrong, and nothing was given up.</p>"
    yield _section(
        "Faults and decisions",
        "",
        whole + (f'<ol class="events">{"".join(lines)}</ol>' * bool(lines)),
    )


def _tables(story: Story) -> Iterator[str]:
    report = story.report
    names = ("", "device", "rows", "batches", "busy", "idle", "loaded in", "compiled", "from cache",
             "peak memory", "restarts")  # fmt: skip
    rows = [
        (
            escape(_lane_name(story, one["replica"], one["member"])),
            escape(str(one["device"])),
            f"{one['rows']:,}",
            f"{one['batches']:,}",
            charts.clock(one["busy_s"]),
            charts.clock(one["idle_s"]),
            charts.clock(one["load_s"]),
            f"{one['compiled_shapes']} in {charts.clock(one['compile_s'] - one['cached_s'])}",
            f"{one['cached_shapes']} in {charts.clock(one['cached_s'])}",
            f"{one['peak_rss_bytes'] / 1e6:,.0f} MB",
            str(one["restarts"]),
        )
        for one in report["workers"][:MOST_LISTED]
    ]
    if rows:
        yield _folded("Each worker", _table(names, rows, numbers=range(2, len(names))))
    seconds = [(escape(key), f"{value:,.2f}") for key, value in report["seconds"].items()]
    yield _folded("Seconds by stage", _table(("stage", "seconds"), seconds, numbers=(1,)))
    settings = [(escape(key), escape(str(value))) for key, value in report["config"].items()]
    yield _folded("Settings", _table(("setting", "value"), settings))
    found = [(escape(key), escape(str(value))) for key, value in report["versions"].items()]
    yield _folded("Versions", _table(("package", "version"), found))


def _lane_name(story: Story, replica: int, member: int) -> str:
    return f"{story.noun} {replica}" + (f", member {member}" if story.noun == "group" else "")


def _section(title: str, said: str, *parts: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    items = "".join(
        f'<li><i style="background:var({charts.variable(role)})"></i>{escape(what)}</li>'
        for role, what in legend
    )
    return (
        f"<section><h2>{escape(title)}</h2>"
        + (f"<p>{escape(said)}</p>" if said else "")
        + (f'<ul class="legend">{items}</ul>' if items else "")
        + "".join(parts)
        + "</section>"
    )


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def _table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()
) -> str:
    """Cells are HTML already. numbers: the columns that are."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="n">{cell}</{tag}>' if place in numbers else f"<{tag}>{cell}</{tag}>"
            for place, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    return (
        f'<div class="wide"><table><thead><tr>{line(names, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _style() -> str:
    light, dark = (
        "".join(
            f"{charts.variable(role)}:{colours[place]};" for role, colours in charts.COLOURS.items()
        )
        for place in (0, 1)
    )
    return (
        f":root{{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--doubt:#fff4d6;{light}}}\n"
        "@media (prefers-color-scheme:dark)"
        f"{{:root{{--paper:#0d1117;--card:#161b22;--doubt:#3a2f12;{dark}}}}}\n" + _RULES
    )


_RULES = """\
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;line-height:1.25;margin:0 0 4px;font-weight:650}
h2{font-size:19px;margin:0 0 2px;font-weight:600}
header p,section>p{color:var(--soft);margin:0 0 10px;max-width:80ch}
section{margin:36px 0 0}
.doubt{background:var(--doubt);border-left:4px solid var(--compiling);margin:14px 0 0;
  padding:8px 12px;border-radius:0 6px 6px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;
  margin:22px 0 0}
.tiles div{background:var(--card);border-radius:8px;padding:12px 14px}
.tiles b{display:block;font-size:21px;font-weight:600;line-height:1.3;white-space:nowrap}
.tiles span{display:block;color:var(--soft);font-size:13.5px;line-height:1.35}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 6px;padding:0;
  font-size:14px}
i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;margin:8px 0 0}
th{text-align:left;font-weight:600;color:var(--soft)}
td,th{padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.events{list-style:none;margin:6px 0 0;padding:0;font-size:15px}
.events li{padding:3px 0;border-bottom:1px solid var(--line)}
time{display:inline-block;min-width:84px;color:var(--soft);font-variant-numeric:tabular-nums}
details{margin:14px 0 0}
details:first-of-type{margin-top:36px}
summary{cursor:pointer;font-weight:600}
td{overflow-wrap:anywhere}
@media print{details{display:none}}
"""
