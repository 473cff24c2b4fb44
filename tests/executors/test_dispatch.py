"""Workers that die, hang, fail or disagree, whenever: the real dispatcher on a simulated Ray.

What `test_kills.py`, `test_groups.py` and `test_runs.py` do with signals and processes. Times are
simulated seconds; of an undisturbed run on two workers they are: 1 start, 2 load, 0.5 for a shape,
some 5 to predict 40 rows in 11 batches.
"""

import re
from typing import ClassVar

import numpy as np
import pytest
import ray

from runner.common import machine
from runner.common.errors import DataError, DeviceMemoryError, WorkerError
from runner.config.run_config import RunConfig
from runner.driver import run as driver
from runner.executors.ray import failures, nodes
from runner.preset import auto
from runner.preset.reader import read_preset
from sharding.dealing import COMPILE_WITHIN_S
from tests.conftest import TOLERANCE
from tests.support.simulated_ray import Command, Job, Server

MODES = {
    "data-parallel": ("--mode", "data-parallel", "--num-workers", "2"),
    "pipeline": ("--mode", "model-parallel", "--strategy", "pipeline"),
    "tensor": ("--mode", "model-parallel", "--strategy", "tensor"),
}
# What a group is called, how many members it has, and the methods in which a batch passes through.
NOUNS = {"data-parallel": "worker", "pipeline": "group", "tensor": "group"}
MEMBERS = {"data-parallel": 1, "pipeline": 2, "tensor": 2}
PREDICTING = {"data-parallel": ["predict"], "pipeline": ["begin", "finish"], "tensor": ["predict"]}
# The most batches that a replica has under way.
IN_FLIGHT = {"data-parallel": 2, "pipeline": 4, "tensor": 2}
BATCHES = ("--max-tokens-per-batch", "4096")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def command(job, tmp_path, monkeypatch, capsys):
    return Command(job, tmp_path, monkeypatch, capsys)


def assert_whole(done, job):
    """Every row has the answer that was worked out by hand."""
    assert done.code == 0, done.err
    assert done.ids == job.ids
    assert done.differing(job.answers) == []
    rows = done.report["rows"]
    assert rows["resumed"] + rows["predicted"] == rows["total"] == 40
    assert "Traceback" not in done.err


def assert_failed(done, code=1):
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.values is None


def safe_rows(err):
    """Rows that the message of a failed run says are safe."""
    found = re.search(r"([\d,]+) of 40 rows are safe in (\S+?)[;,] the same command", err)
    assert found, err
    return int(found[1])


def restarts(done):
    return [worker["restarts"] for worker in done.report["workers"]]


class TestDeaths:
    @pytest.mark.parametrize("member", [0, -1])
    @pytest.mark.parametrize("moment", ["ping", "load", "hold_tokens", "compile", "predict"])
    @pytest.mark.parametrize("mode", MODES)
    def test_one_at_any_moment_costs_only_unfinished_batches(
        self, command, job, mode, moment, member
    ):
        member %= MEMBERS[mode]
        if (mode, moment) == ("pipeline", "hold_tokens"):
            member = 0  # the other stage sees no tokens
        name = PREDICTING[mode][member % len(PREDICTING[mode])] if moment == "predict" else moment
        command.ray.dies(name, replica=0, member=member, after=2 * (moment == "predict"))
        done = command(*MODES[mode], *BATCHES)
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert done.report["faults"]["quarantined_rows"] == 0
        assert done.report["faults"]["retried_batches"] <= IN_FLIGHT[mode]
        assert (moment == "predict") <= done.report["faults"]["retried_batches"]
        assert done.err.count(f"{NOUNS[mode]} 0 died and is started again") == 1
        assert done.err.count("died and is started again") == 1
        assert "1 worker died; the run went on." in done.out
        assert restarts(done) == ([1, 0] if mode == "data-parallel" else [1, 1])

    @pytest.mark.parametrize("mode", MODES)
    def test_with_the_last_batch(self, command, job, mode):
        once = {"kind": "kill", "rows": [int(job.lengths.argmin())],
                "once": str(command.folder / "once")}  # fmt: skip
        done = command(*MODES[mode], *BATCHES, faults=[once])
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert done.report["faults"]["quarantined_rows"] == 0
        assert len(re.findall("died and is started again", done.err)) == 1

    @pytest.mark.parametrize(
        "error",
        [
            ray.exceptions.WorkerCrashedError(),
            ray.exceptions.OutOfMemoryError("the node is short of memory"),
            ray.exceptions.ObjectLostError("00", None, ""),
            ray.exceptions.NodeDiedError("gone"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_whatever_ray_calls_it(self, command, job, error):
        command.ray.fails("predict", error, replica=1, after=1)
        done = command(*MODES["data-parallel"], *BATCHES)
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert restarts(done) == [0, 1]

    @pytest.mark.parametrize("mode", ["pipeline", "tensor"])
    def test_another_group_goes_on(self, command, job, mode):
        command.ray.dies(PREDICTING[mode][-1], replica=1, member=1, after=1)
        done = command(*MODES[mode], "--num-workers", "4", *BATCHES)
        assert_whole(done, job)
        assert restarts(done) == [0, 0, 1, 1]
        assert done.report["faults"]["worker_deaths"] == 1
        assert done.report["faults"]["retried_batches"] <= IN_FLIGHT[mode]
        assert len(command.ray.called("load", replica=0)) == 2, "it was not loaded again"

    @pytest.mark.parametrize("moment", ["load", "predict"])
    def test_the_other_members_may_hear_of_it_first(self, command, job, moment):
        """They fail with an error of their own that says nothing of the batch."""
        command.ray.members_hear_s, command.ray.death_is_known_s = 0.01, 1.0
        command.ray.dies(moment, member=1, after=int(moment == "predict"))
        done = command(*MODES["tensor"], *BATCHES)
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert "tried again" not in done.err
        assert restarts(done) == [1, 1]

    def test_one_dies_while_another_hangs(self, command, job):
        command.ray.hangs("predict", replica=0, after=2, times=2)
        command.ray.dies("predict", replica=1, after=3)
        done = command(*MODES["data-parallel"], *BATCHES)
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert done.report["faults"]["hangs"] + done.report["plan"]["copied_batches"] >= 1
        assert done.report["faults"]["quarantined_rows"] == 0

    def test_one_that_always_dies_is_given_up(self, command, job):
        command.ray.token_s *= 10
        done = command(*MODES["data-parallel"], *BATCHES, faults=[{"kind": "kill", "replica": 1}])
        assert_whole(done, job)
        assert done.report["faults"]["quarantined_rows"] == 0
        assert done.report["faults"]["worker_deaths"] == failures.MAX_RESTARTS + 1
        assert restarts(done) == [0, failures.MAX_RESTARTS]
        assert len(command.ray.actors) == 2 + failures.MAX_RESTARTS
        assert done.err.count("warning: worker 1 died 4 times and is given up") == 1
        assert [worker["rows"] for worker in done.report["workers"]] == [40, 0]

    @pytest.mark.parametrize("moment", ["ping", "load", "compile"])
    @pytest.mark.parametrize("mode", MODES)
    def test_all_that_always_die_end_the_run(self, command, mode, moment):
        command.ray.dies(moment, times=100)
        workers = "1" if mode == "data-parallel" else "2"
        done = command(*MODES[mode], "--num-workers", workers)
        assert_failed(done)
        assert f"error: Every {NOUNS[mode]} died 4 times" in done.err
        assert "No row is done yet" in done.err
        assert done.err.count("died and is started again") == failures.MAX_RESTARTS
        begun = failures.MAX_RESTARTS + 1
        assert len(command.ray.actors) == begun * MEMBERS[mode]
        assert [path.name for path in command.folder.glob("s.csv*")] == ["s.csv.logs"]

    @pytest.mark.parametrize("mode", MODES)
    def test_rows_that_were_done_are_safe(self, command, job, mode):
        command.ray.interrupt(at=6.0)
        stopped = command(*MODES[mode], *BATCHES)
        assert_failed(stopped, 130)
        kept = safe_rows(stopped.err)
        assert 0 < kept < 40
        died = command(*MODES[mode], *BATCHES, faults=[{"kind": "kill"}])
        assert_failed(died)
        assert f"Every {NOUNS[mode]} died {failures.MAX_RESTARTS + 1} times" in died.err
        assert safe_rows(died.err) == kept
        done = command(*MODES["data-parallel"], *BATCHES, "--resume", "require")
        assert_whole(done, job)
        assert done.report["rows"]["resumed"] == kept
        assert "resuming" in done.err
        again = command(*MODES[mode], *BATCHES)
        assert_whole(again, job)
        assert again.report["rows"]["resumed"] == 40, "nothing is computed twice"
        assert again.report["workers"] == []

    @pytest.mark.parametrize("mode", MODES)
    def test_ray_itself_ends(self, command, job, mode):
        def end():
            command.ray.dead_servers.append(("raylet", Server(-9)))
            for actor in command.ray.actors:
                actor.die()

        command.ray.clock.at(6.0, end)
        done = command(*MODES[mode], *BATCHES)
        assert_failed(done)
        assert "Ray's raylet ended (exit status -9)" in done.err
        assert "died and is started again" not in done.err, "it is no worker's death"
        kept = safe_rows(done.err)
        again = command(*MODES[mode], *BATCHES, "--resume", "require")
        assert_whole(again, job)
        assert again.report["rows"]["resumed"] == kept > 0


class TestHangs:
    @pytest.mark.parametrize("moment", ["ping", "hold_tokens", "load", "compile"])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_step(self, command, job, monkeypatch, mode, moment):
        step, limit_s = {"hold_tokens": "tokens"}.get(moment, moment), 200.0
        assert failures.STEP_WITHIN_S[step] > limit_s
        monkeypatch.setitem(failures.STEP_WITHIN_S, step, limit_s)  # less to simulate
        command.ray.hangs(moment, replica=0, member=0)
        done = command(*MODES[mode], *BATCHES)
        assert_whole(done, job)
        if mode != "data-parallel":
            assert done.faults == {"hangs": 1}
            assert f"group 0 hangs: {limit_s:.0f} s in {step}" in done.err
            assert limit_s < command.ray.clock.now < limit_s + 30
            assert restarts(done) == [1, 1]
        else:
            assert done.faults == {}, "the other worker did it all"
            # It waits for a while for a shape that another compiles.
            waits_s = COMPILE_WITHIN_S if moment == "compile" else 0.0
            assert command.ray.clock.now < waits_s + 20

    def test_a_first_batch(self, command, job):
        """What it takes is not known yet: it gets two minutes."""
        command.ray.hangs("predict")
        done = command(*MODES["tensor"], *BATCHES)
        assert_whole(done, job)
        assert done.faults == {"hangs": 1, "retried_batches": 1}
        assert "group 0 hangs: 12" in done.err
        assert 120 < command.ray.clock.now < 180

    @pytest.mark.parametrize("after", [0, 3])
    def test_patience_that_a_test_has_lowered(self, command, job, after):
        command.ray.hangs("predict", after=2 * after)
        done = command(*MODES["tensor"], *BATCHES, faults=[{"kind": "patience", "seconds": 2.5}])
        assert_whole(done, job)
        assert done.faults == {"hangs": 1, "retried_batches": 1}
        # Of a batch 0.4 s are expected, eight times as long is slow, and twice while it compiles.
        assert re.search(r"group 0 hangs: [78]\.\d s in a batch", done.err)
        assert command.ray.clock.now < 22

    @pytest.mark.parametrize("mode", ["pipeline", "tensor"])
    @pytest.mark.parametrize("member", [0, 1])
    def test_a_later_batch(self, command, job, mode, member):
        """Those behind it did no harm, and are computed again in their turn."""
        command.ray.hangs(PREDICTING[mode][member % len(PREDICTING[mode])], member=member, after=3)
        done = command(*MODES[mode], *BATCHES)
        assert_whole(done, job)
        assert done.faults == {"hangs": 1, "retried_batches": 1}
        assert done.err.count("died and is started again") == 1
        assert command.ray.clock.now < 60

    def test_a_machine_that_was_suspended(self, command, job):
        """Its clock goes on for an hour and no worker does."""
        command.ray.suspend(3600.0, at=5.0)
        done = command(*MODES["data-parallel"], *BATCHES)
        assert_whole(done, job)
        assert done.faults == {}
        assert done.report["seconds"]["total"] > 3600

    @pytest.mark.parametrize("slow", [0, 1])
    def test_a_straggler_is_overtaken(self, command, job, slow):
        """The first answer counts: nobody waits for the slow one's last batch."""
        command.ray.speeds = {slow: 0.05}
        done = command(*MODES["data-parallel"], *BATCHES)
        assert_whole(done, job)
        assert done.faults == {}
        assert done.report["plan"]["copied_batches"] >= 1
        assert command.ray.clock.now < 20, "a batch takes the slow one 15 s"
        rows = [worker["rows"] for worker in done.report["workers"]]
        assert rows[1 - slow] > rows[slow]

    @pytest.mark.parametrize("workers", [2, 4])
    def test_a_last_batch_whose_shape_nobody_else_has(self, command, job, workers):
        """One that is idle makes a program for it, instead of waiting until it is sure to hang."""
        row = int(job.lengths.argmin())
        command.ray.strike("load", lambda call: command.ray.spend(0.2), replica=1)
        done = command(*MODES["data-parallel"], "--num-workers", str(workers), *BATCHES,
                       faults=[{"kind": "hang", "rows": [row],
                                "once": str(command.folder / "once")}])  # fmt: skip
        assert_whole(done, job)
        assert done.faults == {}
        assert done.report["plan"]["copied_batches"] >= 1
        assert command.ray.clock.now < 14, "a hang is seen after 15 s"
        # Of those that are idle one makes it.
        shapes = [shape for _, shape in command.ray.compiled]
        made = [shape for shape in shapes if shape == shapes[-1]]
        assert len(made) == 2


class TestErrors:
    def test_memory_for_a_program(self, command, job):
        """What compiling says is said again of a batch, which can be split."""
        for flags in MODES.values():
            command.ray.strike("compile", refuse, times=1)
            done = command(*flags, *BATCHES, "--resume", "never")
            assert_whole(done, job)
            assert done.faults == {}
            command.renew()

    @pytest.mark.parametrize("mode", MODES)
    def test_files_that_do_not_fit(self, command, mode):
        command.ray.fails("load", DataError("The weights do not fit. Received: nothing"))
        done = command(*MODES[mode])
        assert_failed(done, 2)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert errors == ["error: The weights do not fit. Received: nothing"]
        assert list(command.folder.glob("s.csv*")) == []
        assert command.ray.called("compile") == []

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("step", ["load", "compile"])
    def test_a_step_that_fails(self, command, mode, step):
        command.ray.fails(step, ValueError("no such thing\nand more"))
        done = command(*MODES[mode])
        assert_failed(done)
        noun = NOUNS[mode].capitalize()
        assert f"error: {noun} 0 failed in {step}: ValueError: no such thing\n" in done.err
        assert "No row is done yet" in done.err

    @pytest.mark.parametrize("mode", MODES)
    def test_a_batch_whose_worker_says_why_is_named(self, command, job, mode):
        error = WorkerError("the device is gone")
        command.ray.fails(PREDICTING[mode][-1], error, replica=0, after=1)
        done = command(*MODES[mode], *BATCHES)
        assert_failed(done)
        noun = NOUNS[mode].capitalize()
        named = r"batch \d+ \(3 rows: id (\d+), (\d+), (\d+)\)"
        found = re.search(rf"error: {noun} 0 failed at {named}: the device is gone\n", done.err)
        assert found, done.err
        assert set(found.groups()) <= set(job.ids)

    def test_dtypes_that_differ(self, command):
        command.ray.dtypes = {0: "bfloat16", 1: "float16"}
        done = command(*MODES["data-parallel"])
        assert_failed(done, 2)
        assert "error: The devices differ in what --dtype auto means; name one dtype." in done.err
        assert "bfloat16" in done.err
        assert "float16" in done.err

    def test_a_store_without_room_for_the_tokens(self, command):
        command.ray.store_is_full = True
        done = command(*MODES["data-parallel"])
        assert_failed(done)
        assert "Ray's object store has no room for the 0 MB of token ids" in done.err
        assert "No row is done yet" in done.err

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", ["ObjectStoreFullError", "OutOfDiskError"])
    def test_a_store_without_room_for_an_answer(self, command, mode, kind):
        full = getattr(ray.exceptions, kind)("no room")
        command.ray.fails(PREDICTING[mode][-1], full, after=6)
        done = command(*MODES[mode], *BATCHES)
        assert_failed(done)
        assert "Ray's object store is full: make room" in done.err
        assert safe_rows(done.err) > 0


def refuse(call):
    raise DeviceMemoryError("RESOURCE_EXHAUSTED")


class TestInterrupts:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("at", [0.2, 0.7, 1.5, 3.2])
    def test_while_all_starts(self, command, mode, at):
        command.ray.interrupt(at=at)
        done = command(*MODES[mode])
        assert_failed(done, 130)
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("interrupted. No row is done yet; the same command goes on from")
        assert [path.name for path in command.folder.glob("s.csv*")] == ["s.csv.logs"]


class TestFloat32:
    """Rows that came out as no numbers, in a process of their own that may die."""

    NAN = ({"kind": "nan", "rows": [7]},)

    @pytest.mark.parametrize("mode", MODES)
    def test_it_dies_once(self, command, job, mode):
        command.ray.dies("predict_in_float")
        done = command(*MODES[mode], *BATCHES, faults=self.NAN)
        assert_whole(done, job)
        assert done.faults == {"nonfinite_rows": 1, "worker_deaths": 1}
        assert done.rows["how"][7] == "wider"

    @pytest.mark.parametrize("mode", MODES)
    def test_it_always_dies(self, command, job, mode):
        command.ray.dies("predict_in_float", times=100)
        done = command(*MODES[mode], *BATCHES, faults=self.NAN)
        assert done.code == 0, done.err
        assert done.differing(job.answers) == [7]
        assert f"warning: that failed: {NOUNS[mode]} 0: ActorDiedError" in done.err
        assert done.faults["worker_deaths"] == failures.MAX_RESTARTS + 1
        assert done.report["rows"]["filled"] == 1

    @pytest.mark.parametrize("mode", MODES)
    def test_it_hangs(self, command, job, mode):
        command.ray.hangs("predict_in_float")
        done = command(*MODES[mode], *BATCHES, faults=self.NAN)
        assert done.code == 0, done.err
        assert done.differing(job.answers) == [7]
        assert "warning: that failed" in done.err
        assert "GetTimeoutError" in done.err
        assert 600 < command.ray.clock.now < 660

    def test_it_fails(self, command, job):
        command.ray.fails("predict_in_float", MemoryError("no room"))
        done = command(*MODES["data-parallel"], *BATCHES, faults=self.NAN)
        assert done.code == 0, done.err
        assert done.differing(job.answers) == [7]
        assert "warning: that failed: worker 0: RayTaskError" in done.err

    @pytest.mark.parametrize("mode", ["data-parallel", "pipeline"])
    def test_a_comparison_that_dies_costs_the_figure_alone(self, command, job, mode):
        command.ray.dies("predict_in_float", times=100)
        done = command(*MODES[mode], *BATCHES, "--quantization", "int8")
        assert_whole(done, job)
        assert done.report["quantization"]["mode"] == "int8"
        assert done.report["quantization"]["measured"].startswith("it failed: ")
        assert done.report["faults"]["worker_deaths"] == failures.MAX_RESTARTS + 1

    @pytest.mark.parametrize("mode", ["data-parallel", "pipeline"])
    def test_a_comparison_whose_worker_dies_once(self, command, job, mode):
        command.ray.dies("predict_in_float")
        done = command(*MODES[mode], *BATCHES, "--quantization", "int8")
        assert_whole(done, job)
        assert done.report["quantization"]["max_abs_difference"] < TOLERANCE
        assert done.report["faults"]["worker_deaths"] == 1


class TestExtraPasses:
    @pytest.mark.parametrize("moment", ["never", "first pass", "second pass"])
    @pytest.mark.parametrize("mode", MODES)
    def test_the_average_of_both_orders(self, command, job, mode, moment):
        after = {"first pass": 2, "second pass": 13, "never": 1000}[moment]
        command.ray.dies(PREDICTING[mode][-1], after=after)
        done = command(*MODES[mode], *BATCHES, "--extra-passes", "swap")
        assert done.code == 0, done.err
        mean = (job.answers + job.swapped[:, [1, 0, 2]]) / 2
        assert done.differing(mean) == []
        assert set(done.rows["how"]) == {"swapped"}
        assert done.report["extra_passes"]["rows"] == 40
        assert done.report["faults"]["worker_deaths"] == (moment != "never")
        assert np.abs(mean - job.answers).max() > 100 * TOLERANCE

    def test_a_late_answer_of_the_first_pass_is_not_taken_for_one_of_the_second(self, command, job):
        """A straggler still computes a batch that was copied when the second pass begins."""
        command.ray.speeds = {1: 0.05}
        done = command(*MODES["data-parallel"], *BATCHES, "--extra-passes", "swap")
        assert done.code == 0, done.err
        assert done.report["plan"]["copied_batches"] >= 1
        assert done.differing((job.answers + job.swapped[:, [1, 0, 2]]) / 2) == []

    def test_all_die_in_the_second_pass(self, command, job):
        """What stands by then stands."""
        command.ray.dies("predict", after=15, times=100)
        done = command(*MODES["data-parallel"], *BATCHES, "--extra-passes", "swap")
        assert_failed(done)
        assert "Every worker died 4 times" in done.err
        assert command.output.is_file()


class TestDeadlines:
    """A limit, and workers that do not make it."""

    @pytest.mark.parametrize("policy", ["shorten", "fill"])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_death_under_a_limit(self, command, job, mode, policy):
        command.ray.dies(PREDICTING[mode][-1], after=3)
        limit_s = 8.5 if mode == "data-parallel" else 12.0
        done = command(*MODES[mode], *BATCHES, "--time-limit", f"{limit_s}s",
                       *("--on-deadline", policy))  # fmt: skip
        assert done.code == 0, done.err
        assert done.report["deadline"]["finished_s"] <= limit_s
        assert done.report["faults"]["worker_deaths"] == 1
        changed = set(np.flatnonzero(done.rows["how"] != "predicted").tolist())
        assert changed, "there was not time for all"
        assert set(done.differing(job.answers)) <= changed
        if policy == "fill":
            assert set(done.rows["how"]) == {"predicted", "filled"}

    @pytest.mark.parametrize(("policy", "code"), [("shorten", 0), ("fill", 0), ("fail", 3)])
    @pytest.mark.parametrize("moment", ["ping", "load", "compile", "predict"])
    def test_all_hang(self, command, moment, policy, code):
        command.ray.hangs(moment, times=100)
        done = command(*MODES["data-parallel"], *BATCHES, "--time-limit", "30s",
                       *("--on-deadline", policy))  # fmt: skip
        assert done.code == code, done.err
        assert command.ray.clock.now <= 30
        if policy == "fail":
            assert not command.output.exists()
            assert "--on-deadline fail writes no submission" in done.err
            return
        assert done.report["rows"]["filled"] == 40
        assert np.abs(done.values - 1 / 3).max() < 1e-9

    @pytest.mark.parametrize("policy", ["shorten", "fill", "fail"])
    def test_all_are_lost(self, command, job, policy):
        """It is no matter of time: the run fails, and its rows are safe."""
        command.ray.dies("predict", after=6, times=100)
        done = command(*MODES["data-parallel"], *BATCHES, "--time-limit", "600s",
                       *("--on-deadline", policy))  # fmt: skip
        assert_failed(done)
        assert "Every worker died 4 times" in done.err
        kept = safe_rows(done.err)
        again = command(*MODES["data-parallel"], *BATCHES, "--resume", "require")
        assert_whole(again, job)
        assert again.report["rows"]["resumed"] == kept > 0


class TestRestarts:
    def test_a_worker_that_came_back_works_on(self, command, job):
        command.ray.dies("predict", replica=1, after=1)
        done = command(*MODES["data-parallel"], "--max-tokens-per-batch", "1024")
        assert_whole(done, job)
        assert restarts(done) == [0, 1]
        assert all(worker["rows"] > 0 for worker in done.report["workers"])
        later = [at for at in command.ray.called("predict", replica=1) if at > 8]
        assert later, "it predicted after its second start"
        assert done.report["workers"][1]["compiled_shapes"] >= 1


class TestNodes:
    """A cluster whose machines come and go."""

    JOIN = ("--address", "head:6379")
    MODES: ClassVar = {
        "data-parallel": ("--mode", "data-parallel"),
        "pipeline": MODES["pipeline"],
        "tensor": MODES["tensor"],
    }

    @pytest.fixture
    def cluster(self, command):
        """Two machines with a core each."""
        for name in ("host-a", "host-b"):
            command.ray.add_node(name, 1)
        return command

    @pytest.mark.parametrize("mode", MODES)
    def test_two_machines(self, cluster, job, mode):
        done = cluster(*self.MODES[mode], *self.JOIN, *BATCHES)
        assert_whole(done, job)
        assert done.faults == {}
        # A group has a member on each.
        assert [worker["node"] for worker in done.report["workers"]] == ["host-a", "host-b"]
        assert all(worker["rows"] > 0 for worker in done.report["workers"])

    @pytest.mark.parametrize("known_in_s", [0.1, 10.0])
    def test_one_is_lost(self, cluster, job, known_in_s):
        """Its workers' calls fail, or the cluster says so before they do."""
        cluster.ray.death_is_known_s = known_in_s
        cluster.ray.lose_node("host-b", at=7.0)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES)
        assert_whole(done, job)
        assert done.report["faults"]["worker_deaths"] == 1
        assert "worker 1 is gone with its node (host-b)" in done.err
        assert "started again" not in done.err
        assert [worker["node"] for worker in done.report["workers"]] == ["host-a", "host-b"]

    @pytest.mark.parametrize("mode", ["pipeline", "tensor"])
    def test_a_group_is_lost_with_the_machine_of_one_member(self, cluster, job, mode):
        """It goes on where it fits, once another machine has come."""
        cluster.ray.lose_node("host-b", at=7.0)
        cluster.ray.add_node("host-c", 1, at=20.0)
        done = cluster(*self.MODES[mode], *self.JOIN, "--num-workers", "2", *BATCHES)
        assert_whole(done, job)
        assert "group 0 is gone with its node (host-a, host-b)" in done.err
        nodes = [worker["node"] for worker in done.report["workers"]]
        assert nodes == ["host-a", "host-b", "host-a", "host-c"]
        assert done.report["faults"]["retried_batches"] <= IN_FLIGHT[mode]

    def test_one_joins(self, cluster, job):
        cluster.ray.token_s *= 4
        cluster.ray.add_node("host-c", 2, at=6.0)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES)
        assert_whole(done, job)
        assert "node host-c joins with 2 workers" in done.err
        nodes = [worker["node"] for worker in done.report["workers"]]
        assert nodes == ["host-a", "host-b", "host-c", "host-c"]
        assert sum(worker["rows"] for worker in done.report["workers"][2:]) > 0

    def test_a_lost_one_is_made_up_for_and_no_more(self, cluster, job):
        cluster.ray.token_s *= 8
        cluster.ray.add_node("host-c", 2, at=6.0)
        cluster.ray.lose_node("host-b", at=12.0)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, "--num-workers", "2", *BATCHES)
        assert_whole(done, job)
        nodes = [worker["node"] for worker in done.report["workers"]]
        assert nodes == ["host-a", "host-b", "host-c"]
        assert done.report["workers"][2]["rows"] > 0

    def test_a_worker_that_dies_on_a_machine_that_lives(self, cluster, job):
        cluster.ray.dies("predict", replica=1, after=1)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES)
        assert_whole(done, job)
        assert "worker 1 died and is started again" in done.err
        assert restarts(done) == [0, 1]
        first, second = (one.node for one in cluster.ray.actors if one.replica == 1)
        assert first == second

    def test_all_are_lost_and_no_other_comes(self, cluster, monkeypatch):
        monkeypatch.setattr(failures, "NODE_COMES_WITHIN_S", 60.0)
        for name in ("host-a", "host-b"):
            cluster.ray.lose_node(name, at=7.0)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES)
        assert_failed(done)
        assert "All nodes with workers are gone, and no other came in 60 s" in done.err
        assert safe_rows(done.err) > 0
        assert 67 < cluster.ray.clock.now < 80

    def test_a_group_whose_members_do_not_meet(self, cluster, job):
        cluster.ray.hangs("reserve_address")
        done = cluster(*self.MODES["tensor"], *self.JOIN, *BATCHES)
        assert_whole(done, job)
        assert "group 0 hangs: 120 s in meet" in done.err
        assert done.faults == {"hangs": 1}

    def test_an_interrupt_leaves_the_cluster_as_it_was(self, cluster, job):
        cluster.ray.interrupt(at=8.0)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES)
        assert_failed(done, 130)
        kept = safe_rows(done.err)
        cluster.renew()
        for name in ("host-a", "host-b"):
            cluster.ray.add_node(name, 1)
        again = cluster(*self.MODES["data-parallel"], *self.JOIN, *BATCHES, "--resume", "require")
        assert_whole(again, job)
        assert again.report["rows"]["resumed"] == kept > 0

    @pytest.fixture
    def cards(self, cluster, monkeypatch):
        """Give the machines GPUs of so many bytes; fail if the driver's own are asked."""

        def give(**memory):
            def of_node(facts):
                call = cluster.ray.current
                assert call is not None, "the driver's own card was asked"
                return facts[bytes.fromhex(call.actor.node).rstrip(b"\0").decode()]

            sizes = {f"host-{name}": size for name, size in memory.items()}
            dtypes = dict.fromkeys(sizes, "float16")
            for module in (machine, auto, driver):
                monkeypatch.setattr(
                    module, "device_memory_bytes", lambda: of_node(sizes), raising=False
                )
            monkeypatch.setattr(machine, "gpu_dtype", lambda: of_node(dtypes))
            monkeypatch.setattr(machine, "ask_nvidia_smi", lambda fields: of_node({}))
            monkeypatch.setattr(nodes, "find_devices", lambda: ("gpu", 2))
            monkeypatch.delenv("JAX_PLATFORMS")

        return give

    def test_the_cards_of_the_nodes_decide(self, cluster, job, cards):
        """What auto means, and how many tokens fit beside the weights on the smaller one."""
        cards(a=80 << 20, b=8 << 20)
        done = cluster(*self.MODES["data-parallel"], *self.JOIN)
        assert_whole(done, job)
        assert done.report["model"]["dtype"] == "float16"
        config = RunConfig(sequence_length=job.length)
        preset = read_preset(job.files["preset"])
        fit = auto.tokens_per_batch(config, preset, "gpu", lambda: 8 << 20)
        assert fit < auto.tokens_per_batch(config, preset, "gpu", lambda: 80 << 20)
        largest = max(shape["rows"] * shape["length"] for shape in done.report["plan"]["shapes"])
        assert largest <= fit

    def test_stages_fit_the_cards_of_the_nodes(self, cluster, job, cards):
        cards(a=1 << 20, b=1 << 20)
        done = cluster(*self.MODES["pipeline"], *self.JOIN)
        assert_whole(done, job)
        assert done.err.startswith("strategy pipeline: as requested")
        assert len(done.report["group"]["stages"]) == 2

    def test_stages_that_do_not_fit_the_cards_of_the_nodes(self, cluster, cards):
        cards(a=1 << 20, b=15_000)
        done = cluster(*self.MODES["pipeline"], *self.JOIN)
        assert_failed(done, 2)
        assert "error: --strategy pipeline: " in done.err
        assert "cannot be cut into 2 stages of at most 0.0 GB" in done.err

    def test_more_workers_than_there_is_room_for(self, cluster):
        done = cluster(*self.MODES["data-parallel"], *self.JOIN, "--num-workers", "3")
        assert_failed(done, 2)
        assert "2 are free on the 2 nodes" in done.err
