"""The stages that need no model: files and tables in, records out."""

import csv
import io
import json
import re
import shutil
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.common.errors import ConfigError, DataError, MergeError
from runner.common.files import write_whole
from runner.common.records import Examples, TokenTable
from runner.config.run_config import RunConfig, make_config
from runner.data.dataset import read_examples
from runner.data.prompts import render_prompts
from runner.data.submission import write_submission
from runner.data.tokenization import tokenize
from runner.demo import make_rows
from runner.preset.reader import read_preset
from runner.preset.tokenizer_files import BytePairOptions, TokenizerFiles
from runner.results.table import Merger
from runner.telemetry.progress import Progress
from tests.conftest import LENGTH, SHARED, wait_until
from tests.support.stored import made_once

COLUMNS = ["id", "prompt", "response_a", "response_b"]
cells = st.text(st.characters(codec="utf-8"), max_size=12)
ids = st.text(st.characters(codec="utf-8", min_codepoint=33), min_size=1, max_size=8)


class TestDataset:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(ids, cells, cells, cells), max_size=8, unique_by=lambda row: row[0]))
    def test_csv_cells_survive_as_spelled(self, tmp_path_factory, rows):
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([COLUMNS, *rows])
        path = tmp_path_factory.mktemp("csv") / "t.csv"
        path.write_bytes(buffer.getvalue().encode())
        examples = read_examples(path)
        assert examples.ids == tuple(row[0] for row in rows)
        for place, name in enumerate(COLUMNS[1:], start=1):
            assert examples.columns[name] == tuple(row[place] for row in rows)

    def test_csv_by_hand(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_bytes(
            b"\xef\xbb\xbfother,response_b,id,prompt,response_a\r\n"
            b'x,NA,007,"a\r\n""b""",null\r\n'
            b"\r\n"
            b"y,,18446744073709551615\r\n"
            b"z,b,3.0,p\xed\xa0\x80q,a\x00\r\n"
        )
        examples = read_examples(path)
        assert examples.ids == ("007", "18446744073709551615", "3.0")
        assert examples.columns["prompt"] == ('a\r\n"b"', "", "p\ud800q")
        assert examples.columns["response_a"] == ("null", "", "a\x00")
        assert examples.columns["response_b"] == ("NA", "", "b")

    @pytest.mark.parametrize("kind", ["uint32", "int64", "str", "category"])
    def test_parquet(self, tmp_path, kind):
        path = tmp_path / "t.parquet"
        numbers = ["4294967295", "7"]
        table = pd.DataFrame(
            {
                "id": numbers,
                "prompt": ["p", None],
                "response_a": ["", "é"],
                "response_b": ["b", "c"],
            }
        )
        table["id"] = table["id"].astype(kind)
        table.to_parquet(path)
        examples = read_examples(path)
        assert examples.ids == ("4294967295", "7")
        assert examples.columns["prompt"] == ("p", "")
        assert examples.columns["response_a"] == ("", "é")

    def test_parquet_null_id(self, tmp_path):
        path = tmp_path / "t.parquet"
        pd.DataFrame([("x", "p", "a", "b"), (None, "p", "a", "b")], columns=COLUMNS).to_parquet(
            path
        )
        with pytest.raises(DataError, match="empty id in row 2"):
            read_examples(path)


def examples_of(*cells):
    return Examples(("9",), dict(zip(COLUMNS[1:], ((cell,) for cell in cells), strict=True)))


class TestPrompts:
    def test_raw_is_the_notebooks_text(self):
        rendered = render_prompts(examples_of('["p"]', "a\ud83d", ""), text_format="raw")
        assert rendered == ['\n\nPROMPT\n\n["p"]\n\nRESPONSE:\n\na\n\nRESPONSE:\n\n']

    def test_turns_are_decoded_and_joined(self):
        examples = examples_of('["one", null, "three"]', '["\\ud83d\\u00e9\\/"]', "")
        assert render_prompts(examples, text_format="turns") == [
            "\n\nPROMPT\n\none\n\nthree\n\nRESPONSE:\n\né/\n\nRESPONSE:\n\n"
        ]

    @pytest.mark.parametrize(
        "cell", ["plain", "null", "3", '"s"', "[1]", '[["a"]]', "{}", "[" * 9999]
    )
    def test_what_is_no_list_of_turns(self, cell):
        with pytest.raises(DataError, match=r"Row 1 \(id 9\), column response_a"):
            render_prompts(examples_of("[]", cell, "[]"), text_format="turns")


class TestTokens:
    @pytest.mark.parametrize(
        ("name", "length", "every"),
        [
            ("arena", LENGTH, 10),
            *(
                pytest.param(name, length, 1 if length == LENGTH else 100, marks=pytest.mark.slow)
                for name in ("arena", "gemma3", "llama3", "qwen", "qwen3")
                for length in (1, 2, 3, 16, LENGTH)
            ),
        ],
    )
    def test_as_the_presets_preprocessor(
        self, models, run_script, arena_rows, stored, name, length, every
    ):
        """Token for token, on real rows with the real vocabulary where they are here."""
        examples = read_examples(arena_rows)
        texts = ["", "a", " b  c ", "<bos>x<eos><start_of_turn>\x00\n", "日本語🙂"]
        texts += ["<|begin_of_text|>x<|im_end|> <|endoftext|><|eot_id|>y", "<|im_start|><|im_end"]
        texts += ["it's I'LL 1234567 3.14\r\n\n\n\t x\u00a0y\u3000 ", "<|endoftext|>", "?" * 300]
        texts += render_prompts(examples, text_format="turns")[::every]
        asked, model = json.dumps(texts), models[name]
        made = stored / f"tokens-{name}-{length}-{zlib.crc32(asked.encode())}"
        with made_once(made) as target:
            if target is not None:
                (target / "texts.json").write_text(asked)
                arguments = (target / "texts.json", length, target / "tokens.npz")
                run_script("preprocess.py", model.preset, *arguments)
        expected = np.load(made / "tokens.npz")
        table = tokenize(texts, read_preset(model.preset).tokenizer, sequence_length=length)
        tokens, lengths = table.batch_arrays(tuple(range(len(texts))), len(texts), length)
        assert np.array_equal(lengths, expected["padding_mask"].sum(axis=1))
        assert np.array_equal(tokens, expected["token_ids"])
        assert (lengths == length).any()
        if name == "arena" and length >= 16:
            assert SHARED.is_dir() == (expected["token_ids"].max() > 5000)
        assert (table.pad_id != 0) == (name == "qwen3")

    @pytest.mark.parametrize(
        ("name", "file", "change", "message"),
        [
            ("qwen", "assets/tokenizer/merges.txt", None, r"is missing a file.*merges\.txt"),
            ("qwen", "assets/tokenizer/merges.txt", "a b c\n", "not a byte-pair encoding"),
            ("qwen", "assets/tokenizer/merges.txt", "Ġ nowhere\n", "not a byte-pair encoding"),
            ("qwen", "assets/tokenizer/vocabulary.json", "{", "not a byte-pair encoding"),
            ("qwen3", "assets/tokenizer/vocabulary.json", '{"<|im_end|>": 0}', "endoftext"),
            ("llama3", "tokenizer.json", {"eos_token": "<|eot_id|>"}, "must not set eos_token"),
            ("gemma3", "tokenizer.json", {"add_bos": True}, "must not set add_bos"),
        ],
    )
    def test_damaged_tokenizers(self, models, tmp_path, name, file, change, message):
        preset = tmp_path / "preset"
        shutil.copytree(models[name].preset, preset)
        if file.endswith("merges.txt") and change is None:
            (preset / file).unlink()
        elif isinstance(change, dict):
            content = json.loads((preset / file).read_text())
            (preset / file).write_text(json.dumps(content | {"config": content["config"] | change}))
        else:
            merges = preset / "assets/tokenizer/merges.txt"
            merges.write_text("")
            (preset / file).write_text(change, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            tokenize(["x"], read_preset(preset).tokenizer, sequence_length=4)

    def test_byte_pairs_by_hand(self, tmp_path):
        """Special tokens are found in the text, and merges run over spaces."""
        (tmp_path / "vocabulary.json").write_text(
            json.dumps({"a": 0, "b": 1, "Ġ": 2, "ab": 3, "bĠ": 4, "abĠ": 5, "<|s|>": 6, "<|p|>": 7})
        )
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab Ġ\nb Ġ\n", encoding="utf-8")
        files = TokenizerFiles(
            class_name="QwenTokenizer",
            vocabulary=tmp_path / "vocabulary.json",
            start_token=None,
            end_token="<|s|>",
            pad_token="<|p|>",
            add_start=False,
            add_end=True,
            byte_pairs=BytePairOptions(tmp_path / "merges.txt", ("<|s|>",), False),
        )
        table = tokenize(["ab a", "b <|s|>ab", "<|p", ""], files, sequence_length=5)
        tokens, lengths = table.batch_arrays((0, 1, 2, 3), 4, 5)
        # Of "<|p" no byte is in this vocabulary, so nothing but the end token is left.
        assert tokens.tolist() == [[5, 0, 6, 7, 7], [4, 6, 3, 6, 7], [6, 7, 7, 7, 7], [6] + [7] * 4]
        assert lengths.tolist() == [3, 4, 1, 1]

    def test_batch_arrays(self):
        table = TokenTable(np.arange(1, 7, dtype=np.int32), np.array([0, 3, 3, 4, 6]))
        tokens, lengths = table.batch_arrays((3, 0, 1), 4, 4)
        assert tokens.tolist() == [[5, 6, 0, 0], [1, 2, 3, 0], [0] * 4, [0] * 4]
        assert lengths.tolist() == [2, 3, 0, 0]
        assert table.lengths.tolist() == [3, 0, 1, 2]
        tokens, lengths = table.batch_arrays((3, 0), 2, 2)
        assert tokens.tolist() == [[5, 6], [1, 2]], "cut, as at that sequence length"
        assert lengths.tolist() == [2, 2]
        tokens, _ = TokenTable(table.values, table.offsets, pad_id=9).batch_arrays((2, 1), 2, 2)
        assert tokens.tolist() == [[4, 9], [9, 9]]


def add(merger, rows, probabilities, **named):
    named = {"how": "predicted", "lengths": [1] * len(rows)} | named
    merger.add(rows, np.array(probabilities, dtype=np.float32), **named)


class TestMerge:
    def test_any_order_gives_the_order_of_the_test_set(self):
        merger = Merger(["a", "b", "c"], 3)
        add(merger, (2, 0), [[0.2, 0.3, 0.5], [1, 0, 0]], lengths=[7, 8])
        assert merger.missing() == [1]
        add(merger, (1,), [[0, 0.5, 0.50001]], how="shortened")
        table = merger.finish()
        assert table == pytest.approx(
            np.array([[1, 0, 0], [0, 0.5, 0.5], [0.2, 0.3, 0.5]]), abs=1e-5
        )
        assert np.abs(table.sum(axis=1) - 1).max() < 1e-15
        assert merger.how == ["predicted", "shortened", "predicted"]
        assert merger.lengths.tolist() == [8, 1, 7]
        assert merger.missing() == []
        assert merger.unfinished() == [1]
        add(merger, (1,), [[1, 0, 0]], again=True)
        assert merger.finish()[1].tolist() == [1, 0, 0]

    def test_the_mean_of_what_was_predicted(self):
        merger = Merger(["a", "b", "c"], 3)
        assert merger.mean().tolist() == [1 / 3] * 3
        add(merger, (0, 2), [[0.5, 0.25, 0.25], [1, 0, 0]])
        add(merger, (1,), [[0, 0, 1]], how="filled")
        assert merger.mean().tolist() == [0.75, 0.125, 0.125]

    def test_what_it_refuses(self):
        even = [[1 / 3] * 3]
        merger = Merger(["a", "b"], 3)
        add(merger, (0,), even)
        with pytest.raises(MergeError, match="1 rows have no result: id b"):
            merger.finish()
        with pytest.raises(MergeError, match=r"repeats rows\. Received: id a"):
            add(merger, (0,), even)
        with pytest.raises(MergeError, match="repeats rows"):
            add(merger, (1, 1), even * 2)
        with pytest.raises(MergeError, match="not there"):
            add(merger, (2,), even)
        with pytest.raises(MergeError, match="shape"):
            add(merger, (1,), [[0.5, 0.5]])

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([np.nan] * 3, "NaN"),
            ([np.inf, 0, 0], "NaN"),
            ([0.5] * 3, "not prob"),
            ([2, -1, 0], "not prob"),
        ],
    )
    def test_rows_that_are_no_probabilities(self, row, message):
        merger = Merger(["a", "bad"], 3)
        add(merger, (0, 1), [[1, 0, 0], row])
        with pytest.raises(MergeError, match=f"{message}.*id bad"):
            merger.finish()


class TestSubmission:
    def test_ids_as_spelled(self, tmp_path):
        path = tmp_path / "s.csv"
        names = ["007", "4294967295", 'a,"b"', "é"]
        write_submission(path, names, np.full((4, 3), 1 / 3))
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert [row[0] for row in rows[1:]] == names
        assert float(rows[1][1]) == 1 / 3
        assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]

    def test_the_old_file_stands_until_the_new_one_is_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "s.csv"
        path.write_text("old")

        def fail(*_):
            raise OSError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", fail)
            with pytest.raises(OSError, match="disk full"):
                write_whole(path, "new")
        assert path.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 1
        write_whole(path, "new")
        assert path.read_text() == "new"


class TestConfig:
    def test_flags_win_over_the_file(self, tmp_path):
        path = tmp_path / "run.toml"
        path.write_text(
            'sequence-length = 64\nnum_workers = "auto"\ninput = "x.csv"\npooling = "last"'
        )
        config = make_config({"pooling": "mean"}, path)
        assert (config.sequence_length, config.num_workers, config.pooling) == (64, None, "mean")
        assert str(config.input) == "x.csv"
        assert str(config.report_path) == "submission.csv.report.json"

    def test_it_is_frozen_and_keyword_only(self):
        with pytest.raises(AttributeError):
            RunConfig().mode = "single"  # type: ignore[misc]
        with pytest.raises(TypeError):
            RunConfig("single")  # type: ignore[misc]

    @pytest.mark.parametrize(
        "text", ["a = ", "mode = 1", "verbose = 1", "num_workers = 1.5", "sequence_length = true"]
    )
    def test_bad_files(self, tmp_path, text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        with pytest.raises(ConfigError):
            make_config({}, path)


def test_demo_rows_are_seeded_and_arena_like():
    rows = make_rows(300, seed=1)
    assert rows == make_rows(300, seed=1)
    assert rows != make_rows(300, seed=2)
    assert len({row[0] for row in rows}) == 300
    assert any(int(row[0]) > 2**31 for row in rows)
    cells = [json.loads(cell) for row in rows for cell in row[1:]]
    assert {len(cell) for cell in cells} == {1, 2}
    assert any(None in cell for cell in cells)
    words = np.array([sum(len(json.dumps(c).split()) for c in row[1:]) for row in rows])
    assert words.max() > 4 * np.median(words)


class TestProgress:
    def test_plain_lines(self, monkeypatch):
        monkeypatch.setattr("runner.telemetry.progress.REDRAW_S", 0.01)
        monkeypatch.setattr("runner.telemetry.progress.PLAIN_WAITING_S", 0.05)
        monkeypatch.setattr("runner.telemetry.progress.PLAIN_RUNNING_S", 0.05)
        stream = io.StringIO()

        def until(text):
            return wait_until(lambda: re.search(text, stream.getvalue()), text)

        with Progress(stream=stream) as progress:
            progress.phase("reading test.csv")
            progress.set_worker(0, "loading")
            until(r"\[\d:\d\d\] reading test.csv; w0 loading\n")
            progress.expect(rows=10, done=1)
            progress.advance(rows=1, tokens=5)
            until(r"2/10 rows, time left \?; w0 loading\n")
            progress.advance(rows=2, tokens=50)
            progress.forecast(left_s=75.0, slack_s=None)
            until(r"4/10 rows, [\d,]+ tokens/s, (1:1\d|0:\d\d) left; w0 loading\n")
            progress.forecast(left_s=75.0, slack_s=-12.0)
            until("left, 0:12 too long; w0 loading\n")
            progress.forecast(left_s=75.0, slack_s=3700.0)
            until("left, 1:01:40 to spare; w0 loading\n")
            for number in range(6):
                progress.set_worker(number, "compiling 1/8" if number else "busy")
            until("workers: 5 compiling, 1 busy\n")
