"""The benchmark's arithmetic, and all of it on a tiny model."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness import Contender, Measured, ratio
from benchmarks.rivals.ours import steady_seconds
from benchmarks.shapes import SHAPES
from benchmarks.tables import as_table, describe_lengths, model_flops, summarize
from benchmarks.throughput import TUNED, contenders, write_rows
from tests.conftest import ROOT, environment


def test_a_ratio_is_of_rounds_that_lie_side_by_side():
    # The machine was three times as slow in the second round, for both.
    assert ratio([2.0, 6.0, 2.2], [1.0, 3.0, 1.0]) == 2.0


def test_flops_and_mfu_count_real_tokens(monkeypatch):
    config = {"class_name": "GemmaBackbone", "config": {"vocabulary_size": 9, **SHAPES["tiny"]}}
    lengths = np.array([100, 300])
    # Two layers: projections 2 x 64 x 16 x (4 + 2), feed-forward 3 x 64 x 256; attention 4 x 16.
    matmuls = 2 * 2 * 400 * (2 * 64 * 16 * 6 + 3 * 64 * 256)
    attention = 2 * 2 * 4 * 16 * (100**2 + 300**2)
    assert model_flops(lengths, config) == matmuls + attention
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--quick"])
    contender = Contender("ours, 1 worker", "ours", {}, "mean", cores=(0,))
    measured = {contender.name: Measured(steady_s=[2.0, 1.0, 3.0], total_s=[4.0, 4.0, 4.0])}
    row = summarize(
        contender,
        measured,
        {"one core": 1e6, "all cores": 2e6},
        flops=1e6,
        lengths=lengths,
    )
    assert row["mfu"] == 0.5
    assert row["real_tokens_per_s"] == 200
    table = as_table([row])
    assert len({len(line) for line in table}) == 1
    assert "2.00 (1.00-3.00)" in table[-1]


def test_the_sample_keeps_rows_whole_and_says_its_lengths(tmp_path):
    source, sample = tmp_path / "all.csv", tmp_path / "some.csv"
    write_rows(source, tmp_path / "none.csv", 30)
    write_rows(sample, source, 10)
    every, some = (set(path.read_text().splitlines()) for path in (source, sample))
    assert some <= every
    assert describe_lengths(np.array([10, 512, 512, 20]), 512) == {
        "rows": 4, "mean": 263.5, "quartiles": [10, 17, 266, 512, 512], "cut": 0.5,
    }  # fmt: skip


def test_every_way_of_today_is_a_contender():
    names = [one.name for one in contenders(TUNED, quick=False)]
    assert len(set(names)) == len(names)
    for expected in ("notebook", "Keras predict", "transformers bfloat16, mean", "Ray Data, mean"):
        assert expected in names
    rivals = {one.rival for one in contenders(TUNED, quick=False)}
    for rival in rivals:
        assert (ROOT / "benchmarks" / "rivals" / f"{rival}.py").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_runs(tmp_path, cache):
    """The quick one needs the `bench` extra: torch and transformers."""
    pytest.importorskip("transformers", reason="of the bench extra")
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--preset-shape", "tiny"]
    done = subprocess.run(
        [*command, "--quick", "--rows", "6", "--results", tmp_path],
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["contenders"]) > 6
    for row in facts["contenders"]:
        assert row["difference"] <= row["tolerance"]
        assert 0 < row["mfu"] < 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


@pytest.mark.slow
def test_one_device_is_measured_without_ray(cache):
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--device", "gpu"]
    done = subprocess.run(
        [*command, "--preset-shape", "tiny"],
        env=environment(cache, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert {(row["weights"], row["length"]) for row in facts["measured"]} == {
        (weights, length) for weights in ("float32", "int8") for length in (512, 1024, 2048)
    }


def test_the_steady_state_is_the_pace_of_batches_that_nothing_held_up():
    def span(worker, start_s, end_s, thread=0, **args):
        return {"ph": "X", "pid": worker, "tid": thread, "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6, "args": args}  # fmt: skip

    def batch(worker, start_s, end_s, length=10, **args):
        shape = {"padded_rows": 2, "length": length}
        return span(worker, start_s, end_s, batch=start_s, **shape, **args)

    events = [
        span(1, 0, 2, thread=1, from_cache=True),
        batch(1, 2, 9),  # the first of its shape
        batch(1, 9, 11),
        batch(1, 12, 14),  # waited for: 3 s
        span(1, 14, 15, thread=1, from_cache=False),
        batch(1, 14, 18),  # compiled beside
        batch(1, 18, 20),
        batch(2, 0, 4),
        batch(2, 4, 8),
        batch(2, 8, 12, length=5),
        batch(2, 12, 14, length=5),
        batch(2, 14, 30, is_copy=True),  # of no use to anyone: waited from 14 to 20
    ]
    # 60 tokens in 7 s by worker 1, 30 in 12 s by worker 2; nine batches hold 160.
    paces = 60 / 7 + 30 / 12
    assert steady_seconds(events, lambda shape: shape.tokens) == pytest.approx(160 / paces)
    alone = [batch(3, 0, 4), *events]
    assert np.isnan(steady_seconds(alone, lambda shape: shape.tokens))
