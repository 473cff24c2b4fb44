"""The page and the trace of a made-up run, by hand; and a real run's page in a real browser."""

import json
import re
import shutil
import subprocess
import threading
import tomllib
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from runner.common.errors import ConfigError
from runner.common.records import Work
from runner.config.run_config import RunConfig
from runner.report import charts, gather, markup
from runner.report import page as report_page
from runner.report.canvas import COLOURS
from runner.report.lanes import (
    ENDING,
    IDLE,
    PADDING,
    PARTS,
    SLOWER,
    STATES,
    WORKING,
    answers,
    make_lanes,
    rate_over_time,
    real_tokens,
    shares,
)
from runner.report.page import make_page, write_page
from runner.report.page_text import doubts
from runner.report.trace import make_trace, write_trace
from runner.telemetry.timeline import (
    COMPILING,
    LOADING,
    LOST,
    PREDICTING,
    STARTING,
    Event,
    Span,
    Timeline,
)
from sharding.batches import Batch, BatchShape
from tests.support.stories import LABELS, make_report, make_spans, make_story

SHAPE = BatchShape(2, 8)


class TestTimeline:
    def make(self):
        self.time = 100.0
        return Timeline(100.0, clock=lambda: self.time)

    def test_what_is_asked_together_is_done_in_turn(self):
        timeline = self.make()
        self.time = 103.0
        timeline.add(STARTING, 0, 0, 1.0)
        self.time = 107.0
        timeline.add(LOADING, 0, 0, 1.0)
        timeline.add(LOADING, 0, 1, 1.0)
        found = [(span.what, span.member, span.start_s, span.end_s) for span in timeline.spans]
        assert found == [("starting", 0, 1.0, 3.0), ("loading", 0, 3.0, 7.0),
                         ("loading", 1, 1.0, 7.0)]  # fmt: skip

    def test_compiling_goes_on_beside_predicting(self):
        timeline = self.make()
        self.time = 110.0
        timeline.predicted(Batch(0, (1,), SHAPE), 0, [Work(6.0, 0)], 2.0)
        timeline.add(COMPILING, 0, 0, 3.0, shape=SHAPE)
        assert [(span.start_s, span.end_s) for span in timeline.spans] == [(4.0, 10.0), (3.0, 10.0)]

    def test_stages_of_a_pipeline_overlap_as_they_did(self, monkeypatch):
        timeline = self.make()
        monkeypatch.setattr("time.time", lambda: 5000.0)
        self.time = 110.0
        work = [Work(3.0, 0, ended_at=4995.0), Work(4.0, 0, ended_at=4999.0)]
        timeline.predicted(Batch(0, (1,), SHAPE), 2, work, 1.0)
        found = [(span.member, span.start_s, span.end_s) for span in timeline.spans]
        assert found == [(0, 2.0, 5.0), (1, 5.0, 9.0)]

    @pytest.mark.parametrize(("ended_at", "ended_s"), [(0.0, 10.0), (9000.0, 10.0), (1.0, 4.0)])
    def test_clocks_of_other_machines_may_be_wrong(self, monkeypatch, ended_at, ended_s):
        timeline = self.make()
        monkeypatch.setattr("time.time", lambda: 5000.0)
        self.time = 110.0
        timeline.predicted(Batch(0, (1,), SHAPE), 0, [Work(1.0, 0, ended_at=ended_at)], 4.0)
        assert [span.end_s for span in timeline.spans] == [ended_s]

    def test_the_second_answer_is_a_copy(self):
        timeline = self.make()
        for replica in (0, 1):
            self.time += 1
            timeline.predicted(Batch(3, (1,), SHAPE), replica, [Work(0.5, 0)], 0.0)
        assert [span.is_copy for span in timeline.spans] == [False, True]
        assert len(answers(timeline.spans)) == 1
        assert len(answers(timeline.spans, copies=True)) == 2


class TestLanes:
    SPANS = (
        Span(STARTING, 0, 0, 1.0, 2.0),
        Span(LOADING, 0, 0, 2.0, 4.0),
        Span(COMPILING, 0, 0, 4.0, 7.0, shape=SHAPE),
        Span(PREDICTING, 0, 0, 6.0, 10.0, batch=Batch(0, (0, 1), SHAPE)),
        Span(LOST, 0, 0, 12.0, 13.0),
        Span(PREDICTING, 0, 0, 14.0, 16.0, batch=Batch(1, (2,), SHAPE)),
    )

    def test_a_worker_is_at_one_thing_at_a_time(self):
        (lane,) = make_lanes(self.SPANS, [(0, 0)], end_s=20.0)
        assert lane.runs(20) == [
            ("starting", 0, 2), ("loading", 2, 4), ("compiling", 4, 6), ("predicting", 6, 10),
            ("idle", 10, 12), ("lost", 12, 13), ("idle", 13, 14), ("predicting", 14, 16),
            ("ending", 16, 20),
        ]  # fmt: skip
        assert lane.seconds() == {STARTING: 2, LOADING: 2, COMPILING: 2, PREDICTING: 6, IDLE: 3,
                                  LOST: 1, ENDING: 4}  # fmt: skip

    def test_parts_sum_to_one(self):
        lanes = make_lanes(self.SPANS, [(0, 0), (1, 0)], end_s=20.0)
        parts = shares(lanes, padding=0.5, limit_s=2.0)
        assert list(parts) == list(PARTS)
        assert sum(parts.values()) == pytest.approx(1.0)
        # Worker 1 never came: it was starting until the end.
        assert parts[STARTING] == pytest.approx((2 + 20) / 40)
        assert (parts[WORKING], parts[SLOWER], parts[PADDING]) == (2 / 40, 1 / 40, 3 / 40)

    def test_a_limit_that_was_beaten_or_not_measured(self):
        lanes = make_lanes(self.SPANS, [(0, 0)], end_s=20.0)
        beaten = shares(lanes, padding=0.5, limit_s=50.0)
        assert (beaten[WORKING], beaten[SLOWER]) == (3 / 20, 0)
        assert shares(lanes, padding=0.5, limit_s=None)[SLOWER] == 3 / 20
        assert shares([], padding=0.0, limit_s=None) == {}

    def test_made_up_run_sums_to_the_wall_time(self):
        workers = [(replica, member) for replica in (0, 1) for member in (0, 1)]
        for lane in make_lanes(make_spans(), workers, end_s=60.0):
            assert sum(lane.seconds().values()) == pytest.approx(60.0)
            runs = lane.runs(600)
            assert (runs[0][1], runs[-1][2]) == (0.0, 60.0)
            assert all(one[2] == two[1] for one, two in pairwise(runs))
            assert {state for state, _, _ in runs} <= set(STATES)

    def test_thousands_of_batches_make_no_more_than_the_cells(self):
        spans = [Span(PREDICTING, 0, 0, at / 10, at / 10 + 0.09) for at in range(10_000)]
        (lane,) = make_lanes(spans, [(0, 0)], end_s=1000.0)
        assert len(lane.runs(500)) <= 500
        assert lane.seconds()[PREDICTING] == pytest.approx(900.0)

    def test_rates_hold_every_token(self):
        lengths = np.array([8, 3, 20])
        done = answers(self.SPANS)
        tokens = real_tokens(done, lengths)
        assert tokens.tolist() == [11, 8], "a cut row has no more tokens than its shape"
        edges = np.linspace(0, 20, 8)
        rates = rate_over_time(done, tokens, edges)
        assert (rates * np.diff(edges)).sum() == pytest.approx(19.0)


class TestTrace:
    def events(self):
        story = make_story()
        devices = {
            (one["replica"], one["member"]): one["device"] for one in story.report["workers"]
        }
        return make_trace(
            story.spans, story.phases, story.events, devices=devices, noun="group"
        )  # fmt: skip

    def test_slices_of_a_thread_do_not_overlap(self):
        threads = defaultdict(list)
        for event in self.events():
            if event["ph"] == "X":
                threads[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
        assert len(threads) == 9, "the run, and of four members what they do and compile"
        for slices in threads.values():
            slices.sort()
            for (start, took), (after, _) in pairwise(slices):
                assert start + took <= after

    def test_what_perfetto_reads(self, tmp_path):
        path = tmp_path / "t.trace.json"
        write_trace(path, self.events())
        assert path.stat().st_mode & 0o77 == 0
        trace = json.loads(path.read_text())
        events = trace["traceEvents"]
        assert {event["ph"] for event in events} == {"M", "X", "i", "C"}
        for event in events:
            assert isinstance(event["pid"], int)
            assert isinstance(event["tid"], int)
            assert event["ph"] == "M" or (isinstance(event["ts"], int) and event["ts"] >= 0)
        names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
        assert names == {"the run", "group 0", "group 1"}
        batch = next(event for event in events if event["name"] == "predicting 8 x 128")
        assert batch["args"] == {"batch": 0, "rows": 10, "padded_rows": 8, "length": 128}
        assert (batch["ts"], batch["dur"]) == (15_000_000, 2_500_000)
        death = next(event for event in events if event["ph"] == "i")
        assert (death["name"], death["pid"]) == ("its worker died; it is started again", 2)

    def test_the_curve_holds_every_row(self):
        points = [event for event in self.events() if event["ph"] == "C"]
        rows = sum(
            one["args"]["rows/s"] * (two["ts"] - one["ts"]) / 1e6 for one, two in pairwise(points)
        )
        assert rows == pytest.approx(240, rel=1e-3)

    def test_a_run_without_work(self):
        assert [one["ph"] for one in make_trace([], [], [], devices={}, noun="worker")] == ["M"] * 2


class Page(HTMLParser):
    """All that a page refers to, its text, and whether its tags close."""

    VOID = ("meta", "link")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestPage:
    def test_it_is_whole_and_stands_alone(self):
        html = make_page(make_story())
        page = Page(html)
        assert page.open == []
        assert page.tags.count("svg") == 7
        assert not {"script", "img", "iframe", "object"} & set(page.tags)
        links = [value for name, value in page.attributes if name in ("href", "xlink:href", "src")]
        assert {link[:1] for link in links} <= {"#", "d"}
        assert [link for link in links if link[0] != "#"] == ["data:,"]
        ids = [value for name, value in page.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        used = {link[1:] for link in links if link[0] == "#"} | {
            *re.findall(r"url\(#([^)]*)", html)
        }
        assert used <= set(ids)
        for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
            ElementTree.fromstring(svg)

    def test_every_colour_is_the_pages_own(self):
        html = make_page(make_story())
        drawn = set(
            re.findall(r"#[0-9a-f]{6}\b", "".join(re.findall(r"<svg.*?</svg>", html, re.S)))
        )
        assert drawn <= {"#ffffff"}
        used, made = (
            set(re.findall(r"var\((--[\w-]+)\)", html)),
            set(re.findall(r"(--[\w-]+):", html)),
        )
        assert used <= made

    def test_texts_from_outside_are_escaped(self):
        evil = '"><script>alert(1)</script>&$x_1$'
        report = make_report()
        report["config"] |= {"input": f"{evil}.csv"}
        report["model"]["device"] = evil
        report["deadline"]["events"] = [{"at_s": 1.0, "what": evil}]
        for worker in report["workers"]:
            worker["device"] = evil
        html = make_page(
            make_story(
                report=report,
                labels=(evil, "<b>b</b>", "c"),
                summary=[evil],
                events=[Event(1.0, evil, 0)],
            )
        )
        page = Page(html)
        assert "script" not in page.tags
        assert "<script" not in html
        assert "<b>b</b>" not in html
        text = "".join(page.text)
        assert text.count("alert(1)") >= 8
        assert "<b>b</b>" in text, "a label is text, in the drawing too"

    def test_shares_are_those_of_the_lanes(self):
        html = make_page(make_story())
        table = html[html.index("Where the time went") : html.index("Throughput")]
        found = [float(share) for share in re.findall(r'class="n">([\d.]+)%<', table)]
        assert sum(found) == pytest.approx(100, abs=0.5)
        # 17,000 tokens are the report's; 40 s at 4e10 FLOP/s of 1e11 are 16 of 240 worker seconds,
        # and as many times more as the lanes' tokens are.
        assert found[0] == pytest.approx(100 * 16 / 240 * _real_tokens() / 17_000, abs=0.1)

    def test_faults_and_decisions_are_in_order(self):
        text = "".join(Page(make_page(make_story())).text)
        assert text.index("group 1: its worker died") < text.index("50 s of work are left for 30 s")

    @pytest.mark.parametrize("count", [1, 3, 70])
    def test_any_number_of_workers(self, count):
        report = make_report()
        report["strategy"] = None
        report["workers"] = [
            report["workers"][0] | {"replica": replica} for replica in range(count)
        ]
        spans = [span for span in make_spans() if not span.member]
        page = Page(make_page(make_story(report=report, spans=spans)))
        assert f"worker {count - 1}" in "".join(page.text)

    def test_nothing_to_do(self):
        """No rows; all rows resumed."""
        report = make_report()
        report |= {"workers": [], "model": None, "forecasts": [], "strategy": None}
        report["rates"] = dict.fromkeys(report["rates"])
        report["tokens"] = {"real": 0, "padded": 0}
        report["plan"] = {"shapes": []}
        report["rows"] = dict.fromkeys(report["rows"], 0)
        report["deadline"] = {"limit_s": None, "finished_s": 1.0, "slack_s": None, "events": []}
        nothing = {"spans": [], "events": [], "summary": []}
        none = make_story(report=report, **nothing, lengths=np.zeros(0, np.int64),
                          values=np.zeros((0, 3)))  # fmt: skip
        page = Page(make_page(none))
        assert page.tags.count("svg") == 0
        resumed = replace(make_story(), report=report, **nothing)
        page = Page(make_page(resumed))
        assert page.tags.count("svg") == 2, "lengths and classes are there all the same"
        assert "No worker was needed: the test set has no rows." in "".join(page.text)
        assert "Nothing went wrong" in "".join(page.text)

    @pytest.mark.parametrize(
        ("resumed", "said"),
        [
            (240, "No worker was needed: the journal already had every row."),
            (239, "No worker had loaded the model when the run ended, so it predicted nothing."),
            (0, "No worker had loaded the model when the run ended, so it predicted nothing."),
        ],
    )
    def test_why_there_is_no_worker(self, resumed, said):
        """A run whose time was over while its workers loaded has none either."""
        report = make_report() | {"workers": [], "model": None}
        report["rows"] |= {"resumed": resumed, "filled": 240 - resumed}
        assert said in self.text(report=report, spans=[])

    def test_a_run_that_predicted_nothing_is_not_said_to_have(self):
        report = make_report()
        report["rates"] = dict.fromkeys(report["rates"])
        report["tokens"] = {"real": 0, "padded": 0}
        spans = [span for span in make_spans() if span.what in (STARTING, LOADING)]
        text = self.text(report=report, spans=spans, events=[])
        assert "The run predicted nothing." in text
        assert "GFLOP/s" not in text

    def test_predicting_without_a_rate_is_one_part(self):
        """An extra pass over resumed rows: the report counts no tokens, but workers predicted."""
        report = make_report()
        report["rates"] = dict.fromkeys(report["rates"])
        html = make_page(make_story(report=report))
        assert "this run measured no rate to split it by" in html
        assert '<i style="background:var(--slower-than-that)"></i>predicting\n' in html
        assert WORKING not in html, "nor is anything compared with it"
        assert f"</i>{SLOWER}\n" in make_page(make_story())

    def test_only_marks_that_are_drawn_are_explained(self):
        assert "Red marks are faults. Dotted lines are" in self.text()
        assert "Red lines are faults." in self.text()
        report = make_report()
        report["deadline"]["events"] = []
        text = self.text(events=[], report=report)
        assert "Red" not in text
        assert "Dotted" not in text

    @pytest.mark.parametrize(
        ("slack_s", "said"), [(16.0, "16 sbefore the limit"), (-16.0, "16 safter the limit")]
    )
    def test_a_run_that_is_late_has_no_time_left(self, slack_s, said):
        report = make_report()
        report["deadline"]["slack_s"] = slack_s
        assert said in self.text(report=report).replace("\n", "")

    def test_rows_that_nobody_counted_have_no_length(self):
        """Time was over before tokenizing: only rows of the journal have a length."""
        lengths = np.zeros(240, np.int64)
        lengths[:3] = (10, 20, 128)
        text = self.text(lengths=lengths, spans=[])
        assert "Half of the rows have up to 20 tokens, the longest 128; 33% reach" in text
        assert "237 rows without a token count are not drawn." in text
        assert "without a token count" not in self.text()

    def test_workers_that_are_not_drawn_are_not_said_to_be(self):
        report = make_report()
        report["workers"] = [report["workers"][0] | {"replica": one} for one in range(210)]
        text = self.text(report=report)
        assert f"memory of the first {charts.MOST_BARS} of 210 workers" in text
        assert "Workers (the first 200)" in text
        text = self.text()
        for other in ("the first batch", "from the first forecast", "details:first-of-type"):
            text = text.replace(other, "")
        assert "first" not in text

    def text(self, **changes):
        return "".join(Page(make_page(make_story(**changes))).text)

    def test_values_that_are_no_probabilities(self):
        values = np.random.default_rng(0).normal(size=(240, 1))
        page = Page(make_page(make_story(values=values, labels=("score",))))
        assert "predicted value" in "".join(page.text)

    def test_embeddings(self):
        values = np.random.default_rng(0).normal(size=(100, 2304)).astype(np.float32)
        labels = [*map(str, range(2304))]
        html = make_page(make_story(values=values, labels=labels, every=10))
        assert "The first 6 of 2,304 columns are drawn. Drawn from one row in 10." in html
        assert len(html) < 300_000

    def test_it_is_the_owners_alone(self, tmp_path):
        write_page(tmp_path / "p.html", make_story())
        assert (tmp_path / "p.html").stat().st_mode & 0o77 == 0


class TestMarkup:
    def test_all_but_html_is_escaped(self):
        evil = '<b>"&$text'
        safe = "&lt;b&gt;&quot;&amp;$text"
        assert markup.fill("paragraph", text=evil) == f"<p>{safe}</p>\n"
        assert markup.fill("paragraph", text=[evil, markup.Html("<i></i>")]) == (
            f"<p>{safe}<i></i></p>\n"
        )
        nested = markup.fill("paragraph", text=markup.fill("paragraph", text=evil))
        assert nested == f"<p><p>{safe}</p>\n</p>\n", "and once alone"

    def test_a_value_that_is_missing(self):
        with pytest.raises(KeyError, match="what"):
            markup.fill("tile", value="1")

    def test_the_templates_are_shipped(self):
        """Wheels hold Python files and what `package-data` names."""
        root = Path(markup.__file__).parents[2]
        setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
        shipped = {
            path
            for package, patterns in setuptools["package-data"].items()
            for pattern in patterns
            for path in (root / package.replace(".", "/")).glob(pattern)
        }
        others = {
            path
            for path in (root / "runner").rglob("*")
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
        }
        assert shipped == others
        assert {path.name for path in shipped} == {"page.html", "parts.html", "style.css"}


class TestDoubts:
    def about(self, values, **rows):
        report = make_report()
        report["rows"] |= rows
        return " ".join(doubts(np.asarray(values), LABELS, report))

    def test_a_model_that_works_is_not_doubted(self):
        assert self.about(make_story().values) == ""

    def test_one_class_for_all(self):
        values = np.random.default_rng(1).dirichlet((40, 2, 2), 100)
        assert "the same class, winner_model_a" in self.about(values)

    def test_one_answer_for_all(self):
        values = np.tile([0.5, 0.3, 0.2], (100, 1))
        assert "hardly differ between rows" in self.about(values)

    def test_guesses(self):
        values = 1 / 3 + np.random.default_rng(1).uniform(-0.01, 0.01, (100, 2))
        values = np.column_stack([values, 1 - values.sum(axis=1)])
        assert "hardly more confident than a guess" in self.about(values)

    def test_few_rows_are_not_judged(self):
        assert self.about(np.tile([1.0, 0, 0], (49, 1))) == ""

    def test_fallbacks(self):
        assert "got the fallback" in self.about(make_story().values, filled=40)


class TestPaths:
    def test_beside_the_report(self):
        config = RunConfig(output=Path("out.csv"))
        assert str(config.page_path) == "out.csv.report.html"
        assert str(config.trace_path) == "out.csv.trace.json"
        config = RunConfig(report=Path("a/x.json"))
        assert (str(config.page_path), str(config.trace_path)) == ("a/x.html", "a/x.trace.json")
        assert str(RunConfig(report=Path("x.html")).page_path) == "x.html.html"

    @pytest.mark.parametrize("ending", ["report.html", "trace.json"])
    def test_files_that_would_be_overwritten(self, ending):
        with pytest.raises(ConfigError, match="must be different files"):
            RunConfig(output=Path("s.csv"), input=Path(f"s.csv.{ending}"))


class TestFailing:
    """The submission is there: no drawing ends a run or delays it."""

    def test_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report_page, "draw", lambda *_, **__: 1 / 0)
        page = tmp_path / "page.html"
        page.write_text("of an older run")
        said = gather.try_to_write("page", page, lambda: write_page(page, make_story()))
        assert list(tmp_path.iterdir()) == []
        assert said == (
            "the submission was written, but its page was not: ZeroDivisionError: division by zero"
        )

    def test_a_hang(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gather, "PAGE_WITHIN_S", 0.05)
        forever = threading.Event()
        said = gather.try_to_write("page", tmp_path / "p", forever.wait)
        forever.set()
        assert said is not None
        assert "TimeoutError" in said

    def test_success(self, tmp_path):
        assert gather.try_to_write("page", tmp_path / "p", lambda: None) is None


def _real_tokens():
    story = make_story()
    return real_tokens(answers(story.spans), story.lengths).sum()


def _browse(
    page: Path, folder: Path, *flags: str, height: int = 3600
) -> tuple[np.ndarray, list[str]]:
    """Open a page in headless Chromium; return its picture, (height, width, channels), and what
    was wrong: words on the console, and addresses that the page asked for.

    No name is resolved. Chromium asks for its own updates, which no page has begun.
    """
    from matplotlib.image import imread

    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "tests marked browser need Chromium: apt-get install chromium"
    picture, log = folder / "page.png", folder / "net.json"
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--log-net-log={log}", f"--screenshot={picture}"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size=1200,{height}"),
            *(*flags, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # A line an event; the file's end is missing where the browser was quick to go.
    lines = [line for line in log.read_text().splitlines() if '"initiator":' in line]
    asked = [json.loads(line.rstrip(","))["params"] for line in lines]
    fetched = [
        one["url"]
        for one in asked
        if one["initiator"] != "not an origin" and one["url"].startswith(("http", "ws", "ftp"))
    ]
    return imread(picture), said + fetched


def _is_drawn(picture: np.ndarray, colour: str) -> bool:
    """Whether a colour of the page covers a ten-thousandth of its picture."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return bool((np.abs(picture[..., :3] - wanted).max(axis=2) < 0.02).mean() > 1e-4)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_a_made_up_run_in_a_browser(tmp_path, scheme):
    page = tmp_path / "page.html"
    report_page.write_page(page, make_story())
    flags = ("--force-dark-mode",) if scheme else ()
    picture, wrong = _browse(page, tmp_path, *flags)
    assert wrong == []
    for role in (PREDICTING, COMPILING, LOADING, STARTING, IDLE, LOST, ENDING, "ink"):
        assert _is_drawn(picture, COLOURS[role][scheme]), role
    assert not _is_drawn(picture, COLOURS[PREDICTING][1 - scheme])


@pytest.mark.browser
def test_the_browser_tells_of_a_page_that_fetches_or_fails(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><p><img src="http://example.test/x.png"><script>nonsense()</script>'
    )
    picture, wrong = _browse(page, tmp_path, height=400)
    assert "http://example.test/x.png" in wrong
    assert any("nonsense is not defined" in one for one in wrong)
    assert not _is_drawn(picture, COLOURS[PREDICTING][0])


@pytest.mark.browser
@pytest.mark.slow
def test_the_demo_in_a_browser(cli, tmp_path):
    output = tmp_path / "s.csv"
    done = cli("--mode", "data-parallel", "--num-workers", "2", "--sequence-length", "128",
               "--output", str(output))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    html = (tmp_path / "s.csv.report.html").read_text()
    assert "worker 1" in html
    assert "weights are random" in html
    picture, wrong = _browse(tmp_path / "s.csv.report.html", tmp_path)
    assert wrong == []
    for role in (PREDICTING, COMPILING, LOADING, STARTING, "ink"):
        assert _is_drawn(picture, COLOURS[role][0]), role
    ids = [line.split(",")[0] for line in output.read_text().splitlines()[1:]]
    trace = (tmp_path / "s.csv.trace.json").read_text()
    for one in ids[:50]:
        assert one not in html
        assert one not in trace
