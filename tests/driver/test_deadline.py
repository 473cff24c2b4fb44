"""What a time limit decides, by a clock that jumps; and what it leaves, in real processes."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks.simulated import FLOPS_PER_S, WAIT_S, Replica, Simulated
from runner.common.records import BatchResult
from runner.demo import make_rows, write_test_set
from runner.driver.deadline import MARGIN_S, Deadline, lengths_to_cut_to, longest_that_fits, spread
from runner.driver.steering import Steering
from runner.model.injected_faults import VARIABLE
from runner.results.ledger import Ledger
from runner.results.table import PREDICTED, SHORTENED, Merger
from sharding.backlog import Backlog
from sharding.batches import BatchShape, plan_batches
from sharding.forecast import Pace, seconds_left, seconds_of
from sharding.rates import Intervals, Rates
from tests.conftest import LENGTH, ROOT, TOLERANCE


class TestArithmetic:
    """Deadlines, forecasts and rates alone."""

    def test_time_is_left_to_write(self):
        deadline = Deadline(100.0, "shorten")
        deadline.rehearsed(2.0)
        margin = MARGIN_S + 0.5 + 6
        assert deadline.left_s(50.0) == pytest.approx(50 - margin)
        assert not deadline.is_over(99.9 - margin)
        assert deadline.is_over(100 - margin)
        assert deadline.is_over(deadline.last_call_s())
        assert deadline.last_call_s() < 100 - 2.0, "there is still time to write once"
        assert deadline.needs_less(43.0, 50.0)
        assert not deadline.needs_less(40.0, 50.0)
        assert deadline.has_room(35.0, 50.0)
        assert not deadline.has_room(40.0, 50.0)
        none = Deadline(None, "shorten")
        assert not none.is_over(1e9)
        assert none.last_call_s() is None

    def test_the_longest_length_that_fits(self):
        lengths = [8, 16, 24, 32]
        assert longest_that_fits(lengths, float, 25.0) == 24
        assert longest_that_fits(lengths, float, 1000.0) == 32
        assert longest_that_fits(lengths, float, 7.0) is None
        assert longest_that_fits([], float, 7.0) is None

    def test_lengths_to_choose_from(self):
        assert lengths_to_cut_to(10, 30, multiple_of=8, others=(12, 30, 44)) == [10, 12, 16, 24, 30]
        assert lengths_to_cut_to(30, 30, multiple_of=8) == [30]
        assert spread([100, 101, 104, 130], 0.0) == [100, 104, 130]
        assert spread([100, 101, 104, 130], 0.1) == [100, 130], "a compile takes a tenth"
        assert spread([], 0.1) == []

    def test_work_over_speed(self):
        plan = plan_batches(np.array([32] * 4), buckets=(32,), max_tokens_per_batch=32)
        backlog, rates = Backlog(plan.batches, cost=tokens), Rates(tokens)
        assert seconds_left(backlog, rates, []) is None
        assert seconds_left(backlog, rates, [Pace(32.0)]) == pytest.approx(4.0)
        assert seconds_left(backlog, rates, [Pace(32.0, 1.0)]) == pytest.approx(5.0)
        backlog.take(0, runnable=anything, alone=True, share=1)
        assert seconds_left(backlog, rates, [Pace(32.0)]) == pytest.approx(3.5)
        backlog.take(0, runnable=anything, alone=True, share=1)
        assert seconds_left(backlog, rates, [Pace(32.0)]) == pytest.approx(3.5), "it is in line"
        assert seconds_left(backlog, rates, [Pace(32.0)] * 2) == pytest.approx(2.0)

    def test_replicas_that_begin_later(self):
        assert seconds_of(10.0, [Pace(1.0), Pace(1.0, 4.0)]) == pytest.approx(7.0)
        assert seconds_of(3.0, [Pace(1.0), Pace(1.0, 4.0)]) == pytest.approx(3.0)
        assert seconds_of(3.0, [Pace(1.0, 4.0), Pace(0.0)]) == pytest.approx(7.0)
        assert seconds_of(3.0, [Pace(0.0)]) is None

    def test_what_disturbs_a_batch_is_left_out(self):
        rates, shape, other = (
            Rates(tokens, compiling_takes=0.5),
            BatchShape(1, 10),
            BatchShape(1, 5),
        )
        rates.learn(0, shape, 9.0, is_first=True)
        rates.learn(0, shape, 2.0, compiling_s=2.0)
        assert not rates.is_measured(0)
        for _ in range(3):
            rates.learn(0, shape, 1.0)
        assert rates.is_measured(0)
        assert rates.seconds(0, shape) == pytest.approx(1.0, rel=0.35)
        for _ in range(100):
            rates.learn(0, shape, 1.0)
            rates.learn(0, shape, 4.0, compiling_s=4.0)
        assert rates.seconds(0, shape) == pytest.approx(1.0, rel=0.05)
        assert rates.compiling_share() == pytest.approx(0.75, abs=0.03)
        rates.learn(0, other, 3.5, is_first=True)
        assert rates.first_s() == pytest.approx(3.0, rel=0.1)

    def test_intervals(self):
        compiling = Intervals()
        compiling.begin(1.0)
        compiling.end(3.0)
        compiling.begin(5.0)
        assert compiling.within(0.0, 2.0) == 1.0
        assert compiling.within(2.0, 6.0) == 2.0
        compiling.end(6.0)
        assert compiling.within(5.5, 9.0) == 0.5


def tokens(shape):
    return float(shape.tokens)


def anything(shape):
    return True


class Steered:
    """Steering over batches of one row at 10 tokens a second, where nothing moves by itself."""

    def __init__(self, lengths, *, left_s, policy="shorten", caps=(8, 16, 24, 32), full=None):
        self.now, self.speed = 10.0, 10.0
        self.lengths, self.merger = np.array(lengths), Merger([str(n) for n in lengths], 3)
        self.notes, self.kept = [], []
        deadline = Deadline(self.now + left_s + MARGIN_S, policy)
        everything = SimpleNamespace(
            paces=lambda shapes=None: [Pace(self.speed)],
            warm=lambda: {BatchShape(1, cap) for cap in caps},
            is_measured=lambda: True,
            compile_s=lambda: 0.0,
        )
        self.backlog = Backlog(self.plan(range(len(lengths)), 32).batches, cost=tokens)
        self.steering = Steering(
            self.backlog, Rates(tokens), everything,
            ledger=Ledger(self.merger, SimpleNamespace(
                add=lambda rows, *_, **how: self.kept.append((rows, how)))),
            progress=SimpleNamespace(note=self.notes.append, advance=lambda **_: None,
                                     forecast=lambda **_: None),
            deadline=deadline, lengths=self.lengths,
            replan=lambda rows, cap, _: self.plan(rows, cap),
            caps=caps, full_length=full, started=0.0, clock=lambda: self.now,
        )  # fmt: skip
        self.deadline = deadline

    def plan(self, rows, cap):
        rows = np.array(sorted(rows), dtype=np.int64)
        lengths = np.minimum(self.lengths[rows], cap)
        return plan_batches(lengths, buckets=tuple(range(1, cap + 1)), max_tokens_per_batch=1,
                            rows=rows)  # fmt: skip

    def compute(self):
        """Answer the next batch, in the time that it takes."""
        batch = self.backlog.take(0, runnable=anything, alone=True)
        self.now += batch.shape.tokens / 10.0
        self.backlog.finish(batch)
        self.steering.take(BatchResult(batch, 0, np.full((1, 3), 1 / 3, np.float32), ()))
        return batch

    def waiting(self):
        return [batch.shape.length for batch in self.backlog.waiting()]


class TestDecisions:
    def test_nothing_is_cut_where_all_fits(self):
        run = Steered([32, 20, 8], left_s=10.0)
        assert run.steering.tick()
        assert run.steering.cap is None
        assert run.deadline.events == []

    def test_the_longest_rows_are_cut_and_no_more_than_needed(self):
        # 100 tokens in all, ten a second; the last batch counts once more, for it must come.
        run = Steered([32, 32, 20, 16], left_s=10.0)
        run.steering.tick()
        assert run.steering.cap == 24, "24 + 24 + 20 + 16 are 8.4 s and 1 s for the last; 32 is not"
        assert run.waiting() == [24, 24, 20, 16]
        assert "2 that are longer are cut to 24 tokens" in run.notes[0]
        assert run.deadline.events[0]["at_s"] == 10.0

    def test_a_cut_is_taken_back(self):
        run = Steered([32] * 20, left_s=40.0)
        run.steering.tick()
        assert run.steering.cap == 16
        run.speed = 20.0
        run.now += 0.6
        run.steering.tick()
        assert run.steering.cap == 16, "decisions keep their distance"
        run.now += 2.0
        run.steering.tick()
        assert run.steering.cap is None
        assert "no longer cut" in run.notes[-1]

    def test_a_forecast_that_wavers_changes_nothing(self):
        run, chance = Steered([32] * 40, left_s=72.0), random.Random(1)
        run.steering.tick()
        assert run.steering.cap == 16
        for _ in range(20):
            run.compute()
            run.speed = 10.0 * chance.uniform(0.95, 1.05)
            run.steering.tick()
        assert len(run.deadline.events) == 1

    def test_below_the_floor_the_cheapest_come_first(self):
        run = Steered([32] * 10 + [12], left_s=5.0)
        run.steering.tick()
        assert run.steering.cap == 8
        assert run.waiting() == [8] * 11
        assert "those that there is no time for get the fallback" in run.notes[-1]
        done = 0
        while run.steering.tick():
            run.compute()
            done += 1
        assert done == 7, "5 s at 0.8 s a row, the last one begun in time"
        assert not run.merger.how[0]

    def test_fill_takes_the_cheapest_first_and_cuts_nothing(self):
        run = Steered([32, 20, 8], left_s=5.0, policy="fill")
        run.steering.tick()
        assert run.waiting() == [8, 20, 32]
        assert run.steering.cap is None
        while run.steering.tick():
            run.compute()
        assert run.merger.how in (["predicted"] * 3, ["", "predicted", "predicted"])
        assert len(run.notes) == 1

    def test_fail_says_so_once(self):
        run = Steered([32, 20, 8], left_s=5.0, policy="fail")
        for _ in range(4):
            run.steering.tick()
            run.now += 1.0
        assert len(run.notes) == 1
        assert "will not fit" in run.notes[0]
        assert run.waiting() == [32, 20, 8]

    def test_with_padded_mean_every_row_is_cut(self):
        run = Steered([32, 10, 8], left_s=10.0, full=32)
        run.plan = lambda rows, cap: plan_batches(
            np.full(len(rows), cap), buckets=(cap,), max_tokens_per_batch=1,
            rows=np.array(sorted(rows)))  # fmt: skip
        run.backlog.withdraw()
        run.backlog.add(run.plan([0, 1, 2], 32).batches)
        run.speed = 8.0
        run.steering.tick()
        assert run.steering.cap == 16
        while run.backlog:
            run.compute()
        assert run.merger.how == [SHORTENED] * 3
        assert run.merger.lengths.tolist() == [16, 10, 8]

    def test_time_left_over_makes_cut_rows_whole(self):
        run = Steered([32, 24, 8], left_s=6.0)
        run.steering.tick()
        assert run.steering.cap == 16
        while run.backlog:
            run.compute()
        assert run.merger.how == [SHORTENED, SHORTENED, PREDICTED]
        run.steering.tick()
        assert run.waiting() == [], "2 s are left, 24 tokens take 2.4"
        run.deadline.limit_s += 1.0
        run.steering.tick()
        assert run.waiting() == [24], "the shortest first"
        run.compute()
        assert run.merger.how == [SHORTENED, PREDICTED, PREDICTED]
        assert run.merger.lengths.tolist() == [16, 24, 8]

    def test_rows_that_have_an_answer_are_not_cut_again(self):
        run = Steered([32, 32, 24], left_s=10.0)
        values = np.full((1, 3), 1 / 3)
        run.merger.add([1], values, how=SHORTENED, lengths=[28])
        run.now += 5.0
        run.steering.tick()
        assert run.steering.cap == 16
        assert run.waiting() == [16, 16], "the row that has an answer stands with it"
        assert run.merger.lengths.tolist() == [0, 28, 0]


@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_all_stands_in_time(seed):
    """Simulated runs: speeds, noise, deaths and hangs by the seed."""
    chance = random.Random(seed)
    lengths = np.random.default_rng(seed).lognormal(6.0, 0.75, 400).clip(20, 512).astype(int)
    pooling = chance.choice(["mean", "padded-mean"])
    count, noise = chance.choice([1, 2, 3]), chance.choice([0.05, 0.3])
    fault = chance.choice(["dies_at", "hangs_at", "speed", None])

    def replicas():
        made = [Replica(number, speed=FLOPS_PER_S / 3, noise=noise) for number in range(count)]
        if fault == "speed":
            made[0].speed /= 3
        elif fault:
            setattr(made[0], fault, 10.0)
        return made

    needed_s = Simulated(lengths, replicas(), pooling=pooling, seed=seed).run()
    for share in (0.25, 0.5, 0.75, 1.0):
        limit_s = needed_s * share
        run = Simulated(lengths, replicas(), limit_s=limit_s, pooling=pooling, seed=seed + 1)
        ended_s, how = run.run(), Counter(run.merger.how)
        assert ended_s <= limit_s - run.deadline.margin_s + WAIT_S + 0.01
        if how[SHORTENED] or how[""]:
            assert ended_s + 0.1 >= 0.85 * limit_s or limit_s < 8, "what was given was used"
        if share >= 0.75:
            # At most a batch on each replica; more where one is lost and nobody could know.
            assert how[""] <= (8 if fault in (None, "speed") else 80)
        for row, made in enumerate(run.merger.how):
            full = min(lengths[row], 512)
            assert made != PREDICTED or run.merger.lengths[row] == full
            assert made != SHORTENED or pooling == "padded-mean" or run.merger.lengths[row] < full
        assert len(run.deadline.events) <= 12, run.deadline.events


def test_the_forecast_after_a_tenth():
    lengths = np.random.default_rng(5).lognormal(6.0, 0.75, 905).clip(20, 512).astype(int)
    for count in (1, 2):
        replicas = [Replica(n, speed=FLOPS_PER_S / 3, noise=0.1) for n in range(count)]
        run = Simulated(lengths, replicas, limit_s=1e4)
        took_s = run.run()
        began_s = replicas[0].starts_in_s + replicas[0].compiles_in_s
        at, total = next(
            pair
            for pair in run.steering.tally.forecasts
            if pair[0] > began_s + (took_s - began_s) / 10
        )
        assert total == pytest.approx(took_s, rel=0.1), at


# Seconds that no process here sleeps to its end.
LONG_S = 600


@pytest.mark.process
class TestGuard:
    def process(self, body):
        code = f"import time\nfrom runner.driver.guard import Guard\nnow = time.monotonic()\n{body}"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LONG_S)

    def test_it_ends_a_process_that_is_stuck(self):
        stuck = f"with Guard(now + 0.3, lambda: 7):\n    time.sleep({LONG_S})"
        assert self.process(stuck).returncode == 7

    def test_it_can_be_called_off(self):
        """Limits that are to pass lie seconds off, however slowly this machine gets to them."""
        body = "with Guard(now + 1.5, lambda: 7) as guard:\n    {}\n    time.sleep({})"
        assert self.process(body.format("guard.call_off()", 2.5)).returncode == 0
        assert self.process(body.format(f"guard.postpone(now + {LONG_S})", 2.5)).returncode == 0
        assert self.process(body.format("guard.postpone(now + 0.5)", LONG_S)).returncode == 7
        assert self.process(body.format("pass", LONG_S)).returncode == 7
        assert self.process("with Guard(None, lambda: 7):\n    time.sleep(0.1)").returncode == 0
        far = f"with Guard(now + {LONG_S}, lambda: 7):\n    pass"
        assert self.process(far).returncode == 0

    def test_what_it_does_may_fail(self):
        done = self.process(f"with Guard(now + 0.1, lambda: 1 / 0):\n    time.sleep({LONG_S})")
        assert done.returncode == 1


class Job:
    """One job in several runs: whole, and under a limit that leaves some seconds to predict."""

    # What the batches take together under a limit, at full length: far more than is left.
    PREDICT_S = 12.0

    def __init__(self, cli, model, folder):
        self.cli, self.folder = cli, folder
        test_set = folder / "test.csv"
        write_test_set(test_set, make_rows(60, seed=21))
        self.flags = [*model.flags(), "--mode", "single", "--input", str(test_set),
                      "--pooling", "mean", "--max-tokens-per-batch", str(2 * LENGTH)]  # fmt: skip
        self.full = self.run("full", "--sequence-length", LENGTH)
        self.start_s = start_s(self.full)
        tokens = self.full.report["tokens"]["padded"]
        slow = {"kind": "slow", "tokens_per_s": tokens / self.PREDICT_S}
        self.slow = {VARIABLE: json.dumps([slow])}

    def run(self, name, *flags, codes=(0,), **extra):
        output = self.folder / f"{name}.csv"
        began = time.time()
        done = self.cli(*self.flags, "--output", str(output), *map(str, flags), **extra)
        assert done.returncode in codes, done.stderr
        found = SimpleNamespace(stderr=done.stderr, output=output, code=done.returncode)
        if found.code == 0:
            found.stood_s = output.stat().st_mtime - began
            found.values = pd.read_csv(output, dtype={"id": str}).iloc[:, 1:].to_numpy()
            found.rows = pd.read_csv(f"{output}.rows.csv", dtype={"id": str})
            found.report = json.loads((self.folder / f"{name}.csv.report.json").read_text())
            assert dict(Counter(found.rows["how"])) == {
                how: count for how, count in found.report["rows"].items()
                if count and how not in ("total", "resumed")
            } or found.report["rows"]["resumed"]  # fmt: skip
        return found

    def limited(self, name, policy, *flags, left_s, lacks_s, **options):
        """Run with a limit that leaves some seconds for predicting.

        This machine may start faster or slower than in the run before: then again, by what it took.

        Args:
            lacks_s: a run -> the seconds by which it had too little time, or too much if negative;
                0 if it shows what it should.
        """
        for _ in range(8):
            limit_s = 1.1 * self.start_s + left_s + MARGIN_S
            found = self.run(
                *(name, "--sequence-length", LENGTH, "--resume", "never"),
                *("--time-limit", f"{limit_s:.2f}s", "--on-deadline", policy),
                *flags, **self.slow, **options,
            )  # fmt: skip
            assert policy == "fail" or found.stood_s <= limit_s
            found.limit_s = limit_s
            more_s = lacks_s(found)
            if not more_s:
                break
            self.start_s, left_s = start_s(found), max(1, left_s + more_s)
        return found

    def differing(self, found):
        far = np.abs(found.values - self.full.values).max(axis=1) > TOLERANCE
        return set(np.flatnonzero(far).tolist())


def start_s(found):
    seconds = found.report["seconds"]
    return seconds["total"] - seconds["predict"]


@pytest.fixture(scope="module")
def job(cli, models, tmp_path_factory):
    return Job(cli, models["gemma2"], tmp_path_factory.mktemp("job"))


def rows_made(found, *how):
    return set(np.flatnonzero(found.rows["how"].isin(how)).tolist())


def test_shorten_differs_in_the_rows_it_names_alone(job):
    def lacks_s(found):
        assert job.differing(found) <= rows_made(found, SHORTENED, "filled")
        if len(rows_made(found, "filled")) >= 10:
            return 2
        return 0 if rows_made(found, SHORTENED) else -2

    found = job.limited("shorten", "shorten", "--min-sequence-length", 8, left_s=5, lacks_s=lacks_s)
    shortened, filled = rows_made(found, SHORTENED), rows_made(found, "filled")
    assert shortened, found.stderr
    assert len(filled) < 10, found.stderr
    assert found.report["deadline"]["events"]
    assert found.report["deadline"]["finished_s"] >= 0.8 * found.limit_s
    # Each equals what a run at its length says.
    lengths = Counter(found.rows["tokens"][list(shortened)])
    cap = max(lengths, key=lengths.get)
    at_that = sorted(row for row in shortened if found.rows["tokens"][row] == cap)
    short = job.run("short", "--sequence-length", cap)
    assert np.abs(short.values[at_that] - found.values[at_that]).max() < TOLERANCE
    assert np.abs(job.full.values[at_that] - found.values[at_that]).max() > TOLERANCE
    # A further run goes on to the whole answer.
    again = job.run("shorten", "--sequence-length", LENGTH, "--resume", "require")
    assert job.differing(again) == set()
    assert again.report["rows"]["resumed"] == 60 - len(shortened) - len(filled)
    assert rows_made(again, PREDICTED) == set(range(60))


def test_fill_differs_in_the_rows_it_fills_alone(job):
    found = job.limited(
        *("fill", "fill", "--fallback-probabilities", "0.5,0.3,0.2"),
        left_s=3, lacks_s=lambda found: 0 if rows_made(found, "filled") else -1,
    )  # fmt: skip
    filled = rows_made(found, "filled")
    assert filled, found.stderr
    assert job.differing(found) <= filled
    assert np.abs(found.values[list(filled)] - [0.5, 0.3, 0.2]).max() < 1e-9
    real = rows_made(found, PREDICTED)
    assert real | filled == set(range(60))
    if len(real) > 20:  # the first batches may have been of the longest
        tokens = job.full.rows["tokens"]
        assert tokens[list(real)].median() <= tokens[list(filled)].median()


def test_fail_keeps_the_journal(job):
    found = job.limited(
        *("fail", "fail"), left_s=2, codes=(0, 3),
        lacks_s=lambda found: 0 if found.code == 3 else -1,
    )  # fmt: skip
    assert found.code == 3, found.stderr
    assert not found.output.exists()
    assert "--on-deadline fail writes no submission" in found.stderr
    assert "the same command goes on" in found.stderr
    again = job.run("fail", "--sequence-length", LENGTH)
    assert again.report["rows"]["resumed"] + again.report["rows"]["predicted"] == 60
    assert job.differing(again) == set()


@pytest.mark.slow
def test_a_run_that_cannot_even_start_is_filled(job):
    found = job.run("late", "--mode", "data-parallel", "--time-limit", "3s")
    assert found.stood_s <= 3.2
    assert rows_made(found, "filled") == set(range(60))
    assert np.abs(found.values - 1 / 3).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "hung"])
@pytest.mark.parametrize("mode", ["data-parallel", "pipeline"])
def test_drills(mode, fault):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "drill.py", "--modes", mode, "--faults", fault,
         "--limits", "60", "--rows", "300"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
