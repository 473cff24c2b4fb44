"""Small presets, real rows and a way to run the command as a user does."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from runner.demo import make_rows, write_test_set
from runner.model.injected_faults import VARIABLE
from tests.support.models import SHARED, Model, Models
from tests.support.odd_texts import odd_texts
from tests.support.slowest import keep_durations, read_durations
from tests.support.stored import made_once, stored_folder
from tests.support.warm import MARK, WarmProcess, WarmPython

# Tests' own process is like a worker's: Keras without TensorFlow, which takes seconds to import.
os.environ.setdefault("KERAS_BACKEND", "jax")
sys.modules.update(dict.fromkeys(("tensorflow", "tensorflow_text")))
# It keeps what it compiles from one session to the next, as runs do.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(stored_folder() / "programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
LENGTH = 96
PLAIN_LENGTH = 64
REAL_ROWS = 96
# A device so slow that `real_job` takes some five seconds on one, without any work for them.
SLOW = {"kind": "slow", "tokens_per_s": 2500}
# Seconds after which a run hangs; no test waits for them, and a busy machine is no reason to fail.
LONGEST_RUN_S = 1200.0
LONGEST_WAIT_S = 300.0


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


def wait_until(is_so: Callable[[], object], what: str) -> None:
    """Wait for a condition, as long as a busy machine may take; `what` names it."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"this never came: {what}"
        time.sleep(0.01)


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


@pytest.fixture(scope="session")
def stored() -> Path:
    """What tests make once for all sessions with these versions: see `tests/support/stored.py`."""
    return stored_folder()


@pytest.fixture(scope="session")
def cache(stored: Path) -> Path:
    """The user's cache: compiled programs and the demo, from one session to the next."""
    folder = stored / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmPython]:
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="session")
def run_script(cache: Path) -> Iterator[Callable[..., None]]:
    """Run a Keras script of the tests, with TensorFlow, in a process of its own."""
    python = WarmPython(tensorflow=True)

    def run(name: str, *arguments: object) -> None:
        env = environment(cache, KERAS_BACKEND="jax", TF_CPP_MIN_LOG_LEVEL="3")
        script, flags = ROOT / "tests" / "support" / name, [*map(str, arguments)]
        done = python.run(flags, env, script=script, timeout=LONGEST_RUN_S)
        assert done.returncode == 0, done.stderr

    yield run
    python.close()


@pytest.fixture(scope="session")
def cli(cache: Path, warm: WarmPython):
    """Run `python run.py FLAGS` and return the finished process.

    Its process has Keras, JAX and Ray imported when it begins, unless `cold`, or it sets what they
    read while they are imported.
    """

    def run(
        *flags: str, timeout: float = LONGEST_RUN_S, cold: bool = False, **extra: str
    ) -> subprocess.CompletedProcess:
        env = environment(cache, **extra)
        if not cold and warm.can_run(extra):
            return warm.run(flags, env, timeout=timeout)
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *flags],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def cache_without_shapes(stored: Path, cli) -> Callable[[Model, Path], Path]:
    """Make a user's cache with all that runs of a model compile, but for their batches."""

    def make(model: Model, folder: Path) -> Path:
        kept = stored / f"cache-{model.folder.name}"
        with made_once(kept) as target:
            if target is not None:
                rows = target / "rows.csv"
                write_test_set(rows, make_rows(2, seed=1))
                # No test has a batch of this length.
                flags = (
                    *(*model.flags(), "--input", rows, "--sequence-length", "7"),
                    *("--num-workers", "2", "--output", target / "s.csv"),
                )
                done = cli(*map(str, flags), XDG_CACHE_HOME=str(target))
                assert done.returncode == 0, done.stderr
        return Path(shutil.copytree(kept, folder))

    return make


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
def models(stored: Path, run_script) -> Models:
    folder = stored / "models"
    folder.mkdir(exist_ok=True)

    def make(*arguments: object) -> None:
        run_script("make_presets.py", *arguments)

    return Models(folder, make)


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
def reference(stored: Path, run_script, test_set: Path):
    """Return the notebook loop's answers for a model: 'raw mean' and the like -> (rows, 3)."""
    done: dict[str, dict[str, np.ndarray]] = {}

    def answers(model: Model) -> dict[str, np.ndarray]:
        name = model.folder.name
        if name not in done:
            folder = stored / f"reference-{name}"
            with made_once(folder) as target:
                if target is not None:
                    out = target / "answers.npz"
                    run_script("reference.py", model.folder, test_set, LENGTH, out)
            done[name] = dict(np.load(folder / "answers.npz"))
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
    answer: Callable[[str], Path]

    def model(self, name: str) -> Path:
        return self.folder / name

    def tokens(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / f"{name}.tokens.npz"))

    def answers(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.answer(name)))


@pytest.fixture(scope="session")
def plain(stored: Path, run_script, models: Models) -> Plain:
    """Answers to a few rows at `PLAIN_LENGTH` tokens by Keras alone (plain_answers.py)."""
    rows = [("7", "a", "b", "c"), ("8", "", "", ""), ("9", "[MASK] x", "<mask> \u00dcber", "...")]
    rows += make_rows(40, seed=5)
    texts = ["\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(row[1:]) for row in rows]
    odd = odd_texts(500, seed=1) + texts[:12]
    folder = stored / "plain"
    with made_once(folder) as target:
        if target is not None:
            write_test_set(target / "rows.csv", rows[:12])
            for name, content in {"texts": texts, "odd": odd}.items():
                (target / f"{name}.json").write_text(json.dumps(content))
            run_script("plain_answers.py", "make", target)

    def answer(name: str) -> Path:
        model = models[name].folder if name in models else folder / name
        made = stored / f"plain-{name}"
        with made_once(made) as target:
            if target is not None:
                arguments = (folder / "texts.json", PLAIN_LENGTH, model, target / "answers.npz")
                run_script("plain_answers.py", "answer", *arguments)
        return made / "answers.npz"

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


@pytest.fixture(scope="session")
def real_rows(tmp_path_factory: pytest.TempPathFactory, arena_rows: Path) -> Path:
    """A few of the real rows, for runs that something befalls in their midst."""
    path = tmp_path_factory.mktemp("real") / "rows.csv"
    pd.read_csv(arena_rows, dtype=str, keep_default_na=False).head(REAL_ROWS).to_csv(
        path, index=False
    )
    return path


@pytest.fixture(scope="session")
def real_job(models: Models, real_rows: Path) -> list[str]:
    """Flags of a run of `REAL_ROWS` rows in a dozen batches; `SLOW` makes it last for seconds."""
    return [*models["arena"].flags(), "--input", str(real_rows), "--pooling", "mean",
            "--sequence-length", "128", "--max-tokens-per-batch", "1024"]  # fmt: skip


@pytest.fixture(scope="session")
def calm(cli, real_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The submission of `real_job` if nothing disturbs it."""
    path = tmp_path_factory.mktemp("calm") / "s.csv"
    done = cli("--mode", "single", *real_job, "--output", str(path))
    assert done.returncode == 0, done.stderr
    return pd.read_csv(path, dtype={"id": str}, keep_default_na=False)


def assert_calm(output: Path, calm: pd.DataFrame) -> dict:
    """Assert that a run's submission is the undisturbed one, all rows predicted; its report."""
    table = pd.read_csv(output, dtype={"id": str}, keep_default_na=False)
    assert table["id"].tolist() == calm["id"].tolist()
    difference = np.abs(table.iloc[:, 1:].to_numpy() - calm.iloc[:, 1:].to_numpy())
    assert difference.max() < TOLERANCE
    report = json.loads(Path(f"{output}.report.json").read_text())
    rows = report["rows"]
    assert rows["resumed"] + rows["predicted"] == rows["total"] == len(calm)
    return report


class Started:
    """A run in the background and all its processes, found by a mark in their environment.

    Args:
        cold: whether it begins without anything imported, and so do its workers.
    """

    def __init__(self, cache, warm, *flags, cold=False, **extra):
        self.mark, self._warm = uuid.uuid4().hex, warm
        env = environment(cache, **{MARK: self.mark}, **extra)
        flags = [str(flag) for flag in flags]
        self.process: subprocess.Popen | WarmProcess
        if not cold and warm.can_run(extra):
            self.process = warm.start(flags, env)
            return
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *flags],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def family(self):
        forked = {*self._warm.find(self.mark), self.process.pid}
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.pid in forked or process.environ().get(MARK) == self.mark:
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

    def wait_for_workers(self, doing, count=1, timeout_s=LONGEST_RUN_S, name="Replica"):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if len(found := self.workers(doing, name)) >= count:
                return found
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError(f"no worker came to {doing}")

    def wait_for_batches(self, output, count=3, timeout_s=LONGEST_RUN_S):
        """Wait until the journal beside `output` has grown so often: once a batch, at most."""
        wal = Path(f"{output}.journal-wal")
        sizes, deadline = set(), time.monotonic() + timeout_s
        while len(sizes) <= count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "no rows came"
            if wal.is_file():
                sizes.add(wal.stat().st_size)
            time.sleep(0.02)

    def finish(self, timeout_s=LONGEST_RUN_S):
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def assert_nothing_is_left(self, within_s=120):
        deadline = time.monotonic() + within_s
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []


def slow_until(path):
    """The environment of a run that lasts until a test makes a file, however slowly all starts."""
    fault = {"kind": "slow", "tokens_per_s": 20, "until": str(path)}
    return {VARIABLE: json.dumps([fault])}


@pytest.fixture
def start(cache, warm):
    """Start `python run.py FLAGS` in the background; whatever is left of it is killed."""
    runs = []

    def run(*flags, cold=False, **extra):
        runs.append(Started(cache, warm, *flags, cold=cold, **extra))
        return runs[-1]

    yield run
    for started in runs:
        for process in started.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.process.communicate()


@pytest.fixture(scope="session")
def heavy(models: Models) -> Iterator[Model]:
    """About 1.3 GB of float32 weights, nearly all in the layers; removed when all are done."""
    yield models["heavy"]
    shutil.rmtree(models["heavy"].folder, ignore_errors=True)


# Fixtures, and names in a test's own code, that start a process or make a model.
OF_PROCESSES = frozenset(
    (
        *("warm", "cli", "start", "predict", "models", "plain", "reference", "run_script"),
        *("subprocess"),
    )
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import a file of processes alone if they are left out."""
    is_left_out = "not process" in config.option.markexpr and collection_path.suffix == ".py"
    if is_left_out and "\npytestmark = pytest.mark.process" in collection_path.read_text():
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes, and put the slowest first, as far as is known of earlier runs."""
    units: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and OF_PROCESSES.intersection(
            (*item.fixturenames, *item.function.__code__.co_names)
        ):
            item.add_marker(pytest.mark.process)
        units[unit_of(item.nodeid)].append(item)
    known = read_durations()
    taking = {name: sum(known.get(one.nodeid, 0.0) for one in unit) for name, unit in units.items()}
    slowest_first = sorted(units, key=lambda name: -taking[name])
    items[:] = [item for name in slowest_first for item in units[name]]


@cached
def _shares(file: str) -> bool:
    """Whether a file makes something for several of its tests."""
    return re.search(r"scope=.(module|class)", (ROOT / file).read_text()) is not None


def unit_of(nodeid: str) -> str:
    """Return what a test must stay together with on one process: its file, or itself alone."""
    file = nodeid.partition("::")[0]
    return file if _shares(file) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal tests in the units of `unit_of`, in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


_took: dict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _took[report.nodeid] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and _took:
        keep_durations(dict(_took))
