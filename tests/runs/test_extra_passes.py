"""Time that is left over, used for a second look with the responses exchanged."""

import json
import signal
import time

import numpy as np
import pandas as pd
import pytest

from runner.common.records import Examples
from runner.driver.swap_pass import in_waves, rows_to_swap, swap
from runner.results.table import Merger
from sharding.batches import plan_batches
from tests.conftest import LENGTH, TOLERANCE


def test_the_most_uncertain_come_first():
    merger = Merger(["a", "b", "c", "d", "e"], 3)
    rows = np.array([[0.9, 0.1, 0], [0.4, 0.3, 0.3], [0.6, 0.4, 0]])
    merger.add((0, 1, 3), rows, how="predicted", lengths=[1] * 3)
    merger.add((2,), rows[:1], how="filled", lengths=[0])
    merger.add((4,), rows[:1], how="swapped", lengths=[1])
    assert rows_to_swap(merger) == [1, 3, 0]


def test_waves_keep_the_order_and_rows_of_like_length_together():
    lengths = np.array([4, 8, 4, 8, 4, 8, 4, 8] * 4)

    def plan(rows):
        return plan_batches(
            lengths[rows], buckets=(4, 8), max_tokens_per_batch=16, rows=np.array(rows)
        )

    order = list(np.random.default_rng(0).permutation(32))
    batches = list(in_waves(order, plan))
    done = [row for batch in batches for row in batch.rows]
    assert sorted(done) == list(range(32))
    for wave in range(8):
        assert set(done[wave * 4 : wave * 4 + 4]) == set(order[wave * 4 : wave * 4 + 4])


def test_responses_change_places():
    examples = Examples(("1",), {"prompt": ("p",), "response_a": ("a",), "response_b": ("b",)})
    assert swap(examples).columns == {
        "prompt": ("p",), "response_a": ("b",), "response_b": ("a",),
    }  # fmt: skip
    assert list(swap(examples).columns) == list(examples.columns)


@pytest.mark.parametrize("mode", ["single", pytest.param("data-parallel", marks=pytest.mark.slow)])
def test_the_average_of_both_orders(models, test_set, predict, tmp_path, mode):
    common = [*models["gemma2"].flags(), "--pooling", "mean", "--sequence-length", str(LENGTH)]
    table = pd.read_csv(test_set, dtype=str, keep_default_na=False)
    table[["response_a", "response_b"]] = table[["response_b", "response_a"]].to_numpy()
    table.to_csv(tmp_path / "swapped.csv", index=False)
    plain = predict("--mode", "single", *common, "--input", str(test_set))
    other = predict("--mode", "single", *common, "--input", str(tmp_path / "swapped.csv"))
    expected = (plain.probabilities + other.probabilities[:, [1, 0, 2]]) / 2
    both = predict("--mode", mode, *common, "--input", str(test_set), "--extra-passes", "swap")
    assert np.abs(both.probabilities - expected).max() < TOLERANCE
    assert both.report["extra_passes"]["rows"] == len(plain.ids)
    assert set(pd.read_csv(tmp_path / "submission.csv.rows.csv")["how"]) == {"swapped"}
    # A file whose two responses are alike in value is not moved by it.
    assert np.abs(expected - plain.probabilities).max() > 1e-3


@pytest.mark.slow
def test_an_interrupt_leaves_the_best_so_far(start, models, arena_rows, predict, tmp_path):
    job = [*models["arena"].flags(), "--input", str(arena_rows), "--pooling", "mean",
           "--sequence-length", "256"]  # fmt: skip
    plain = predict("--mode", "single", *job)
    output = tmp_path / "s.csv"
    run = start("--mode", "data-parallel", *job, "--extra-passes", "swap", "--output", output)
    while not output.exists():
        assert run.process.poll() is None
        time.sleep(0.05)
    time.sleep(4)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.finish()
    assert code in (0, 130), err
    table = pd.read_csv(output, dtype={"id": str})
    assert table["id"].tolist() == plain.ids
    moved = np.abs(table.iloc[:, 1:].to_numpy() - plain.probabilities).max(axis=1) > TOLERANCE
    assert moved.any()
    again = start("--mode", "single", *job, "--extra-passes", "swap", "--output", output)
    code, _, err = again.finish()
    assert code == 0, err
    report = json.loads((tmp_path / "s.csv.report.json").read_text())
    assert report["rows"]["resumed"] == 905
    assert set(pd.read_csv(tmp_path / "s.csv.rows.csv")["how"]) == {"swapped"}
