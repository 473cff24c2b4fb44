"""A run from Python: light to import, as good as the command; the process is as it was after."""

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import types
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import runner
import runner.common.errors
import runner.executors.single
from runner import ConfigError, RunConfig, WorkerError, run
from runner.api import _process_restored
from runner.cli import main
from runner.config import readers
from runner.config.command import command_flags
from runner.config.flags import FLAGS, MODES, PLAN, PREPARE_FLAGS, RUN, flag
from runner.config.parser import parse_arguments
from runner.config.run_config import PrepareConfig
from runner.telemetry.progress import Progress
from tests.conftest import ROOT, environment
from tests.support.fakes import FakeReplica, write_fake_job

# Values as on the command line, or as Python has them.
EXAMPLES = {
    readers.read_text: ("t4",),
    readers.read_switch: (True,),
    readers.read_path: ("a.csv", Path("a.csv")),
    readers.read_count: ("3", 3),
    readers.read_count_or_auto: ("auto", "3", 3),
    readers.read_duration: ("1h30m", 5400),
    readers.read_numbers: (".5,.3,.2", [0.5, 0.3, 0.2]),
    readers.read_port: ("0", 0),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_fake_job(tmp_path_factory.mktemp("job")) | {"mode": "single"}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner.executors.single, "Replica", FakeReplica)


class TestNames:
    def test_importing_is_light(self):
        """Workers do it too, and a notebook before it has decided on a backend."""
        script = (
            "import sys, runner; from runner import RunConfig, ConfigError; print(*sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        loaded = {name.split(".")[0] for name in done.stdout.split()}
        assert "runner" in loaded
        assert loaded.isdisjoint({"numpy", "pandas", "ray", "jax", "keras", "tensorflow", "tqdm"})

    def test_all_errors_are_there(self):
        own = inspect.getmembers(runner.common.errors, inspect.isclass)
        errors = {
            name for name, kind in own if issubclass(kind, runner.common.errors.ArenaRunnerError)
        }
        assert errors | {"RunConfig", "run"} == set(runner.__all__)
        assert all(getattr(runner, name) is not None for name in runner.__all__)
        assert set(runner.__all__) <= set(dir(runner))
        with pytest.raises(AttributeError, match="no attribute 'typo'"):
            _ = runner.typo

    def test_three_ways_to_call_the_command(self, cache):
        for called in (["run.py"], ["-m", "runner"]):
            done = subprocess.run(
                [sys.executable, *called, "--version"],
                cwd=ROOT, env=environment(cache), capture_output=True, text=True,
            )  # fmt: skip
            assert done.stdout == f"arena-runner {runner.__version__}\n", done.stderr
        assert 'arena-runner = "runner.cli:main"' in (ROOT / "pyproject.toml").read_text()


class TestConfig:
    def test_values_as_on_the_command_line(self):
        flags = [
            "--input",
            "a.csv",
            "--time-limit",
            "1h30m",
            "--fallback-probabilities",
            ".5,.3,.2",
        ]
        flags += ["--num-workers", "auto", "--sequence-length", "64", "--metrics-port", "0"]
        given = RunConfig(
            input="a.csv", time_limit="1h30m", fallback_probabilities=[0.5, 0.3, 0.2],
            num_workers="auto", sequence_length="64", metrics_port="0",
        )  # fmt: skip
        assert given == parse_arguments(flags)
        assert given.input == Path("a.csv")
        assert given.time_limit == RunConfig(time_limit=5400).time_limit == 5400.0
        assert given.log_folder == Path("submission.csv.logs")

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"input": 3}, "--input must be a path. Received: input=3"),
            ({"input": "a\0b"}, "--input must be a path"),
            ({"output": ""}, "--output must name a file"),
            ({"mode": None}, "--mode must be text. Received: mode=None"),
            ({"verbose": 1}, "--verbose must be true or false. Received: verbose=1"),
            ({"sequence_length": 1.5}, "--sequence-length must be a whole number"),
            ({"sequence_length": None}, "--sequence-length must be a whole number"),
            ({"time_limit": float("nan")}, "--time-limit must be hours"),
            ({"time_limit": -3}, "--time-limit must be longer than zero"),
            ({"metrics_port": 65536}, "--metrics-port must be a whole number from 0"),
            ({"metrics_port": True}, "--metrics-port must be a whole number from 0"),
            ({"log_format": "xml"}, "--log-format must be one of text, json"),
            ({"log_dir": "s.csv", "output": "s.csv"}, "must be different files"),
        ],
    )
    def test_values_that_cannot_be(self, settings, said):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}|{re.escape(said)}"):
            RunConfig(**settings)

    def test_a_command_makes_the_same_run(self):
        """Every flag of a run, each with another value than its default."""
        head = {"head_kernel": "k.npy", "head_bias": "b.npy", "preset": "p", "lora_weights": "l.h5"}
        config = RunConfig(
            mode="model-parallel", strategy="tensor", group_size=4, num_workers=8, dtype="float32",
            quantization="int4", pooling="last", sequence_length=64, text_format="turns", **head,
            max_tokens_per_batch=512, time_limit="1h0.5s", on_deadline="fill",
            min_sequence_length=9, fallback_probabilities=[0.5, 0.25, 0.25], resume="require",
            journal="j", input="a.csv", output="s.csv", report="r.json",
            extra_passes="swap", log_dir="logs", log_format="json", metrics_port=9, verbose=True,
            address="auto",
        )  # fmt: skip
        flags = command_flags(config)
        assert parse_arguments(flags) == config
        assert flags[:2] == ["--mode", "model-parallel"]
        named = {name for name in flags if name.startswith("--")}
        assert named == {flag(row.name) for row in FLAGS if RUN in row.commands} - {"--plan"}
        short = command_flags(config, calibrates=True, pooling=None, input="b.csv")
        without = {"journal", "resume", "report", "on_deadline", "time_limit", "pooling"}
        without |= {"fallback_probabilities", "min_sequence_length", "extra_passes"}
        without |= {"log_dir", "log_format", "metrics_port", "verbose"}
        assert {name for name in short if name.startswith("--")} == named - set(map(flag, without))
        assert short[short.index("--input") + 1] == "b.csv"
        assert command_flags(RunConfig()) == ["--mode", "data-parallel"]

    def test_a_command_keeps_what_the_user_named(self):
        """The default length, which a preset may replace, and every digit of a number."""
        thirds = RunConfig(fallback_probabilities=[1 / 3] * 3, time_limit=1234567.5)
        made = parse_arguments(command_flags(thirds))
        assert made.fallback_probabilities == pytest.approx([1 / 3] * 3, abs=1e-14)
        assert made.time_limit == 1234567.5
        assert command_flags(RunConfig(sequence_length=512))[2:] == ["--sequence-length", "512"]


class TestRun:
    def test_it_leaves_the_process_as_it_was(self, fake, job, tmp_path, capsys):
        """And does what the command does, twice, the second time from the journal."""
        before = (
            dict(os.environ), [*warnings.filters], signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM), "tensorflow" in sys.modules,
        )  # fmt: skip
        output = tmp_path / "s.csv"
        for resumed in (0, 40):
            report = run(RunConfig(**job, output=str(output)))
            assert report["rows"]["resumed"] == resumed
            assert report["rows"]["total"] == 40
            after = (
                dict(os.environ), [*warnings.filters], signal.getsignal(signal.SIGINT),
                signal.getsignal(signal.SIGTERM), "tensorflow" in sys.modules,
            )  # fmt: skip
            assert after == before
        own = output.read_bytes()
        assert "40 rows -> " in capsys.readouterr().out
        flags = [part for name, value in job.items() for part in (flag(name), str(value))]
        command = tmp_path / "command.csv"
        with _process_restored():
            assert main([*flags, "--output", str(command)]) == 0
        assert command.read_bytes() == own

    def test_in_a_thread_and_one_at_a_time(self, job, tmp_path, monkeypatch):
        started, go_on, reports = threading.Event(), threading.Event(), []

        class Waiting(FakeReplica):
            def load(self, spec):
                started.set()
                assert go_on.wait(60)
                return super().load(spec)

        monkeypatch.setattr(runner.executors.single, "Replica", Waiting)
        config = RunConfig(**job, output=tmp_path / "s.csv")
        thread = threading.Thread(target=lambda: reports.append(run(config)))
        thread.start()
        try:
            assert started.wait(60)
            with pytest.raises(ConfigError, match="A run is already in progress in this process"):
                run(config)
        finally:
            go_on.set()
            thread.join()
        assert reports[0]["rows"]["predicted"] == 40

    def test_errors_are_raised(self, job, tmp_path, monkeypatch, capsys):
        class Failing(FakeReplica):
            def predict(self, batch):
                raise RuntimeError("all is lost")

        monkeypatch.setattr(runner.executors.single, "Replica", Failing)
        with pytest.raises(WorkerError, match="all is lost") as raised:
            run(RunConfig(**job, output=tmp_path / "s.csv"))
        log = tmp_path / "s.csv.logs" / "driver.log"
        assert str(raised.value).splitlines()[-1] == f"Logs: {log}"
        assert log.is_file()
        with pytest.raises(runner.DataError, match="absent"):
            run(RunConfig(**job | {"input": "absent.csv"}, output=tmp_path / "t.csv"))
        with pytest.raises(ConfigError, match="run needs a RunConfig"):
            run({"input": "test.csv"})

    def test_an_interrupt_says_how_to_go_on(self, fake, job, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(FakeReplica, "hold_tokens", interrupt)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from the start"):
            run(RunConfig(**job, output=tmp_path / "s.csv"))

    def test_what_is_in_the_way_is_said(self, job, tmp_path, monkeypatch):
        ray = types.SimpleNamespace(is_initialized=lambda: True)
        keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: "tensorflow"))
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "keras", keras)
        output = tmp_path / "s.csv"
        with pytest.raises(ConfigError, match=r"call ray\.shutdown\(\) first"):
            run(RunConfig(**job | {"mode": "data-parallel"}, output=output))
        with pytest.raises(ConfigError, match="Received: Keras on tensorflow"):
            run(RunConfig(**job, output=output))
        assert list(tmp_path.iterdir()) == []


class TestHelp:
    def test_every_setting_is_one_row(self):
        """The typed fields of both configs, and the rows of the table, with their defaults."""
        for config, rows in ((RunConfig, FLAGS), (PrepareConfig, PREPARE_FLAGS)):
            # A table, which no flag can hold: --config and Python have it.
            settings = {field.name: field for field in fields(config) if field.name != "task"}
            assert sorted(row.name for row in rows) == sorted(settings)
            types = get_type_hints(config)
            for row in rows:
                field = settings[row.name]
                assert row.required == (field.default is MISSING)
                assert row.required or field.default is row.default
                given = row.choices or EXAMPLES[row.read]
                parts = get_args(types[row.name]) or (types[row.name],)
                kinds = tuple(get_origin(part) or part for part in parts)
                assert all(isinstance(row.value(value), kinds) for value in given), row.name

    def test_defaults_are_the_real_ones(self):
        for row in FLAGS:
            text = row.help_text()
            said = re.findall(r"\(default: ([^)]*)\)|; default: ([^)]*)\)", text)
            if row.name in ("head_kernel", "head_bias"):
                assert "(needed with --" in text
                continue
            assert len(said) == 1, f"{row.name}: {text}"
            default = "".join(said[0])
            value = getattr(RunConfig(), row.name)
            if value is False:
                assert default == "off", row.name
            elif value is not None:
                assert re.split(r"[ ,]", default)[0] == str(value), row.name
            else:
                assert default, row.name

    @pytest.mark.parametrize("row", FLAGS, ids=lambda row: row.name)
    def test_a_flag_is_refused_elsewhere_than_its_row_says(self, row):
        value = (row.choices or EXAMPLES[row.read])[-1]
        for mode in MODES:
            if mode not in row.modes:
                with pytest.raises(ConfigError, match=f"^{flag(row.name)} is for --mode"):
                    RunConfig(**{row.name: value, "mode": mode})
        if RUN not in row.commands:
            with pytest.raises(ConfigError, match=f"^{flag(row.name)} needs --plan"):
                RunConfig(**{row.name: value})
        if PLAN not in row.commands:
            with pytest.raises(ConfigError, match=f"^{flag(row.name)} cannot be used with --plan"):
                RunConfig(**{row.name: value, "plan": True})

    def test_it_fits_and_reads_well(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            main(["--help"])
        wide = capsys.readouterr().out
        assert max(map(len, wide.splitlines())) <= 100
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        places = [
            text.index(f"\n{heading}:\n") for heading in dict.fromkeys(row.group for row in FLAGS)
        ]
        assert places == sorted(places)
        assert "\n  --sequence-length TOKENS\n" in text
        for whole in ("data-parallel: Ray", "--num-workers devices of another kind"):
            assert whole in re.sub(r"\s+", " ", text)


class TestNotebook:
    @pytest.fixture
    def drawn(self, monkeypatch):
        """A kernel's IPython, as far as it is asked; returns what its page was sent."""
        sent = []
        shell = types.SimpleNamespace(config={"IPKernelApp": {}})
        display = types.ModuleType("IPython.display")
        display.display = lambda data, **how: sent.append((data, how))
        package = types.ModuleType("IPython")
        package.get_ipython = lambda: shell
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", display)
        return sent

    def test_a_bar_is_drawn_in_its_place(self, drawn, monkeypatch, capsys):
        with Progress() as progress:
            progress.phase("reading <test>.csv")
            progress.expect(rows=8, done=1)
            progress.advance(rows=1, tokens=5)
            progress.note("warning: said once")
        (_, how), *_ = drawn
        assert how["raw"] is True
        assert [how["update"] for _, how in drawn] == [False] + [True] * (len(drawn) - 1)
        assert len({how["display_id"] for _, how in drawn}) == 1
        last = drawn[-1][0]
        assert 'value="0.2500"' in last["text/html"]
        assert "2/8 rows" in last["text/plain"]
        assert capsys.readouterr().err == "warning: said once\n"
        drawn.clear()
        with Progress() as progress:
            progress.phase("reading <test>.csv")
        assert "&lt;test&gt;" in drawn[-1][0]["text/html"]

    def test_not_elsewhere(self, drawn, monkeypatch, tmp_path):
        with Progress(log_format="json"):
            pass
        with open(tmp_path / "err", "w") as stream, Progress(stream=stream):
            pass
        monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
        with Progress():
            pass
        assert drawn == []

    @pytest.mark.slow
    def test_in_a_real_kernel(self, job, tmp_path, monkeypatch):
        """One output that was drawn again and again, and the report as the cell's value."""
        nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        settings = {name: str(value) for name, value in job.items()}
        code = (
            "import runner.executors.single; from tests.support.fakes import FakeReplica\n"
            "runner.executors.single.Replica = FakeReplica\n"
            "from runner import RunConfig, run\n"
            f"run(RunConfig(**{settings!r}, output='s.csv'))['rows']['total']"
        )
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbclient.NotebookClient(
            notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        outputs = notebook.cells[0].outputs
        drawn = [one for one in outputs if one.output_type == "display_data"]
        assert len(drawn) == 1
        assert "40/40 rows" in drawn[0].data["text/plain"]
        assert outputs[-1].data["text/plain"] == "40"
        assert (tmp_path / "s.csv").is_file()


@pytest.mark.slow
def test_with_ray_twice_and_in_a_thread(cache, tmp_path):
    """The demo, so that it needs no files."""
    script = """
import os, signal, sys, threading
from runner import RunConfig, run

def state():
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    return *handlers, dict(os.environ)

before = state()
config = RunConfig(output=sys.argv[1], num_workers=2, sequence_length=32, resume="never")
reports = [run(config)]
thread = threading.Thread(target=lambda: reports.append(run(config)))
thread.start(); thread.join()
import ray
assert [report["rows"]["predicted"] for report in reports] == [600, 600]
assert not ray.is_initialized()
assert state() == before
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s.csv")],
        env=environment(cache, PYTHONPATH=str(ROOT)),
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [[], ["--verbose"], ["--log-format"]])
def test_a_failure_is_said_whatever_the_flags_are(flags, monkeypatch, capsys):
    """Without any flag too: the demo needs none."""

    def fail(arguments):
        raise ConfigError("no such thing")

    monkeypatch.setattr("runner.cli.parse_arguments", fail)
    assert main(flags) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
