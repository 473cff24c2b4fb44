"""What a run says, as JSON and in its folder of logs, whoever is killed."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from runner.common.errors import DataError, WorkerError
from runner.config.flags import flag
from runner.telemetry import logs
from runner.telemetry.logs import DRIVER_ERRORS, DRIVER_LOG, LogEvent, RunLogs, keep_logs_of_ray
from runner.telemetry.progress import Progress
from tests.conftest import ROOT, environment, slow_until, wait_until
from tests.support.fakes import write_fake_job

# Runs a command line with a replica that writes to the process' own streams, past Python's.
NOISY = """
import json, os, sys
import runner.executors.single
from runner.cli import main
from tests.support.fakes import FakeReplica

class Noisy(FakeReplica):
    def load(self, spec):
        os.write(2, b"W0000 a library speaks\\n")
        print("and prints", flush=True)
        return super().load(spec)

    def predict(self, batch):
        if os.environ.get("DIES"):
            os.write(2, b"F0000 check failed: last words\\n")
            os.kill(os.getpid(), 9)
        if os.environ.get("FAILS"):
            raise RuntimeError("all is lost")
        return super().predict(batch)

runner.executors.single.Replica = Noisy
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    settings = write_fake_job(tmp_path_factory.mktemp("job"))
    named = [part for name, path in settings.items() for part in (flag(name), str(path))]
    return ["--mode", "single", "--sequence-length", "64", *named]


@pytest.fixture
def noisy(job, cache, tmp_path):
    """Run; return the finished process and the folder of logs."""

    def run(*flags, **extra):
        done = subprocess.run(
            [sys.executable, "-c", NOISY, *job, *flags, "--output", str(tmp_path / "s.csv")],
            env=environment(cache, PYTHONPATH=str(ROOT), **extra),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done, tmp_path / "s.csv.logs"

    return run


def lines_of(text):
    """Each line as JSON, with the four keys that all have."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "event", "message"} <= line.keys() for line in found)
    return found


@pytest.mark.process
class TestCommand:
    def test_json_and_nothing_else(self, noisy):
        done, folder = noisy("--log-format", "json", "--time-limit", "1h")
        assert done.returncode == 0, done.stderr
        events = [line["event"] for line in lines_of(done.stderr)]
        assert "stage" in events
        (summary,) = (json.loads(line) for line in done.stdout.splitlines())
        assert summary["rows"]["predicted"] == 40
        assert "40 rows ->" in summary["message"]
        assert (folder / DRIVER_ERRORS).read_text() == "W0000 a library speaks\nand prints\n"
        assert "40 rows ->" in (folder / DRIVER_LOG).read_text()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}

    def test_text_shows_what_libraries_say(self, noisy):
        done, folder = noisy()
        assert "W0000 a library speaks\n" in done.stderr
        assert done.stdout.startswith("and prints\n40 rows -> "), "as a debugger would"
        assert "W0000 a library speaks\n" in (folder / DRIVER_ERRORS).read_text()

    def test_last_words_of_a_crash_are_kept(self, noisy):
        done, folder = noisy(DIES="1")
        assert done.returncode == -signal.SIGKILL
        assert "last words" in (folder / DRIVER_ERRORS).read_text()

    def test_a_failure_names_the_log(self, noisy):
        done, folder = noisy("--log-format", "json", FAILS="1")
        assert done.returncode == 1
        end = lines_of(done.stderr)[-1]
        assert (end["event"], end["level"], end["exit_code"]) == ("end", "error", 1)
        assert end["error"] == "WorkerError"
        assert end["message"].splitlines()[-1] == f"Logs: {folder / DRIVER_LOG}"
        assert any("all is lost" in line for line in end["traceback"])
        faults = [line for line in lines_of(done.stderr) if line["event"] == "fault"]
        assert faults[0]["level"] == "warning"
        kept = (folder / DRIVER_LOG).read_text()
        assert 'raise RuntimeError("all is lost")' in kept or "RuntimeError: all is lost" in kept
        assert "Traceback" in kept

    def test_bad_input_leaves_nothing_and_says_so_as_json(self, noisy, tmp_path):
        done, folder = noisy("--log-format=json", "--input", str(tmp_path / "absent.csv"))
        assert done.returncode == 2
        line = lines_of(done.stderr)[-1]
        assert (line["event"], line["exit_code"], line["error"]) == ("end", 2, "DataError")
        assert not folder.exists()
        done, _ = noisy("--log-format", "json", "--sped", "9")
        assert lines_of(done.stderr)[0]["error"] == "ConfigError"

    def test_a_folder_that_cannot_be(self, noisy, tmp_path):
        done, _ = noisy("--log-dir", str(tmp_path / "absent" / "logs"))
        assert done.returncode == 2
        assert "--log-dir must name a folder" in done.stderr
        (tmp_path / "file").touch()
        done, _ = noisy("--log-dir", str(tmp_path / "file"))
        assert done.returncode == 2
        assert "--log-dir must name a folder" in done.stderr


class TestFolder:
    def test_the_run_before_is_kept_once(self, tmp_path):
        folder = tmp_path / "logs"
        folder.mkdir()
        (folder / "mine.txt").write_text("not of a run")
        for said in ("first", "second", "third"):
            with RunLogs(folder) as run:
                run.record(LogEvent("note", f"{said}, before the folder was there"))
                run.open(None)
                run.record(LogEvent("note", said))
        assert (folder / "mine.txt").is_file()
        assert (folder / DRIVER_LOG).read_text().count("third") == 2
        before = (folder / logs.PREVIOUS / DRIVER_LOG).read_text()
        assert before.count("second") == 2
        assert "first" not in before

    def test_what_a_failed_run_leaves(self, tmp_path):
        folder = tmp_path / "logs"

        def fail(error):
            with RunLogs(folder) as run:
                run.open(None)
                raise error

        with pytest.raises(DataError, match=r"^bad$"):
            fail(DataError("bad"))
        assert not folder.exists()
        with pytest.raises(WorkerError) as raised:
            fail(WorkerError("died"))
        assert str(raised.value) == f"died\nLogs: {folder / DRIVER_LOG}"
        assert "WorkerError: died\n    Traceback" in (folder / DRIVER_LOG).read_text()

    def test_files_are_kept_small(self, tmp_path, monkeypatch):
        monkeypatch.setattr(logs, "MOST_BYTES", 1000)
        monkeypatch.setattr(logs, "LOOK_S", 0.01)
        echoed = []
        with RunLogs(tmp_path / "logs", workers_too=True) as run:
            run.open(echoed.append)
            path = run.folder / logs.worker_log(0, 1)
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
                for number in range(40):
                    file.write(f"line {number:3} {'x' * 50}\n")
                    file.flush()
                    time.sleep(0.005)
                wait_until(lambda: path.stat().st_size <= 1000, "it is cut")
                file.write("the end\n")
        assert path.read_bytes().rstrip(b"\0").endswith(b"the end\n")
        assert b"\0" not in path.read_bytes(), "a writer goes on at the new end"
        assert path.with_name(path.name + ".1").is_file()
        assert echoed[0].startswith("(worker-0-1) line   0")

    def test_a_killed_worker_has_said_all(self, tmp_path):
        script = (
            "import os, sys; from runner.telemetry.logs import write_to_folder as write\n"
            "write(sys.argv[1], 3, 0); print('printed'); os.write(2, b'written\\n')\n"
            "os.kill(os.getpid(), 9)"
        )
        for _ in range(2):
            subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
        lines = (tmp_path / "worker-3-0.log").read_text().splitlines()
        assert lines[1:3] == ["printed", "written"]
        assert lines[0].split(": process")[0].endswith("worker 3, member 0")
        assert len(lines) == 6

    def test_logs_of_ray_are_kept_by_their_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr(logs, "MOST_RAY_BYTES", 10)
        session, folder = tmp_path / "session", tmp_path / "logs"
        session.mkdir()
        folder.mkdir()
        (session / "raylet.out").write_text("x" * 100 + "the end")
        (session / "raylet.err").touch()
        keep_logs_of_ray(session, folder)
        assert [path.name for path in (folder / "ray").iterdir()] == ["raylet.out"]
        assert (folder / "ray" / "raylet.out").read_text() == "xxxthe end"
        keep_logs_of_ray(tmp_path / "absent", folder)


class TestEvents:
    def test_a_message_is_one_line(self):
        event = LogEvent("note", "a\n2026-11-25T00:00:00.000Z info forged", fields={"rows": 3})
        assert len(event.as_text().splitlines()) == 1
        assert json.loads(event.as_json()) == {
            "time": logs._iso(event.time), "level": "info", "event": "note",
            "message": "a\n2026-11-25T00:00:00.000Z info forged", "rows": 3,
        }  # fmt: skip

    def test_what_is_said_in_which_way(self, capsys):
        heard = []
        with Progress(log_format="json", record=heard.append) as progress:
            for count in (1, 2_000):
                progress.phase(f"tokenizing {count:,}/3,000 rows")
            progress.note("warning: no rows")
            progress.note("deadline: rows are cut")
            progress.note("worker 0 died", event="fault", replica=0)
        said = lines_of(capsys.readouterr().err)
        assert [(line["level"], line["event"], line["message"]) for line in said] == [
            ("info", "stage", "tokenizing 1/3,000 rows"),
            ("warning", "note", "no rows"),
            ("info", "decision", "rows are cut"),
            ("info", "fault", "worker 0 died"),
        ]
        assert said[-1]["replica"] == 0
        assert [event.message for event in heard] == [line["message"] for line in said]

    def test_progress_as_json(self, capsys, monkeypatch):
        monkeypatch.setattr("runner.telemetry.progress.REDRAW_S", 0.01)
        monkeypatch.setattr("runner.telemetry.progress.JSON_PROGRESS_S", 0.05)
        with Progress(log_format="json") as progress:
            progress.expect(rows=10, done=1)
            progress.advance(rows=1, tokens=5)
            progress.advance(rows=2, tokens=50)
            progress.set_worker(0, "busy")
            progress.forecast(left_s=75.0, slack_s=-12.0)
            said = []

            def is_said():
                said.append(capsys.readouterr().err)
                return "seconds_slack" in said[-1]

            wait_until(is_said, "progress")
        last = lines_of("".join(said))[-1]
        assert last["event"] == "progress"
        assert (last["rows_done"], last["rows_total"]) == (4, 10)
        assert last["workers"] == {"0": "busy"}
        assert last["seconds_slack"] == -12.0
        assert 0 < last["seconds_left"] <= 75


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data-parallel", "tensor"])
def test_workers_write_to_one_folder(start, models, arena_rows, tmp_path, mode):
    """One is killed: its last words and the first of the next are in its file."""
    tensor = ["--mode", "model-parallel", "--strategy", "tensor"]
    run = start(
        *(tensor if mode == "tensor" else []), *("--num-workers", "2"),
        *models["arena"].flags(), "--input", arena_rows, "--sequence-length", "1024",
        *("--output", tmp_path / "s.csv", "--log-format", "json", "--log-dir", tmp_path / "logs"),
        **slow_until(tmp_path / "killed"),
    )  # fmt: skip
    name = "TensorMember" if mode == "tensor" else "Replica"
    run.wait_for_workers(".predict", count=2, name=name)[0].kill()
    (tmp_path / "killed").touch()
    code, out, err = run.finish()
    assert code == 0, err
    faults = [line for line in lines_of(err) if line["event"] == "fault"]
    assert [line["log"] for line in faults] in (["worker-0-*.log"], ["worker-1-*.log"])
    assert json.loads(out)["faults"]["worker_deaths"] == 1
    found = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    names = {"worker-0-0.log", "worker-0-1.log" if mode == "tensor" else "worker-1-0.log"}
    assert names | {DRIVER_LOG} <= set(found)
    lives = [found[name].count(" starts\n") for name in sorted(names)]
    assert sorted(lives) == ([2, 2] if mode == "tensor" else [1, 2])
    assert "died and is started again" in found[DRIVER_LOG]
