"""Other tasks: what a [task] table may say, files in and out, and heads against a Keras loop."""

import csv
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.common.errors import ConfigError, DataError, MergeError
from runner.common.records import Examples
from runner.config.run_config import PrepareConfig, RunConfig, make_config
from runner.config.task import CONTEST, Task, make_task
from runner.data.dataset import read_examples
from runner.data.prompts import render_prompts
from runner.data.submission import rehearse, write_submission
from runner.driver.swap_pass import swap
from runner.model.accuracy import compare, describe
from runner.results.fingerprint import Fingerprint
from runner.results.journal import Journal
from runner.results.table import Merger
from tests.conftest import LENGTH, LONGEST_RUN_S, ROOT, TOLERANCE, environment

OWN = {"id-column": "key", "text-columns": ["title", "body"], "label-columns": ["no", "yes"]}
EXAMPLES = ROOT / "examples"


class TestTable:
    def test_nothing_named_is_the_contest(self):
        assert make_task({}) == CONTEST == RunConfig().task
        assert make_task({"id_column": "row"}) == replace(CONTEST, id_column="row")
        assert make_task({"template": "{response_b}|{prompt}|{response_a}"}).swap == CONTEST.swap
        assert make_task({"label-columns": ["a", "b"]}).swap == ()
        assert RunConfig(task={"id_column": "id"}).task == CONTEST

    def test_columns_and_template_follow_from_each_other(self):
        task = make_task(OWN)
        assert task.template == "{title}\n\n{body}"
        assert (task.head, task.swap, task.keep_columns) == ("softmax", (), ())
        task = make_task({"template": "{b} {a} {b} {{c}}", "classes": 2})
        assert task.text_columns == ("b", "a")
        assert task.label_columns == ("class_0", "class_1")
        assert task.input_columns == ("id", "b", "a")

    def test_the_order_of_labels_after_an_exchange(self):
        assert CONTEST.swapped_labels == [1, 0, 2]
        task = make_task({**OWN, "swap": ["title", "body"]})
        assert task.swapped_labels == [0, 1]
        examples = Examples(("1",), {"title": ("t",), "body": ("b",)})
        assert swap(examples, task).columns == {"title": ("b",), "body": ("t",)}

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"labels": ["a"]}, "unknown key.*label_columns.*Received: labels"),
            ("x", r"must be a table, \[task\]"),
            ({"head": "relu"}, "head must be one of softmax"),
            ({"head": 1}, "head must be text"),
            ({"text-columns": "title"}, "text_columns must be a list of names"),
            ({"text-columns": ["title"]}, "head softmax needs label_columns"),
            ({**OWN, "label-columns": ["one"]}, "at least 2"),
            ({**OWN, "classes": 2}, "either label_columns or classes"),
            ({"classes": 0}, "classes must be a whole number"),
            ({"classes": True}, "classes must be a whole number"),
            ({**OWN, "head": "none"}, "head none has no labels"),
            ({**OWN, "template": "{title}"}, r"\{body\} is not in it"),
            ({**OWN, "template": "{title}{body}{bodi}"}, r"\{bodi\} is none of them"),
            ({**OWN, "template": "{title}{body.x}"}, r"\{body.x\} is none of them"),
            ({**OWN, "template": "{title}{body"}, "unmatched braces"),
            ({**OWN, "template": "{title}{body!r}"}, r"only column names.*\{body!r\}"),
            ({**OWN, "template": "{title:>9}{body}"}, r"only column names.*\{title:>9\}"),
            ({**OWN, "template": "{title}{body}{}"}, r"only column names.*\{\}"),
            ({"template": "no column", "classes": 2}, "needs a text column"),
            ({**OWN, "keep-columns": ["no"]}, "each column once. Received: 'no' twice"),
            ({**OWN, "keep-columns": ["key"]}, "each column once. Received: 'key' twice"),
            (
                {**OWN, "text-columns": ["title", "title"]},
                "each column once. Received: 'title' twice",
            ),
            ({**OWN, "label-columns": ["", "a"]}, "must be names"),
            ({**OWN, "swap": ["title", "key"]}, "swap must name two of text_columns"),
            ({**OWN, "swap": ["title"]}, "swap must name two"),
            ({**OWN, "swap-labels": ["no", "yes"]}, "swap_labels needs swap"),
            (
                {"template": "{a}", "head": "none", "id_column": "embedding_0"},
                "do not use such a name",
            ),
        ],
    )
    def test_what_it_refuses(self, table, message):
        with pytest.raises(ConfigError, match=message):
            make_task(table)

    def test_a_task_through_a_file(self, tmp_path):
        task = make_task(
            {**OWN, "template": '"{title}"\\{body}\x7f\té\u2028%s{{', "head": "sigmoid"}
        )
        path = tmp_path / "run.toml"
        path.write_text('preset = "p"\ninput = "x.jsonl"\n' + task.as_toml(), encoding="utf-8")
        flags = {"head_kernel": path, "head_bias": path}
        assert make_config(flags, path).task == task
        path.write_text(CONTEST.as_toml())
        assert make_config({}, path).task == CONTEST


class TestConfig:
    def config(self, table, **flags):
        files = dict.fromkeys(("preset", "head_kernel", "head_bias", "input"), tmp_file)
        return RunConfig(**{**files, "task": make_task(table), **flags})

    @pytest.mark.parametrize(
        ("head", "labels", "fits", "fails"),
        [
            ("softmax", 2, [(0.25, 0.75)], [(0.5, 0.6), (1,), (0.2, 0.3, 0.5)]),
            ("sigmoid", 2, [(1, 1)], [(1.5, 0), (-0.1, 0)]),
            ("regression", 1, [(-7,)], [(float("nan"),), (float("inf"),), (1e39,), (1, 2)]),
        ],
    )
    def test_the_fallback_is_the_heads(self, head, labels, fits, fails):
        table = {"template": "{x}", "classes": labels, "head": head}
        for values in fits:
            assert self.config(table, fallback_probabilities=values)
        for values in fails:
            with pytest.raises(ConfigError, match=f"must be {labels}"):
                self.config(table, fallback_probabilities=values)

    def test_without_a_head(self):
        table = {"template": "{x}", "head": "none"}
        none = {"head_kernel": None, "head_bias": None}
        assert self.config(table, **none).task.width(48) == 48
        with pytest.raises(ConfigError, match=r"takes no head.*--head-kernel and --head-bias"):
            self.config(table)
        with pytest.raises(ConfigError, match="needs a head"):
            self.config(table, **none, fallback_probabilities=(1,))
        with pytest.raises(ConfigError, match="takes no head"):
            PrepareConfig(
                preset=tmp_file, output=tmp_file, head_kernel=tmp_file, head_bias=tmp_file,
                task=make_task(table),
            )  # fmt: skip

    def test_what_the_demo_can_do(self):
        assert RunConfig(task=make_task({"text-columns": ["prompt"], "head": "none"}))
        assert RunConfig(task=make_task({"head": "sigmoid"}))
        with pytest.raises(ConfigError, match=r"needs --preset.*3 classes.*Received: 2 labels"):
            RunConfig(task=make_task({"text-columns": ["prompt"], "classes": 2}))
        with pytest.raises(ConfigError, match=r"needs --input.*no column title"):
            RunConfig(task=make_task({"text-columns": ["title"], "head": "none"}))

    def test_swap_is_for_tasks_that_have_two_such_columns(self):
        with pytest.raises(ConfigError, match="--extra-passes swap needs two text columns"):
            self.config(OWN, extra_passes="swap")
        assert self.config({**OWN, "swap": ["title", "body"]}, extra_passes="swap")

    def test_formats_by_suffix(self, tmp_path):
        for name in ("a.csv", "a.parquet", "a.pq", "a.jsonl", "a"):
            assert RunConfig(output=tmp_path / name)
        with pytest.raises(ConfigError, match=r"\.parquet or \.jsonl"):
            RunConfig(output=tmp_path / "a.json")


tmp_file = ROOT / "run.py"


def test_a_template_with_all_that_has_a_meaning_elsewhere():
    task = make_task({"template": "100%s {{{a}}} %(a)s {b}{a}", "classes": 2})
    examples = Examples(("1", "2"), {"b": ("B", "{a}"), "a": ("%d", "x\ud83d")})
    rendered = render_prompts(examples, text_format="raw", task=task)
    assert rendered == ["100%s {%d} %(a)s B%d", "100%s {x} %(a)s {a}x"]


TYPED = make_task({**OWN, "keep-columns": ["number", "when", "many", "title"]})


class TestReading:
    def test_json_lines(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [
            {"key": 9007199254740993, "title": "a\u2028b", "body": None, "number": 1.5},
            {"key": "007", "title": "c\ud83d", "when": {"x": [1]}, "many": [], "other": 3},
        ]
        lines = "\r\n".join(json.dumps(row, ensure_ascii=row["key"] == "007") for row in rows)
        path.write_text("\ufeff" + lines + "\n\n", encoding="utf-8", newline="")
        examples = read_examples(path, TYPED)
        assert examples.ids == ("9007199254740993", "007")
        assert examples.columns == {"title": ("a\u2028b", "c\ud83d"), "body": ("", "")}
        assert examples.kept["key"] == [9007199254740993, "007"]
        assert examples.kept["when"] == [None, {"x": [1]}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                '{"key": 1, "title": "a", "body": "b"}\n{',
                "not a well-formed JSON lines file: line 2",
            ),
            ("[1]", r"an object|a JSON object.*Received: \[1\] in line 1"),
            ('{"key": 1, "title": "a"}', "body is missing"),
            ('\n{"key": 1.5, "title": "a", "body": "b"}', "whole numbers.*1.5 in line 2"),
            ('{"key": true, "title": "a", "body": "b"}', "key must hold text or whole numbers"),
            ('{"key": 1, "title": 2, "body": "b"}', "title must hold text. Received: title = 2"),
            ('{"key": null, "title": "a", "body": "b"}', "an empty key in row 1"),
            ('{"key": 1, "title": "a", "body": "b"}\n' * 2, "'1' in rows 1 and 2"),
            ("[" * 100_000, "not a well-formed JSON lines"),
        ],
    )
    def test_json_lines_that_are_wrong(self, tmp_path, text, message):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_examples(path, make_task(OWN))

    def test_a_column_that_is_to_be_kept_must_be_there(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("key,title,body,number,when\n1,t,b,2,3\n")
        with pytest.raises(DataError, match="many is missing"):
            read_examples(path, TYPED)


class TestWriting:
    IDS = ("1", "02", 'x,"y"\r')

    def test_the_contests_csv_has_not_changed(self, tmp_path):
        values = np.array([[1 / 3, 1e-5, 0.5], [0, 1, 1e-17]])
        write_submission(tmp_path / "s.csv", ["07", 'a,"b"'], values)
        assert (tmp_path / "s.csv").read_bytes() == (
            b"id,winner_model_a,winner_model_b,winner_tie\n"
            b'07,0.3333333333333333,1e-05,0.5\n"a,""b""",0.0,1.0,1e-17\n'
        )
        write_submission(tmp_path / "s.csv", ["a\rb"], values[:1])
        assert b'\n"a\rb",0.3333333333333333,' in (tmp_path / "s.csv").read_bytes()

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
    @pytest.mark.parametrize("head", ["softmax", "none"])
    def test_every_format_reads_back(self, tmp_path, suffix, head):
        table = {"id-column": "key", "template": "{t}", "head": head, "keep-columns": ["t", "u"]}
        task = make_task(table if head == "none" else {**table, "label-columns": ["n", "y"]})
        kept = {"t": ("a\nb", "\ud800", ""), "u": ("1", "é", "}")}
        values = np.array([[1e-9, 3e38], [-0.0, 0.1], [7, -2.5]], dtype=np.float32)
        path = tmp_path / f"out{suffix}"
        write_submission(path, self.IDS, values, task=task, kept=kept)
        read = [path.name for path in tmp_path.iterdir()]
        assert read == [path.name]
        if suffix == ".csv":
            with open(path, newline="", encoding="utf-8", errors="surrogatepass") as file:
                header, *rows = csv.reader(file)
            answers = ["embedding_0", "embedding_1"] if head == "none" else ["n", "y"]
            assert header == ["key", "t", "u", *answers]
            numbers = [row[3:] for row in rows]
            cells = list(zip(*(row[:3] for row in rows), strict=True))
        else:
            if suffix == ".parquet":
                columns = pq.read_table(path).to_pydict()
            else:
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                columns = {name: [row[name] for row in rows] for name in rows[0]}
            assert list(columns) == list(task.output_columns)
            *copied, last = columns.values()
            numbers = last if head == "none" else list(zip(copied.pop(), last, strict=True))
            cells = [tuple(column) for column in copied]
        broken = "\ufffd" if suffix == ".parquet" else chr(0xD800)
        assert cells == [self.IDS, ("a\nb", broken, ""), kept["u"]]
        assert (np.array(numbers, dtype=np.float32) == values).all()

    def test_types_are_kept_where_the_format_has_them(self, tmp_path):
        when = pa.array([86_400_000_000, None, 0], pa.timestamp("us"))
        table = pa.table(
            {
                "key": pa.array([3, 2**40, 1], pa.int64()), "title": ["a", None, "c"],
                "body": ["x", "y", "z"], "number": pa.array([1.5, None, float("nan")]),
                "when": when, "many": [[1, 2], None, []],
            }
        )  # fmt: skip
        pq.write_table(table, tmp_path / "in.parquet")
        examples = read_examples(tmp_path / "in.parquet", TYPED)
        assert examples.ids == ("3", "1099511627776", "1")
        values = np.full((3, 2), 0.5)
        for suffix in (".parquet", ".jsonl", ".csv"):
            path = tmp_path / f"out{suffix}"
            write_submission(path, examples.ids, values, task=TYPED, kept=examples.kept)
        written = pq.read_table(tmp_path / "out.parquet")
        for name in ("key", "number", "when", "many", "title"):
            assert written.schema.field(name).type == table.schema.field(name).type
            # As text: NaN equals nothing.
            assert str(written[name].to_pylist()) == str(table[name].to_pylist())
        first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        assert (first["key"], first["number"], first["many"]) == (3, 1.5, [1, 2])
        assert (second["number"], second["when"], third["number"]) == (None, None, None)
        lines = (tmp_path / "out.csv").read_text().splitlines()
        assert lines[0] == "key,number,when,many,title,no,yes"
        assert lines[1] == '3,1.5,1970-01-02 00:00:00.000000,"[1, 2]",a,0.5,0.5'
        assert lines[2] == "1099511627776,,,,,0.5,0.5"

    def test_from_json_lines_to_the_others(self, tmp_path):
        path = tmp_path / "in.jsonl"
        rows = [
            {"key": 1, "title": "t", "body": "b", "number": 1, "when": "x", "many": [1, "a"]},
            {"key": 2, "title": "t", "body": "b", "number": 2, "when": 5, "many": None},
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        examples, values = read_examples(path, TYPED), np.full((2, 2), 0.5)
        for suffix in (".parquet", ".jsonl"):
            path = tmp_path / f"out{suffix}"
            write_submission(path, examples.ids, values, task=TYPED, kept=examples.kept)
        written = pq.read_table(tmp_path / "out.parquet").to_pydict()
        assert (written["key"], written["number"]) == ([1, 2], [1, 2])
        # What no type holds together is text.
        assert (written["when"], written["many"]) == (["x", "5"], ['[1, "a"]', ""])
        again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert again[0] == {"key": 1, "number": 1, "when": "x", "many": [1, "a"], "title": "t",
                            "no": 0.5, "yes": 0.5}  # fmt: skip

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
    def test_no_rows_and_the_rehearsal(self, tmp_path, suffix):
        task = make_task({"template": "{t}", "head": "none"})
        path = tmp_path / f"out{suffix}"
        assert rehearse(path, ["1"] * 5, task=task, width=4) > 0
        assert rehearse(path, ["1"] * 5) > 0
        assert list(tmp_path.iterdir()) == []
        write_submission(path, [], np.zeros((0, 4), np.float32), task=task)
        write_submission(tmp_path / f"contest{suffix}", [], np.zeros((0, 3)))
        if suffix == ".csv":
            assert path.read_text() == "id,embedding_0,embedding_1,embedding_2,embedding_3\n"


class TestMerging:
    @pytest.mark.parametrize(
        ("head", "sound", "unsound"),
        [
            ("sigmoid", [0.9, 0.9], [[1.1, 0.5], [-0.1, 0.5]]),
            ("regression", [-7.5, 1e30], []),
            ("none", [-7.5, 1e30], []),
        ],
    )
    def test_what_each_head_may_say(self, head, sound, unsound):
        for row in [sound, *unsound, [np.nan, 0], [np.inf, 0]]:
            merger = Merger(["a"], 2, head)
            merger.add((0,), np.array([row], np.float32), how="predicted", lengths=[1])
            if row is sound:
                assert (merger.finish() == np.array([row], np.float32)).all()
                assert merger.finish().dtype == np.float32
            else:
                with pytest.raises(MergeError, match="id a"):
                    merger.finish()

    def test_the_mean_stands_for_what_is_missing(self):
        for head, nothing in {"sigmoid": 0.5, "regression": 0, "none": 0}.items():
            merger = Merger(["a", "b", "c"], 2, head)
            assert merger.mean().tolist() == [nothing] * 2
            values = np.array([[0.25, 1], [0.75, 0]], np.float32)
            merger.add((0, 2), values, how="predicted", lengths=[1, 1])
            assert merger.mean().tolist() == [0.5, 0.5]

    def test_a_journal_of_numbers_that_are_no_probabilities(self, tmp_path):
        prints = Fingerprint({"head": "x"})
        options = {"fingerprint": prints, "ids": ["a", "b"], "classes": 2, "resume": "require"}
        values = np.array([[-3.25, 1e20]], np.float32)
        path = tmp_path / "j"
        with Journal.open(path, **{**options, "resume": "auto"}, head="regression") as journal:
            journal.add([1], values, how="predicted", worker="0", lengths=[3])
        with Journal.open(path, **options, head="none") as journal:
            assert (journal.done().probabilities == values).all()
        with pytest.raises(ConfigError, match="does not hold probabilities"):
            Journal.open(path, **options, head="sigmoid")

    def test_how_far_a_quantized_regression_lies(self):
        ours, reference = np.array([[1.0, 2], [3, 4]]), np.array([[2.0, 1], [3, 4.5]])
        figures = compare(ours, reference, seconds=1, head="regression")
        assert figures["max_abs_difference"] == 1
        assert "likeliest" not in describe("int8", figures)
        assert "likeliest class changed in 1" in describe(
            "int8", compare(ours, reference, seconds=1)
        )


def sigmoid(sums):
    return 1 / (1 + np.exp(-sums))


# The contest's rows under other names, so that the plain Keras loop's texts are these too.
RENAMED = {"id": "key", "prompt": "question", "response_a": "left", "response_b": "right"}
TEMPLATE = CONTEST.template
for old, new in RENAMED.items():
    TEMPLATE = TEMPLATE.replace(f"{{{old}}}", f"{{{new}}}")


def written_task(folder, head, **table):
    labels = () if head == "none" else tuple("xyz")
    task = Task(
        id_column="key", text_columns=("question", "left", "right"), template=TEMPLATE,
        head=head, label_columns=labels, keep_columns=("question",), **table,
    )  # fmt: skip
    path = folder / f"{head}.toml"
    path.write_text(task.as_toml(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def renamed_rows(test_set, tmp_path_factory):
    """The test set as JSON lines."""
    path = tmp_path_factory.mktemp("renamed") / "rows.jsonl"
    table = pd.read_csv(test_set, dtype=str, keep_default_na=False).rename(columns=RENAMED)
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    return path


def flags_of(model, head, pooling="mean"):
    flags = [*("--pooling", pooling, "--sequence-length", LENGTH), *model.flags()]
    return flags[: flags.index("--head-kernel")] if head == "none" else flags


def expected(model, answers, head, pooling="mean"):
    states = answers[f"raw {pooling} states"]
    sums = states @ np.load(model.folder / "kernel.npy") + np.load(model.folder / "bias.npy")
    return {"sigmoid": sigmoid(sums), "regression": sums, "none": states}[head]


SUFFIXES = {"sigmoid": ".jsonl", "regression": ".parquet", "none": ".csv"}
ONE_SHAPE = "padded-mean"  # to compile, where runs share a process and the tests' time


def numbers(path):
    """The ids and answers that a run of a renamed task wrote."""
    if path.suffix == ".jsonl":
        table = pd.read_json(path, lines=True, dtype=False)
    elif path.suffix == ".parquet":
        table = pd.read_parquet(path)
    else:
        table = pd.read_csv(path, dtype={"key": str}, keep_default_na=False)
    assert list(table.columns[:2]) == ["key", "question"]
    return table["key"].tolist(), table.iloc[:, 2:].to_numpy()


@pytest.fixture(scope="module")
def done(models, renamed_rows, cache, warm, tmp_path_factory):
    """What several runs in one process left: folder, and exit code and words of each."""
    folder = tmp_path_factory.mktemp("tasks")
    model = models["gemma2"]
    asked = {}
    for head, suffix in SUFFIXES.items():
        config = written_task(folder, head)
        job = ["--input", renamed_rows, "--config", config, *flags_of(model, head, ONE_SHAPE)]
        asked[head] = ["--mode", "single", *job, "--output", folder / f"{head}{suffix}"]
    again = asked["sigmoid"]
    asked["resumed"] = [*again, "--resume", "require", "--report", folder / "resumed.json"]
    # Another kind of head is another run, whatever the files.
    other = written_task(folder, "softmax")
    asked["other head"] = [*again[:-1], folder / "other.csv", "--config", other,
                           "--journal", folder / "sigmoid.jsonl.journal"]  # fmt: skip
    make = {"script": EXAMPLES / "sentiment" / "make_model.py", "arguments": [folder / "model"]}
    asked["make"] = make
    here = folder / "model"
    asked["sentiment"] = [
        *("--config", EXAMPLES / "sentiment" / "config.toml", "--preset", here / "preset"),
        *("--head-kernel", here / "head_kernel.npy", "--head-bias", here / "head_bias.npy"),
        *("--output", folder / "sentiment.csv"),
    ]
    asked["embeddings"] = [
        *("--config", EXAMPLES / "embeddings" / "config.toml", "--preset", model.preset),
        *("--output", folder / "embeddings.parquet"),
    ]
    lines = [
        json.dumps([*map(str, one)] if isinstance(one, list) else one, default=str)
        for one in asked.values()
    ]
    (folder / "asked.txt").write_text("\n".join(lines))
    process = warm.run(
        [folder / "asked.txt"],
        environment(cache),
        script=ROOT / "tests" / "support" / "run_many.py",
        cwd=ROOT,
        timeout=LONGEST_RUN_S,
    )
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(answers) == len(asked), process.stderr
    return folder, dict(zip(asked, answers, strict=True))


@pytest.mark.parametrize("head", list(SUFFIXES))
def test_each_head_equals_the_keras_loop(done, models, reference, renamed_rows, head):
    folder, said = done
    assert said[head][0] == 0, said[head][1]
    ids, answers = numbers(folder / f"{head}{SUFFIXES[head]}")
    if head == "regression":
        assert answers.dtype == np.float32
    assert ids == [json.loads(line)["key"] for line in renamed_rows.read_text().splitlines()]
    right = expected(models["gemma2"], reference(models["gemma2"]), head, ONE_SHAPE)
    assert answers.shape == right.shape
    assert np.abs(answers - right).max() < TOLERANCE
    # Else a constant would do.
    assert right.std(axis=0).min() > 0.01
    rows = pd.read_csv(folder / f"{head}{SUFFIXES[head]}.rows.csv", dtype=str)
    assert rows["key"].tolist() == ids


def test_a_sigmoid_is_resumed_and_another_head_is_not(done):
    folder, said = done
    assert said["resumed"][0] == 0, said["resumed"][1]
    report = json.loads((folder / "resumed.json").read_text())
    assert report["rows"]["resumed"] == report["rows"]["total"] > 0
    assert report["config"]["task"]["head"] == "sigmoid"
    assert said["other head"][0] == 0, said["other head"][1]
    assert "kind of head was sigmoid, is softmax" in said["other head"][1]


def test_the_sentiment_example(done):
    folder, said = done
    assert said["make"][0] == said["sentiment"][0] == 0, said["sentiment"][1]
    with open(EXAMPLES / "sentiment" / "reviews.csv", newline="", encoding="utf-8") as file:
        reviews = list(csv.DictReader(file))
    table = pd.read_csv(folder / "sentiment.csv", dtype={"review": str})
    assert list(table.columns) == ["review", "product", "negative", "positive"]
    assert table["review"].tolist() == [row["review"] for row in reviews]
    assert table["product"].tolist() == [row["product"] for row in reviews]
    assert np.abs(table.iloc[:, 2:].sum(axis=1) - 1).max() < 1e-12
    assert table["positive"].nunique() == len(reviews)


def test_the_embeddings_example(done):
    folder, said = done
    assert said["embeddings"][0] == 0, said["embeddings"][1]
    with open(EXAMPLES / "embeddings" / "notes.jsonl", encoding="utf-8") as file:
        notes = [json.loads(line) for line in file]
    table = pq.read_table(folder / "embeddings.parquet").to_pydict()
    assert list(table) == ["note", "topic", "written", "embedding"]
    for name in ("note", "topic", "written"):
        assert table[name] == [note[name] for note in notes]
    vectors = np.array(table["embedding"])
    assert vectors.shape == (len(notes), 48)
    assert np.unique(vectors.round(4), axis=0).shape == vectors.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "mode"),
    [
        ("none", ("data-parallel",)),
        ("regression", ("data-parallel",)),
        ("none", ("model-parallel", "--strategy", "pipeline")),
        ("none", ("model-parallel", "--strategy", "tensor")),
        ("sigmoid", ("model-parallel", "--strategy", "pipeline")),
    ],
)
def test_heads_over_workers(cli, models, reference, renamed_rows, tmp_path, head, mode):
    model, output = models["gemma2"], tmp_path / f"out{SUFFIXES[head]}"
    job = ["--config", written_task(tmp_path, head), "--input", renamed_rows, "--output", output]
    done = cli("--mode", *map(str, (*mode, "--num-workers", 2, *flags_of(model, head), *job)))
    assert done.returncode == 0, done.stderr
    _, answers = numbers(output)
    right = expected(model, reference(model), head)
    assert np.abs(answers - right).max() < TOLERANCE


@pytest.mark.slow
def test_plan_calibrate_and_prepare_know_the_task(cli, models, renamed_rows, tmp_path):
    model = models["gemma2"]
    config = written_task(tmp_path, "none")
    job = [*map(str, ("--config", config, "--input", renamed_rows, *flags_of(model, "none")))]
    output = tmp_path / "out.parquet"
    plan = cli("--mode", "single", "--plan", "--calibrate", *job, "--output", str(output))
    assert plan.returncode == 0, plan.stderr
    command = json.loads((tmp_path / "out.parquet.plan.json").read_text())["recommendation"]
    assert command["command"][2:4] == ["--config", "FILE.toml"]
    assert "--head-kernel" not in command["command"]
    prepared = cli("prepare", *job, "--output", str(tmp_path / "int8"))
    assert prepared.returncode == 0, prepared.stderr
    assert "rows' numbers (on rows.jsonl" in prepared.stdout
