"""Small presets, real rows and a way to run the command as a person does."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from runner.demo import make_rows, write_test_set
from tests.odd_texts import odd_texts

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TOLERANCE = 1e-5
LENGTH = 96
PLAIN_LENGTH = 64


@dataclass(frozen=True)
class Model:
    """One model's files on disk."""

    folder: Path

    @property
    def preset(self) -> Path:
        return self.folder / "preset"

    def flags(self) -> list[str]:
        return [
            *("--preset", str(self.preset), "--lora-weights", str(self.folder / "model.lora.h5")),
            *("--head-kernel", str(self.folder / "kernel.npy")),
            *("--head-bias", str(self.folder / "bias.npy")),
        ]


@dataclass(frozen=True)
class Answer:
    """What a run left on disk."""

    ids: list[str]
    probabilities: np.ndarray
    report: dict
    stderr: str


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """The environment of a fresh user, whatever the test process' own is."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "JAX_"))
    }
    for name in ("KERAS_BACKEND", "XLA_FLAGS", "NPROC"):
        env.pop(name, None)
    return env | {"XDG_CACHE_HOME": str(cache)} | extra


def copy_project(target: Path) -> Path:
    """Copy this repository without what git ignores, for commands that write beside it."""
    left_out = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*left_out)))


def make_programs(folder: Path, project: Path) -> Path:
    """Write the commands that a reader has installed, as scripts that use this test's Python."""
    folder.mkdir(parents=True)
    lines = {
        "python": '"$@"',
        "python3": '"$@"',
        "pip": '-m pip "$@"',
        "ruff": '-m ruff "$@"',
        "mypy": '-m mypy "$@"',
        "arena-runner": f'"{project / "run.py"}" "$@"',
    }
    for name, line in lines.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {line}\n')
        (folder / name).chmod(0o755)
    return folder


def run_script(cache: Path, name: str, *arguments: object) -> None:
    """Run a Keras script of the tests in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / name, *map(str, arguments)],
        env=environment(cache, KERAS_BACKEND="jax", TF_CPP_MIN_LOG_LEVEL="3"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def cli(cache: Path):
    """Run `python run.py FLAGS` and return the finished process."""

    def run(*flags: str, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *flags],
            env=environment(cache, **extra),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def flags_there_are(cli) -> set[str]:
    """Every flag that the command and `prepare` know."""
    # So wide that no flag is broken over two lines.
    printed = cli("--help", COLUMNS="999").stdout + cli("prepare", "--help", COLUMNS="999").stdout
    return set(re.findall(r"--[a-z][a-z-]+", printed))


@pytest.fixture
def predict(cli, tmp_path: Path):
    """Run the command to its end and return what it left."""

    def run(*flags: str, **extra: str) -> Answer:
        output = tmp_path / "submission.csv"
        # A second run of a test is not to find the first one's rows.
        resume = () if "--resume" in flags else ("--resume", "never")
        done = cli(*flags, *resume, "--output", str(output), **extra)
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(output, dtype={"id": str}, keep_default_na=False)
        assert list(table.columns) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
        report = json.loads((tmp_path / "submission.csv.report.json").read_text())
        return Answer(
            table["id"].tolist(), table.iloc[:, 1:].to_numpy(dtype=float), report, done.stderr
        )

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Model]:
    """Presets by name: those of make_presets.FAMILIES, sharded and arena."""
    from runner.demo import train_tokenizer

    folder = tmp_path_factory.mktemp("models")
    texts = [text for row in make_rows(60, seed=5) for text in row[1:]]
    gemma, llama = folder / "gemma.spm", folder / "llama.spm"
    train_tokenizer(gemma, texts, vocabulary_size=600)
    train_tokenizer(llama, texts, vocabulary_size=600, start="<s>", end="</s>")
    real = SHARED / "gemma_tokenizer.model"
    byte_pairs = tmp_path_factory.mktemp("byte_pairs")
    train_byte_pairs(byte_pairs, texts, vocabulary_size=600)
    large = real if real.is_file() else gemma
    run_script(cache, "make_presets.py", folder, gemma, llama, large, byte_pairs)
    return {path.name: Model(path) for path in folder.iterdir() if path.is_dir()}


def train_byte_pairs(folder: Path, texts: list[str], *, vocabulary_size: int) -> None:
    """Write a byte-level BPE with the special tokens of Llama 3 and Qwen after all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    special = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    ids = model["vocab"]
    for name in (*special, "im_start", "im_end", "endoftext"):
        ids[f"<|{name}|>"] = len(ids)
    (folder / "vocabulary.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))


@pytest.fixture(scope="session")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of every kind: short, cut by the length, two turns, null turns, other scripts."""
    rows = make_rows(20, seed=11)
    rows += [
        ("0042", '["short"]', '["a"]', '["b"]'),
        ("4294967295", '["nulls", null]', "[null]", "[]"),
        ("row-of-text", '["\\ud83d broken \\u00e9"]', '["日本語のテキスト"]', '["a\\/b"]'),
    ]
    path = tmp_path_factory.mktemp("rows") / "test.csv"
    write_test_set(path, rows)
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path, test_set: Path):
    """Return the notebook loop's answers for a model: 'raw mean' and the like -> (rows, 3)."""
    folder = tmp_path_factory.mktemp("reference")
    done: dict[str, dict[str, np.ndarray]] = {}

    def answers(model: Model) -> dict[str, np.ndarray]:
        name = model.folder.name
        if name not in done:
            out = folder / f"{name}.npz"
            run_script(cache, "reference.py", model.folder, test_set, LENGTH, out)
            done[name] = dict(np.load(out))
        return done[name]

    return answers


@dataclass(frozen=True)
class Plain:
    """Small encoder presets and classifiers, and what plain Keras says of them and of others.

    texts: of `rows`, a CSV file, as they are rendered. odd: texts that were tokenized alone.
    """

    folder: Path
    rows: Path
    texts: list[str]
    odd: list[str]
    answer: Callable[[list[str]], None]

    def model(self, name: str) -> Path:
        return self.folder / name

    def tokens(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / f"{name}.tokens.npz"))

    def answers(self, name: str) -> dict[str, np.ndarray]:
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            self.answer([name])
        return dict(np.load(path))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: Path, models) -> Plain:
    """Answers to a few rows at `PLAIN_LENGTH` tokens by Keras alone (plain_answers.py)."""
    folder = tmp_path_factory.mktemp("plain")
    rows = [("7", "a", "b", "c"), ("8", "", "", ""), ("9", "[MASK] x", "<mask> \u00dcber", "...")]
    rows += make_rows(40, seed=5)
    texts = ["\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(row[1:]) for row in rows]
    write_test_set(folder / "rows.csv", rows[:12])
    odd = odd_texts(500, seed=1) + texts[:12]
    for name, content in {"texts": texts, "odd": odd}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))

    def answer(names: list[str]) -> None:
        asked = [models[name].folder if name in models else folder / name for name in names]
        files = (folder / "texts.json", folder / "odd.json")
        run_script(cache, "plain_answers.py", folder, *files, PLAIN_LENGTH, *asked)

    answer(["bert", "bert_classifier", "gemma3", "llama"])  # what the default tests ask for
    return Plain(folder, folder / "rows.csv", texts[:12], odd, answer)


@pytest.fixture(scope="session")
def arena_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 905 real rows where they are, else as many generated ones."""
    real = SHARED / "arena_dev.csv"
    if real.is_file():
        return real
    path = tmp_path_factory.mktemp("arena") / "arena.csv"
    write_test_set(path, make_rows(905, seed=905))
    return path


class Started:
    """A run in the background and all its processes, found by a mark in their environment."""

    def __init__(self, cache, *flags, **extra):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *map(str, flags)],
            env=environment(cache, ARENA_TEST_MARK=self.mark, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def family(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ARENA_TEST_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self, doing="", name="Replica"):
        """Actor processes; Ray shows the method they run in their title."""
        found = []
        for process in self.family():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if title.startswith(f"ray::{name}{doing}"):
                found.append(process)
        return found

    def wait_for_workers(self, doing, count=1, timeout_s=90, name="Replica"):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if len(found := self.workers(doing, name)) >= count:
                return found
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError(f"no worker came to {doing}")

    def finish(self, timeout_s=180):
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def assert_nothing_is_left(self, within_s=10):
        deadline = time.monotonic() + within_s
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []


@pytest.fixture
def start(cache):
    runs = []

    def run(*flags):
        runs.append(Started(cache, *flags))
        return runs[-1]

    yield run
    for started in runs:
        for process in started.family():
            process.kill()
        started.process.communicate()


@pytest.fixture(scope="session")
def heavy(tmp_path_factory, cache, models) -> Model:
    """About 1.3 GB of float32 weights, nearly all in the layers."""
    folder = tmp_path_factory.mktemp("heavy")
    vocabulary = models["gemma2"].preset / "assets" / "tokenizer" / "vocabulary.spm"
    run_script(cache, "make_presets.py", folder, vocabulary, "heavy")
    yield Model(folder / "heavy")
    (folder / "heavy" / "preset" / "model.weights.h5").unlink()
