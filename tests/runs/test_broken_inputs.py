"""Files and flags of every broken kind: a clean exit 2, or a submission that is right.

`runner.cli.main` runs whole in a process of its own with a fake model (`tests/support/fakes.py`).
What is expected is worked out here without the runner: its own CSV parser, its own prompt, its own
probabilities. Each family of cases is a hypothesis strategy and a check; `make test` runs a few
cases of each, always the same, `make test-all` more than 2,000, new ones every time.
"""

import csv
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import Model, environment
from tests.support.fakes import Ended, FakeRunner, answer

COLUMNS = ("id", "prompt", "response_a", "response_b")
LENGTH = 48
# Far more than any case takes; a hang ends here.
LIMIT_S = 300
LEAST_CASES = 2000


@dataclass(frozen=True)
class Done:
    """How a case ended, and the submission it left, if any."""

    ended: Ended
    submission: bytes | None

    def is_refused(self, because: object = None) -> None:
        """Exit code 2, one or two lines, nothing written."""
        assert self.ended.code == 2, (because, self.ended)
        # A run that had to load before it could know has a line of progress before.
        lines = [line for line in self.ended.stderr.splitlines() if not line.startswith("[0:")]
        assert 1 <= len(lines) <= 2, self.ended
        assert lines[0].startswith("error: "), self.ended
        assert all(len(line) < 2000 for line in lines), self.ended
        assert "Traceback" not in self.ended.stderr
        assert self.submission is None

    def is_valid(self) -> tuple[list[str], np.ndarray]:
        """Exit code 0 and a sound submission; return its ids and probabilities."""
        assert self.ended.code == 0, self.ended
        assert self.submission is not None
        csv.field_size_limit(sys.maxsize)
        text = io.StringIO(self.submission.decode(), newline="")
        header, *rows = csv.reader(text, strict=True)
        assert header == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
        ids = [row[0] for row in rows]
        assert len(set(ids)) == len(ids)
        table = np.array([row[1:] for row in rows], dtype=float).reshape(-1, 3)
        assert np.isfinite(table).all()
        assert np.abs(table.sum(axis=1) - 1).max(initial=0) < 1e-9
        return ids, table


class Lab:
    """Runs cases, each in a fresh folder, and knows what the fake model answers."""

    def __init__(self, models: dict[str, Model], runner: FakeRunner, folder: Path) -> None:
        self._models, self._runner, self._folder = models, runner, folder
        vocabulary = models["gemma2"].preset / "assets" / "tokenizer" / "vocabulary.spm"
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.read_bytes())
        self.rows = table_of(csv_of(GOOD_ROWS))

    def run(
        self,
        data: bytes | None = None,
        *flags: str,
        suffix: str = ".csv",
        model: str = "gemma2",
        files: dict[str, bytes] | None = None,
        reads_weights: bool = False,
        output: str = "{}/out/submission.csv",
    ) -> Done:
        """Run on a test set, or on a good one.

        Args:
            flags: `{}` in them, and in output, is the case's folder.
            files: by their path in the model's folder, what stands there instead.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            (folder / "out").mkdir()
            rows = folder / f"rows{suffix}"
            rows.write_bytes(csv_of(GOOD_ROWS) if data is None else data)
            changed = self._with_files(self._models[model], files or {}, folder)
            argv = [
                *("--mode", "single", "--pooling", "mean", "--sequence-length", str(LENGTH)),
                *("--max-tokens-per-batch", "100", *changed.flags(), "--input", str(rows)),
                *(flag.replace("{}", str(folder)) for flag in (*flags, "--output", output)),
            ]
            ended = self._runner.run(argv, reads_weights=reads_weights, limit_s=LIMIT_S)
            output = folder / "out" / "submission.csv"
            return Done(ended, output.read_bytes() if output.exists() else None)
        finally:
            shutil.rmtree(folder)

    def file(self, name: str, model: str = "gemma2") -> bytes:
        """Return a sound file of a model's folder."""
        return (self._models[model].folder / name).read_bytes()

    def answers(self, done: Done, rows: Sequence[Sequence[str]], *, shown: object = None) -> None:
        """Assert that a case ended with a submission of exactly these rows, in order."""
        ids, table = done.is_valid()
        assert ids == [row[0] for row in rows], shown
        if rows:
            expected = np.stack([answer(self._tokens(row[1:])) for row in rows])
            assert np.abs(table - expected).max() < 1e-6, shown

    def answers_or_refuses(self, done: Done) -> None:
        """Where only the model's files are damaged: the good rows, or exit code 2."""
        if done.ended.code == 0:
            self.answers(done, self.rows)
        else:
            done.is_refused()

    def _tokens(self, cells: Sequence[str]) -> list[int]:
        text = "\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(cells)
        text = "".join(character for character in text if not "\ud800" <= character <= "\udfff")
        first, last = (self._pieces.piece_to_id(piece) for piece in ("<bos>", "<eos>"))
        ids = self._pieces.encode(text)[: LENGTH - 1]
        return [first, *ids, last][:LENGTH]

    def _with_files(self, model: Model, files: dict[str, bytes], folder: Path) -> Model:
        """A model's folder of links, except for the files that are given."""
        if not files:
            return model
        target = folder / "model"
        for path in model.folder.rglob("*"):
            copy = target / path.relative_to(model.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and str(copy.relative_to(target)) not in files:
                os.symlink(path, copy)
        for name, content in files.items():
            (target / name).write_bytes(content)
        return Model(target)


# What a CSV file says, worked out without the runner.


def table_of(data: bytes) -> list[list[str]] | None:
    """Return id and the three cells of each row, or None where the file must be refused."""
    try:
        text = data.decode("utf-8", errors="surrogatepass").removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    lines = parse_csv(text)
    if not lines or not lines[0]:
        return None
    header, *rows = lines
    rows = [row for row in rows if row]
    if any(header.count(name) != 1 for name in COLUMNS):
        return None
    if any(len(row) > len(header) for row in rows):
        return None
    full = [row + [""] * (len(header) - len(row)) for row in rows]
    table = [[row[header.index(name)] for name in COLUMNS] for row in full]
    return table if are_ids([row[0] for row in table]) else None


def are_ids(ids: list[str]) -> bool:
    surrogates = any("\ud800" <= character <= "\udfff" for value in ids for character in value)
    return all(ids) and len(set(ids)) == len(ids) and not surrogates


def parse_csv(text: str) -> list[list[str]] | None:
    """RFC 4180, with bare quotes inside a cell kept; None where a quote never closes or closes
    before more text."""
    lines: list[list[str]] = []
    line: list[str] = []
    place = 0
    while place < len(text):
        cell = ""
        if text[place] == '"':
            while True:
                end = text.find('"', place + 1)
                if end < 0:
                    return None
                cell += text[place + 1 : end]
                place = end + 1
                if text[place : place + 1] != '"':
                    break
                cell += '"'
            if text[place : place + 1] not in ("", ",", "\r", "\n"):
                return None
        else:
            end = place
            while end < len(text) and text[end] not in ",\r\n":
                end += 1
            cell, place = text[place:end], end
            if not line and not cell and text[place] in "\r\n":
                place += 1 + (text[place : place + 2] == "\r\n")
                lines.append([])
                continue
        line.append(cell)
        if text[place : place + 1] == ",":
            place += 1
            if place < len(text):
                continue
            line.append("")
        place += 1 + (text[place : place + 2] == "\r\n")
        lines.append(line)
        line = []
    return lines


def quoted(cell: str, *, always: bool = True) -> str:
    needs = always or cell == "" or any(character in cell for character in ',"\r\n')
    return '"' + cell.replace('"', '""') + '"' if needs else cell


def csv_of(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] = COLUMNS,
    *,
    end: str = "\n",
    always_quoted: bool = True,
) -> bytes:
    lines = (",".join(quoted(cell, always=always_quoted) for cell in row) for row in rows)
    text = "".join(line + end for line in (",".join(header), *lines))
    return text.encode("utf-8", errors="surrogatepass")


GOOD_ROWS = [
    ("007", "first prompt", "an answer, with a comma", 'a "quoted" one'),
    ("3.0", "two\nlines", "", "café 日本語"),
    ("id four", "x" * 300, '["a"]', "null"),
    ("4294967296", "last", "NA", "\\ud83d"),
]


# Strategies.

SURROGATES = "\ud800\ud83d\udc00\udfff"
characters = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(' ,"\r\n\x00\t\\[]{}\ufeff\u2028\x85\x1b'),
)
texts = st.text(characters, max_size=20)
odd_texts = st.text(characters | st.sampled_from(SURROGATES), max_size=20)
names = st.text(characters, min_size=1, max_size=10)
ids = st.one_of(
    names,
    st.sampled_from(["1", "1.0", "01", "+1", "-0", "1e3", "=1+1", "é", "e\u0301", " ", " 1"]),
    st.sampled_from(["NA", "nan", "NULL", "null", "None", "inf"]),
    st.sampled_from(["\u200b", "\r", "a\nb", "a\r\nb", '"', "\x00", "x" * 5000]),
    st.integers().map(str),
    st.floats().map(str),
)


@dataclass(frozen=True)
class Damage:
    """Cuts, flips, repeats and inserts bytes; a step is (kind, where, length, piece)."""

    steps: list[tuple[str, float, int, bytes]]

    def __call__(self, data: bytes) -> bytes:
        for kind, share, length, piece in self.steps:
            at = int(share * len(data))
            before, part, after = data[:at], data[at : at + length], data[at + length :]
            data = {
                "flip": before + bytes(byte ^ 0xFF for byte in part[:1]) + data[at + 1 :],
                "bit": before + bytes(byte ^ 1 << length % 8 for byte in part[:1]) + data[at + 1 :],
                "cut": before,
                "drop": before + after,
                "repeat": before + part * 2 + after,
                "insert": before + piece + part + after,
                "blank": before + bytes(len(part)) + after,
            }[kind]
        return data


def damage(pieces: Sequence[bytes] = (b"\x00", b"\xff" * 8)) -> st.SearchStrategy[Damage]:
    step = st.tuples(
        st.sampled_from(["flip", "bit", "cut", "drop", "repeat", "insert", "blank"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.sampled_from(pieces) | st.binary(min_size=1, max_size=6),
    )
    return st.lists(step, min_size=1, max_size=3).map(Damage)


@st.composite
def tables(draw: st.DrawFn, cells: st.SearchStrategy[str] = odd_texts) -> list[tuple[str, ...]]:
    keys = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    return [(key, *draw(st.tuples(cells, cells, cells))) for key in keys]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 10**12, 10**30, float("inf"), float("nan"), 1e300, 0.5])
    | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


# Families: each takes the lab and what was drawn, and asserts.


def check_csv(lab: Lab, data: bytes) -> None:
    """Whatever the bytes are: refused exactly where the parser here refuses them."""
    rows, done = table_of(data), lab.run(data)
    if rows is None:
        done.is_refused(data)
    else:
        lab.answers(done, rows, shown=data)


CSV_PIECES = (b'"', b'""', b",", b"\r", b"\n", b"\r\n", b"\n\n", b"\x00", b"\xef\xbb\xbf", b"\xff")


@st.composite
def damaged_csv(draw: st.DrawFn) -> bytes:
    data = csv_of(
        draw(tables()), end=draw(st.sampled_from(["\n", "\r\n"])), always_quoted=draw(st.booleans())
    )
    return draw(damage(CSV_PIECES))(data)


@st.composite
def csv_lines(draw: st.DrawFn) -> bytes:
    """Sound lines in any number and order, and some that are not sound."""
    good = csv_of([(str(number), "p", "a", "b") for number in range(4)]).splitlines(keepends=True)
    odd = [b"\n", b"\r\n", b",,,\n", b"5,p\n", b"6,p,a,b,c\n", b"7,p,a,b,\n", b'8,"p,a,b\n', b"9"]
    odd += [b'"10" ,p,a,b\n', b'11,p"q,a,b\n', b"12;p;a;b\n", b"13\tp\ta\tb\n", b" \n", b'""\n']
    return b"".join(draw(st.lists(st.sampled_from([*good, *good, *odd]), max_size=8)))


@st.composite
def sound_csv(draw: st.DrawFn) -> tuple[bytes, list[list[str]]]:
    """A table in one of the many spellings that CSV allows."""
    rows = draw(tables())
    more = draw(st.lists(names.filter(lambda name: name not in COLUMNS), max_size=2))
    header = draw(st.permutations([*COLUMNS, *more]))
    by_name = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    full = [[cells.get(name, "more") for name in header] for cells in by_name]
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    data = csv_of(
        full, [quoted(name) for name in header], end=end, always_quoted=draw(st.booleans())
    )
    if draw(st.booleans()):
        data = data.removesuffix(end.encode())
    if draw(st.booleans()):
        data += end.encode() * 2
    if draw(st.booleans()):
        data = b"\xef\xbb\xbf" + data
    return data, [[cells[name] for name in COLUMNS] for cells in by_name]


def check_sound_csv(lab: Lab, case: tuple[bytes, list[list[str]]]) -> None:
    data, rows = case
    done = lab.run(data)
    if are_ids([row[0] for row in rows]):
        lab.answers(done, rows, shown=data)
    else:
        done.is_refused(data)


def check_huge_cell(lab: Lab, case: tuple[str, int, int]) -> None:
    """A cell longer than the limit that Python's csv sets by itself."""
    text, times, place = case
    row = ["id", "p", "a", "b"]
    row[place] = text * (times // len(text))
    lab.answers(lab.run(csv_of([row])), [row])


ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "gb18030", "shift-jis", "utf-7")


@st.composite
def encoded_csv(draw: st.DrawFn) -> bytes:
    data = csv_of(draw(tables(texts))).decode()
    return data.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")


@st.composite
def csv_columns(draw: st.DrawFn) -> bytes:
    """Headers: missing, repeated, renamed, reordered."""
    odd = ["ID", "id ", " prompt", "Prompt", "response-a", "", "id\n", "idx"]
    header = draw(st.lists(st.sampled_from([*COLUMNS, *COLUMNS, *odd]) | names, max_size=6))
    spelled = [quoted(name) for name in header]
    return csv_of([[str(place) for place, _ in enumerate(header)]], spelled)


@st.composite
def csv_ids(draw: st.DrawFn) -> bytes:
    """Ids that are alike, or repeat, or are empty."""
    kinds = st.sampled_from(["1", "1.0", "01", "+1", "", "é", "e\u0301", "a", "A", "a ", "\ud83d"])
    keys = draw(st.lists(kinds | ids, min_size=1, max_size=5))
    if draw(st.booleans()):
        keys += keys[:1]
    return csv_of([(key, "p", "a", "b") for key in keys])


BAD_TURNS = ("[" + "9" * 6000 + "]", '["a",]', "['a']", '["\\ud83d"', '["\\x"]', "[NaN]", "[1e999]")
BAD_TURNS += (
    '["a"] x',
    "nul",
    "\ufeff[]",
    '["a\nb"]',
    '["a"',
    "[null, 1]",
    '[["a"]]',
    "[Infinity]",
)


@st.composite
def turn_cells(draw: st.DrawFn) -> tuple[str, str | None]:
    """A cell, and the text of its turns where it is a list of strings and nulls."""
    if draw(st.booleans()):
        turns = draw(st.lists(st.none() | odd_texts, max_size=3))
        cell = json.dumps(turns, ensure_ascii=draw(st.booleans()))
        return cell, "\n".join(turn or "" for turn in turns)
    depth = draw(st.sampled_from([3, 900, 20_000]))
    cell = draw(
        st.one_of(
            odd_texts,
            json_values.filter(
                lambda value: (
                    not isinstance(value, list)
                    or any(not isinstance(turn, str | None) for turn in value)
                )
            ).map(json.dumps),
            st.sampled_from(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth)),
            st.sampled_from(BAD_TURNS),
        )
    )
    if cell == "":
        return "", ""
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        return cell, None
    sound = isinstance(turns, list) and all(isinstance(turn, str | None) for turn in turns)
    return cell, "\n".join(turn or "" for turn in turns) if sound else None


def check_turns(lab: Lab, case: tuple[list[tuple[str, str | None]], str]) -> None:
    cells, key = case
    data = csv_of([(key, *(cell for cell, _ in cells)), ("other", "[]", "[]", "[]")])
    done = lab.run(data, "--text-format", "turns")
    if any(text is None for _, text in cells) or not are_ids([key]):
        done.is_refused(cells)
    else:
        lab.answers(done, [(key, *(text or "" for _, text in cells)), ("other", "", "", "")])
    if are_ids([key]):
        raw = [(key, *(cell for cell, _ in cells)), ("other", "[]", "[]", "[]")]
        lab.answers(lab.run(data), raw, shown=cells)


def parquet_of(columns: dict[str, pa.Array], **options: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
    pq.write_table(table, sink, **options)
    return sink.getvalue()


TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
)
ID_TYPES = (pa.int8(), pa.int16(), pa.uint32(), pa.int64(), pa.uint64())


@st.composite
def sound_parquet(draw: st.DrawFn) -> tuple[bytes, list[list[str]]]:
    size = draw(st.integers(0, 4))
    of_size = {"min_size": size, "max_size": size}
    if draw(st.booleans()):
        keys: list[Any] = draw(st.lists(st.integers(0, 100), unique=True, **of_size))
        key_type = draw(st.sampled_from(ID_TYPES))
    else:
        keys = draw(st.lists(ids, unique=True, **of_size))
        key_type = draw(st.sampled_from(TEXT_TYPES))
    columns = {"id": pa.array(keys, pa.string() if pa.types.is_dictionary(key_type) else key_type)}
    if pa.types.is_dictionary(key_type):
        columns["id"] = columns["id"].dictionary_encode()
    cells = []
    for name in COLUMNS[1:]:
        values = draw(st.lists(texts | st.none(), **of_size))
        kind = draw(st.sampled_from(TEXT_TYPES))
        if values.count(None) == len(values) and draw(st.booleans()):
            columns[name] = pa.nulls(len(values))
        elif pa.types.is_dictionary(kind):
            columns[name] = pa.array(values, pa.string()).dictionary_encode()
        else:
            columns[name] = pa.array(values, kind)
        cells.append([value or "" for value in values])
    columns["more"] = pa.array([1.5] * size)
    columns = {name: columns[name] for name in draw(st.permutations(list(columns)))}
    data = parquet_of(
        columns,
        row_group_size=draw(st.sampled_from([1, 2, 100])),
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        use_dictionary=draw(st.booleans()),
        store_schema=draw(st.booleans()),
    )
    return data, [list(row) for row in zip(map(str, keys), *cells, strict=True)]


def check_sound_parquet(lab: Lab, case: tuple[bytes, list[list[str]]]) -> None:
    data, rows = case
    lab.answers(lab.run(data, suffix=".parquet"), rows, shown=rows)


@st.composite
def wrong_parquet(draw: st.DrawFn) -> bytes:
    """One column of a type, or with values, that no test set has."""
    columns: dict[str, pa.Array] = {name: pa.array(["x", "y"]) for name in COLUMNS}
    name = draw(st.sampled_from(COLUMNS))
    wrong = [
        *(pa.array([1.0, 2.0]), pa.array([True, False]), pa.array([["x"], ["y"]])),
        *(pa.array([b"x", b"\xff"]), pa.array([{"x": 1}, {"x": 2}]), pa.array([0, 1], pa.date32())),
        *(pa.array([0, 1], pa.timestamp("us")), pa.array([1.0, None]).dictionary_encode()),
        pa.array([1, 2]).cast(pa.decimal128(21, 2)),
    ]
    if name == "id":
        wrong += [pa.array(["x", None]), pa.array([7, None]), pa.array(["x", "x"]), pa.nulls(2)]
        wrong += [pa.array([7, 7]), pa.array([3, 3]).dictionary_encode(), pa.array(["", "x"])]
    else:
        # Latin-1 in a column that says it is UTF-8.
        broken = pa.array([b"caf\xe9", b"\xed\xa0\x80"])
        buffers = broken.buffers()
        wrong += [pa.array([1, 2]), pa.Array.from_buffers(pa.string(), 2, buffers)]
    columns[name] = draw(st.sampled_from(wrong))
    if draw(st.booleans()):
        return parquet_of(columns)
    del columns[draw(st.sampled_from(COLUMNS))]
    return parquet_of(columns, use_dictionary=draw(st.booleans()))


def check_wrong_parquet(lab: Lab, data: bytes) -> None:
    lab.run(data, suffix=".parquet").is_refused()


@st.composite
def damaged_parquet(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200)) + draw(st.sampled_from([b"", b"PAR1"]))
    data, _ = draw(sound_parquet())
    return draw(damage((b"PAR1", b"\xff" * 4, b"\x00")))(data)


def check_damaged_parquet(lab: Lab, data: bytes) -> None:
    done = lab.run(data, suffix=".parquet")
    if done.ended.code == 0:
        # A flipped byte inside a value makes another, sound table.
        ids, _ = done.is_valid()
        assert are_ids(ids)
    else:
        done.is_refused()


FLAGS = ("input", "preset", "lora-weights", "head-kernel", "head-bias", "config", "report")
FLAGS += ("mode", "pooling", "sequence-length", "text-format", "num-workers", "group-size")
FLAGS += ("strategy", "dtype", "quantization", "max-tokens-per-batch", "sped", "")
odd_values = st.one_of(
    odd_texts.map(lambda text: text.replace("\x00", "").replace("..", "").lstrip("/")),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["", "0", "-1", "1", "01", "1.0", "auto", "none", "None", "nan", "1e3", "x" * 300]
    )
    | st.sampled_from(["x" * 5000, "9" * 30, "9" * 5000, ".", "/", "/dev/null", "/proc/self/mem"])
    | st.sampled_from(["{}", "{}/absent", "{}/rows.csv", "{}/rows.csv/x", "-", "--", "--mode"]),
)


def check_flags(lab: Lab, case: tuple[list[tuple[str, str]], bool]) -> None:
    pairs, joined = case
    flags = []
    for name, value in pairs:
        given = "{}/" + value if name == "report" else value
        flags += [f"--{name}={given}"] if joined else [f"--{name}", given]
    done = lab.run(None, *flags)
    if done.ended.code == 0:
        ids, _ = done.is_valid()
        assert ids == [row[0] for row in GOOD_ROWS]
    else:
        done.is_refused(flags)


@st.composite
def tomls(draw: st.DrawFn) -> bytes:
    """Arbitrary text, or lines of `key = value` with values of any type, or damage."""
    if draw(st.integers(0, 3)) == 0:
        return draw(
            st.binary(max_size=60) | odd_texts.map(lambda text: text.encode("utf-8", "replace"))
        )
    values = st.one_of(
        st.sampled_from(["1", "-1", "0", "1.5", "true", "nan", "inf", "[]", "[1]", "{a = 1}", '""'])
        | st.sampled_from(["1979-05-27", "'single'", '"auto"', "0xff", '"\\u0000"', "9" * 30, '"x'])
        | st.sampled_from(["[" * 5000, "9" * 5000, '"""\n"""', '"\\u2028\\n\\n"', '"turns"']),
        odd_values.map(json.dumps),
    )
    keys = st.sampled_from([name.replace("-", draw(st.sampled_from("-_"))) for name in FLAGS])
    lines = draw(st.lists(st.tuples(keys, values), max_size=3))
    text = "".join(
        f"{key} = {value}\n" for key, value in lines if key != "report" or "u0000" in value
    )
    data = text.encode("utf-8", "replace")
    return draw(damage((b"[x]\n", b'"', b"=", b"\n")))(data) if draw(st.booleans()) else data


def check_toml(lab: Lab, data: bytes) -> None:
    done = lab.run(None, "--config", "{}/model/run.toml", files={"run.toml": data})
    if done.ended.code == 0:
        ids, _ = done.is_valid()
        assert ids == [row[0] for row in GOOD_ROWS]
    else:
        done.is_refused(data)


def npy_of(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


def npy_with_header(header: str, data: bytes, version: int = 1) -> bytes:
    encoded = header.encode("utf-8", "replace")
    size = len(encoded).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + encoded + data


CLAIMED_SHAPES: tuple[tuple, ...] = ((2**40, 3), (10**12, 10**12), (2**62, 4), (10**30,), (2**34,))
CLAIMED_SHAPES += ((2**31, 3), (4_000_000_000,), (-1,), (-48, -3), (48.0, 3), (True, 3), (0,))


@st.composite
def heads(draw: st.DrawFn) -> tuple[str, bytes, bool | None]:
    """A file for the head, and whether it is sound where that is known."""
    name, shape = draw(st.sampled_from([("kernel.npy", (48, 3)), ("bias.npy", (3,))]))
    good = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    kind = draw(st.sampled_from(["sound", "wrong", "claims", "header", "damage", "damage"]))
    if kind == "sound":
        dtype = draw(st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2", "i1", "<i8", ">u2", "g"]))
        array = np.asarray(good.astype(dtype), order=draw(st.sampled_from("CF")))
        return name, npy_of(array), True
    if kind == "wrong":
        wrong = [good.astype("S8"), good.astype("U8"), good.astype(bool), good.astype(complex)]
        wrong += [good.astype(object), good * np.nan, good + np.inf, good * 1e300, good[:2]]
        wrong += [
            good[None],
            good.astype("M8[s]"),
            np.array(1.0),
            np.zeros((0, 3)),
            good.T[..., :2],
        ]
        wrong += [np.zeros(shape, [("a", "f4")])]
        archive = io.BytesIO()
        np.savez(archive, kernel=good)
        odd = [archive.getvalue(), archive.getvalue()[:40], b"PK\x03\x04", b"", b"\x93NUMPY"]
        odd += [b"\x80\x04N.", b"\x93NUMPY\x09\x00", json.dumps(good.tolist()).encode()]
        return name, draw(st.sampled_from([npy_of(array) for array in wrong] + odd)), False
    if kind == "claims":
        huge = draw(st.sampled_from(CLAIMED_SHAPES))
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {huge}, }}"
        return name, npy_with_header(header, good.astype("<f4").tobytes()), False
    if kind == "header":
        text = draw(
            texts
            | st.sampled_from(
                ["{" * 3000, "(" * 9000, "{'descr': '<f4'", "{[]: 1}", "[1, 2]", "'a'"]
            )
            | st.sampled_from(["{'descr': ('a',), 'fortran_order': 0, 'shape': ()}", "1" * 9000])
            | st.sampled_from(
                ["{'descr': [('a', 'b', 'c', 'd')], 'fortran_order': False, 'shape': (3,)}"]
            )
            | st.sampled_from(
                ["{'descr': '<f4', 'fortran_order': False, 'shape': (3L,)}", "x" * 40_000]
            )
        )
        return name, npy_with_header(text, b"\x00" * 64, draw(st.sampled_from([1, 2, 3]))), None
    return name, draw(damage())(npy_of(good.astype("float32"))), None


def check_heads(lab: Lab, case: tuple[str, bytes, bool | None]) -> None:
    name, data, is_sound = case
    done = lab.run(None, files={name: data})
    if is_sound is None:
        lab.answers_or_refuses(done)
    elif is_sound:
        lab.answers(done, lab.rows)
    else:
        done.is_refused(data[:200])


H5_VALUES: dict[str, Any] = {
    "text": "text",
    "number": 1,
    "vector": np.zeros(3),
    "nothing": np.zeros((0,)),
    "empty": h5py.Empty("f4"),
    "bytes": np.zeros((2, 2), "i1"),
    "nan": np.full((48, 4), np.nan),
    "complex": np.zeros(2, "c8"),
    "records": np.zeros(2, [("a", "f4")]),
    "softlink": h5py.SoftLink("/nowhere"),
    "loop": h5py.SoftLink("/"),
    "externallink": h5py.ExternalLink("nowhere.h5", "/x"),
    "gone": None,
}


@dataclass(frozen=True)
class OtherH5:
    """Puts values of H5_VALUES in the place of groups and datasets; a change is (where, what)."""

    changes: list[tuple[float, str]]
    starts_empty: bool

    def __call__(self, data: bytes) -> bytes:
        content = io.BytesIO(b"" if self.starts_empty else data)
        with h5py.File(content, "w" if self.starts_empty else "r+") as file:
            found: list[str] = []
            file.visit(found.append)
            for share, what in self.changes:
                name = found[int(share * len(found))] if found else "x"
                if name in file:
                    del file[name]
                if H5_VALUES[what] is not None and not self.is_inside_a_dataset(file, name):
                    file[name] = H5_VALUES[what]
        return content.getvalue()

    def is_inside_a_dataset(self, file: h5py.File, name: str) -> bool:
        """An earlier change put something in the place of a group around this one."""
        parent = name.rpartition("/")[0]
        return bool(parent) and not isinstance(file.get(parent), h5py.Group)


other_h5 = st.builds(
    OtherH5,
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([*H5_VALUES])),
        min_size=1,
        max_size=2,
    ),
    st.integers(0, 9).map(lambda number: number == 0),
)


def check_h5(lab: Lab, case: tuple[str, Callable[[bytes], bytes]]) -> None:
    name, change = case
    done = lab.run(None, files={name: change(lab.file(name))}, reads_weights=True)
    lab.answers_or_refuses(done)


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places_in(inner, (*path, key))


@dataclass(frozen=True)
class OtherJson:
    """Gives values of a JSON file other types, or takes them out; a change is (where, value)."""

    changes: list[tuple[float, Any]]
    takes_out: bool

    def __call__(self, data: bytes) -> bytes:
        content = json.loads(data)
        for share, value in self.changes:
            places = list(places_in(content))
            path = places[int(share * len(places))]
            if not path:
                return json.dumps(value).encode()
            target = content
            for key in path[:-1]:
                target = target[key]
            if self.takes_out:
                del target[path[-1]]
            else:
                target[path[-1]] = value
        return json.dumps(content).encode()


other_json = st.builds(
    OtherJson,
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), json_values), min_size=1, max_size=2),
    st.booleans(),
)


def check_json(lab: Lab, case: tuple[str, str, Callable[[bytes], bytes]]) -> None:
    model, name, change = case
    data = change(lab.file(name, model))
    done = lab.run(None, model=model, files={name: data}, reads_weights=True)
    if done.ended.code == 0:
        # Another end token, say, gives other tokens.
        ids, _ = done.is_valid()
        assert ids == [row[0] for row in GOOD_ROWS]
    else:
        done.is_refused(data)


@dataclass(frozen=True)
class Family:
    """Cases of one kind, and how many of them the default and the slow suite run."""

    cases: st.SearchStrategy
    check: Callable[[Lab, Any], None]
    few: int
    many: int


PRESET_FILES = st.sampled_from(
    [
        ("gemma2", f"preset/{name}.json")
        for name in ("config", "tokenizer", "preprocessor", "metadata")
    ]
    + [("gemma2", "preset/config.json"), ("qwen3", "preset/tokenizer.json")]
    + [("sharded", "preset/model.weights.json"), ("qwen3", "preset/config.json")]
)
TOKENIZER_FILES = st.sampled_from(
    [("gemma2", "preset/assets/tokenizer/vocabulary.spm")] * 2
    + [("qwen3", f"preset/assets/tokenizer/{name}") for name in ("vocabulary.json", "merges.txt")]
)
FAMILIES = {
    "csv-bytes": Family(st.binary(max_size=120), check_csv, 5, 60),
    "csv-damaged": Family(damaged_csv(), check_csv, 12, 250),
    "csv-lines": Family(csv_lines(), check_csv, 10, 150),
    "csv-sound": Family(sound_csv(), check_sound_csv, 12, 200),
    "csv-huge": Family(
        st.tuples(
            st.sampled_from(["x", '"', ",", "\n", "\r", "word ", "日本語", "\x00", 'a"\r\n']),
            st.integers(100_000, 400_000),
            st.integers(0, 3),
        ),
        check_huge_cell,
        3,
        20,
    ),
    "csv-encodings": Family(encoded_csv(), check_csv, 6, 80),
    "csv-columns": Family(csv_columns(), check_csv, 8, 120),
    "csv-ids": Family(csv_ids(), check_csv, 10, 120),
    "turns": Family(
        st.tuples(st.tuples(turn_cells(), turn_cells(), turn_cells()), ids), check_turns, 10, 150
    ),
    "parquet-sound": Family(sound_parquet(), check_sound_parquet, 8, 120),
    "parquet-wrong": Family(wrong_parquet(), check_wrong_parquet, 8, 100),
    "parquet-damaged": Family(damaged_parquet(), check_damaged_parquet, 10, 250),
    "flags": Family(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(FLAGS), odd_values), min_size=1, max_size=2),
            st.booleans(),
        ),
        check_flags,
        10,
        200,
    ),
    "toml": Family(tomls(), check_toml, 10, 200),
    "heads": Family(heads(), check_heads, 12, 250),
    "lora-damaged": Family(
        st.tuples(st.just("model.lora.h5"), damage() | other_h5), check_h5, 8, 200
    ),
    "weights-damaged": Family(
        st.tuples(st.just("preset/model.weights.h5"), damage() | other_h5), check_h5, 8, 250
    ),
    "presets": Family(
        st.tuples(PRESET_FILES, damage() | other_json | other_json).map(
            lambda case: (*case[0], case[1])
        ),
        check_json,
        12,
        300,
    ),
    "tokenizers": Family(
        st.tuples(TOKENIZER_FILES, damage()).map(lambda case: (*case[0], case[1])),
        check_json,
        6,
        150,
    ),
}


@pytest.fixture(scope="module")
def lab(models, cache, tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("broken")
    runner = FakeRunner(folder, environment(cache))
    yield Lab(models, runner, folder)
    assert runner.close() == 0


def run_cases(lab: Lab, family: Family, count: int, *, always_the_same: bool) -> int:
    """Run so many cases of a family and return how many there were."""
    done = 0

    @settings(
        max_examples=count,
        deadline=None,  # LIMIT_S bounds each case
        derandomize=always_the_same,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(family.cases)
    def check(case: Any) -> None:
        nonlocal done
        done += 1
        family.check(lab, case)

    check()
    return done


@pytest.mark.parametrize("name", FAMILIES)
def test_broken_inputs(lab, name):
    family = FAMILIES[name]
    assert run_cases(lab, family, family.few, always_the_same=True) >= family.few


@pytest.mark.parametrize(
    "flags",
    [
        *(["--output", value] for value in ("", "x" * 240, "x" * 5000, "a/" * 3000, "{}/fifo")),
        *(["--report", value] for value in ("", "x" * 300, "a/" * 3000 + "b", "{}/fifo")),
        *(["--input", value] for value in ("", "x" * 5000, "/dev/zero", "a\nb\nc\x1b[2J")),
        *(["--preset", value] for value in ("", "x" * 300, "\u2028\n\n")),
        *([f"--{name}", "x" * 300] for name in ("lora-weights", "head-kernel", "head-bias")),
        *(["--sequence-length", value] for value in ("9" * 30, "9" * 5000, "1.0", "-1", "")),
        *([f"--{name}=--"] for name in ("input", "sequence-length", "mode")),
    ],
    ids=lambda flags: "=".join(flags)[:24].encode("unicode_escape").decode(),
)
def test_odd_flags(lab, tmp_path, flags):
    os.mkfifo(tmp_path / "fifo")
    flags = [flag.replace("{}/fifo", str(tmp_path / "fifo")) for flag in flags]
    if flags[0] == "--output":
        lab.run(None, output=flags[1]).is_refused()
    else:
        lab.run(None, *flags).is_refused()


@pytest.mark.parametrize("name", ["preset/model.weights.h5", "model.lora.h5"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(lab, name, value):
    content = io.BytesIO(lab.file(name))
    with h5py.File(content, "r+") as file:
        found: list[str] = []
        file.visititems(
            lambda path, item: found.append(path) if getattr(item, "size", 0) > 99 else None
        )
        file[found[-1]][..., -1] = value
    done = lab.run(None, files={name: content.getvalue()}, reads_weights=True)
    done.is_refused()
    assert "must hold finite weights" in done.ended.stderr
    assert found[-1] in done.ended.stderr


@pytest.mark.parametrize("key", ["num_layers", "vocabulary_size", "intermediate_dim"])
@pytest.mark.parametrize("value", [0, -4, 10**12, float("inf")])
def test_sizes_that_the_weights_do_not_have(lab, key, value):
    content = json.loads(lab.file("preset/config.json"))
    content["config"][key] = value
    files = {"preset/config.json": json.dumps(content).encode()}
    done = lab.run(None, files=files, reads_weights=True)
    done.is_refused()
    assert "config.json" in done.ended.stderr or "not a preset" in done.ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_broken_inputs(lab):
    counts = {
        name: run_cases(lab, family, family.many, always_the_same=False)
        for name, family in FAMILIES.items()
    }
    print(f"\n{sum(counts.values())} cases:", counts)
    assert sum(counts.values()) >= LEAST_CASES
