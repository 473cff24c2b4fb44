"""sharding/: properties that hold for every test set, in milliseconds, without any framework."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preset.families import model_shape
from sharding.backlog import Backlog
from sharding.batches import BatchShape, plan_batches
from sharding.buckets import bucket_of, choose_buckets
from sharding.shards import shard_size
from sharding.topology import place_workers
from tests.conftest import ROOT
from tests.support.steps import count_lines

lengths_lists = st.lists(st.integers(0, 512), max_size=200)


def plan_for(lengths, budget=2048, max_buckets=8):
    lengths = np.array(lengths, dtype=np.int64)
    buckets = choose_buckets(lengths, sequence_length=512, max_buckets=max_buckets)
    return plan_batches(lengths, buckets=buckets, max_tokens_per_batch=budget)


@settings(max_examples=300, deadline=None)
@given(lengths_lists, st.integers(1, 5000), st.integers(1, 9))
def test_plan_holds_its_promises(lengths, budget, max_buckets):
    plan = plan_for(lengths, budget, max_buckets)
    rows = [row for batch in plan.batches for row in batch.rows]
    assert sorted(rows) == list(range(len(lengths))), "every row once"
    taken = [lengths[row] for row in rows]
    assert taken == sorted(taken, reverse=True), "longest first"
    assert rows == sorted(rows, key=lambda row: (-lengths[row], row)), "ties go by row"
    for number, batch in enumerate(plan.batches):
        assert batch.index == number
        assert 1 <= len(batch.rows) <= batch.shape.rows
        assert max(lengths[row] for row in batch.rows) <= batch.shape.length <= 512
        assert batch.shape.tokens <= budget or batch.shape.rows == 1
        if number < len(plan.batches) - 1:
            assert len(batch.rows) == batch.shape.rows, "only the last batch has filler"
    assert len(plan.shapes) <= max_buckets
    assert set(plan.shapes) == {batch.shape for batch in plan.batches}
    assert plan == plan_for(lengths, budget, max_buckets), "the same plan each time"
    assert plan.real_tokens == sum(lengths)
    assert sum(len(batch.rows) for batch in plan.batches) == len(lengths)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 4))
def test_buckets_waste_the_least(lengths, max_buckets):
    """Against all choices, by brute force, with candidates at every multiple of 8."""
    options = {"sequence_length": 64, "max_buckets": max_buckets, "multiple_of": 8}
    buckets = choose_buckets(np.array(lengths), **options)
    assert 1 <= len(buckets) <= max_buckets
    assert list(buckets) == sorted(set(buckets))
    best = min(
        sum(min(bucket for bucket in choice if bucket >= length) for length in lengths)
        for size in range(1, max_buckets + 1)
        for choice in itertools.combinations(range(8, 65, 8), size)
        if choice[-1] >= max(lengths)
    )
    assert bucket_of(np.array(lengths), buckets).sum() == best


def test_buckets_by_hand():
    lengths = np.array([3, 15, 16, 17, 100, 512])
    assert choose_buckets(lengths, sequence_length=512, max_buckets=3) == (32, 112, 512)
    assert choose_buckets(lengths, sequence_length=512, max_buckets=1) == (512,)
    assert choose_buckets(np.array([5]), sequence_length=500, multiple_of=16) == (16,)
    assert choose_buckets(np.array([499]), sequence_length=500) == (500,)
    assert choose_buckets(np.array([5]), sequence_length=10) == (10,)
    assert choose_buckets(np.array([], dtype=int), sequence_length=10) == ()
    with pytest.raises(ValueError, match="longest=11"):
        choose_buckets(np.array([11]), sequence_length=10)
    with pytest.raises(ValueError, match="max_buckets=0"):
        choose_buckets(np.array([1]), sequence_length=10, max_buckets=0)


def test_a_short_last_batch_takes_a_shape_that_is_there():
    plan = plan_batches(np.full(5, 10), buckets=(16,), max_tokens_per_batch=32)
    assert [batch.rows for batch in plan.batches] == [(0, 1), (2, 3), (4,)]
    assert plan.shapes == (BatchShape(2, 16),)
    assert plan.padded_tokens == 96
    alone = plan_batches(np.array([10]), buckets=(16,), max_tokens_per_batch=32)
    assert alone.shapes == (BatchShape(1, 16),)
    with pytest.raises(ValueError, match="max_tokens_per_batch=0"):
        plan_batches(np.array([1]), buckets=(16,), max_tokens_per_batch=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=120), st.integers(1, 9))
def test_shards_are_a_share_of_half_of_what_is_left(costs, replicas):
    costs = sorted(costs, reverse=True)
    sizes, start = [], 0
    while start < len(costs):
        remaining = sum(costs[start:])
        size = shard_size(costs[start:], remaining=remaining, share=1 / replicas)
        cost = sum(costs[start : start + size])
        assert cost <= remaining / (2 * replicas) + 1e-6 or size == 1
        sizes.append(size)
        start += size
    assert sum(sizes) == len(costs)
    assert sizes[-1] == 1, "the last shard is one batch"


def test_shards_by_hand():
    assert shard_size([5.0, 5.0, 5.0, 5.0], remaining=20.0, share=1.0) == 2
    assert shard_size([5.0, 5.0, 5.0, 5.0], remaining=20.0, share=0.4) == 1
    assert shard_size([], remaining=0.0, share=0.5) == 0
    with pytest.raises(ValueError, match="share=0"):
        shard_size([1.0], remaining=1.0, share=0)


@pytest.mark.parametrize(
    ("workers", "cores", "expected"),
    [
        (None, [0], [(0,)]),
        (None, [0, 1], [(0,), (1,)]),
        (None, [0, 1, 2, 3], [(0, 1), (2, 3)]),
        (1, [0, 1], [(0, 1)]),
        (3, [4, 6], [(4,), (6,), (4,)]),
        (3, [0, 1, 2, 3], [(0,), (1,), (2, 3)]),
    ],
)
def test_cpu_workers_share_out_the_cores(workers, cores, expected):
    slots = place_workers(kind="cpu", num_devices=0, num_workers=workers, cores=cores)
    assert [slot.cores for slot in slots] == expected
    assert [slot.replica for slot in slots] == list(range(len(expected)))
    assert all(slot.member == 0 for slot in slots)


def test_groups_are_neighbours():
    options = {"kind": "cpu", "num_devices": 0, "cores": [0, 1]}
    slots = place_workers(**options, num_workers=4, group_size=2)
    assert [(slot.replica, slot.member) for slot in slots] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [slot.cores for slot in slots] == [(0,), (1,), (0,), (1,)]
    assert len(place_workers(**options, num_workers=None, group_size=3)) == 3
    with pytest.raises(ValueError, match=r"whole groups of 2.*--num-workers 3 --group-size 2"):
        place_workers(**options, num_workers=3, group_size=2)
    gpus = {"kind": "gpu", "cores": [0], "num_workers": None, "group_size": 2}
    assert len(place_workers(**gpus, num_devices=5)) == 4
    with pytest.raises(ValueError, match=r"1 were found.*--num-workers 2"):
        place_workers(**gpus, num_devices=1)


def test_each_gpu_worker_has_a_gpu():
    slots = place_workers(kind="gpu", num_devices=3, num_workers=None, cores=[0])
    assert len(slots) == 3
    assert all(slot.kind == "gpu" and slot.cores == () for slot in slots)
    assert len(place_workers(kind="gpu", num_devices=3, num_workers=2, cores=[0])) == 2
    with pytest.raises(ValueError, match=r"a gpu of its own and 2 were found.*--num-workers 3"):
        place_workers(kind="gpu", num_devices=2, num_workers=3, cores=[0])
    with pytest.raises(ValueError, match="a tpu of its own and 0 were found"):
        place_workers(kind="tpu", num_devices=0, num_workers=None, cores=[0])


GEMMA_2_9B = {
    "vocabulary_size": 256000,
    "num_layers": 42,
    "num_query_heads": 16,
    "num_key_value_heads": 8,
    "hidden_dim": 3584,
    "intermediate_dim": 28672,
    "head_dim": 256,
}


def test_gemma_2_9b_costs_what_was_published():
    """16.65 GFLOP a token and 344,064 x length FLOPs of causal attention a token."""
    shape = model_shape("GemmaBackbone", GEMMA_2_9B)
    assert shape.flops_per_token == pytest.approx(16.65e9, rel=1e-3)
    assert shape.attention_flops(1000) == 344_064 * 1000 * 1000
    one = shape.batch_flops(BatchShape(1, 512))
    assert shape.batch_flops(BatchShape(3, 512)) == 3 * one
    assert one == 512 * shape.flops_per_token + shape.attention_flops(512)


def test_llama_derives_its_head_dim():
    config = {name: GEMMA_2_9B[name] for name in GEMMA_2_9B if name != "head_dim"}
    shape = model_shape("LlamaBackbone", config)
    assert (shape.head_dim, shape.intermediate_dim) == (3584 // 16, 28672)
    assert model_shape("MistralBackbone", config | {"head_dim": 128}).head_dim == 128
    with pytest.raises(ValueError, match="class_name='ResNetBackbone'"):
        model_shape("ResNetBackbone", config)
    with pytest.raises(ValueError, match="intermediate_dim"):
        model_shape("LlamaBackbone", {"hidden_dim": 8, "num_query_heads": 2, "vocabulary_size": 3})


def test_gemma_3_is_taken_without_images_and_pooled_outputs():
    text = GEMMA_2_9B | {"vision_encoder": None, "is_embedding_model": False}
    # Unlike Gemma 2's, its intermediate size is that of one gated projection.
    assert model_shape("Gemma3Backbone", text).intermediate_dim == 28672
    for key, value in (("vision_encoder", {"class_name": "X"}), ("is_embedding_model", True)):
        with pytest.raises(ValueError, match=f"token ids to hidden states.*config with {key}"):
            model_shape("Gemma3Backbone", text | {key: value})


def test_planning_needs_no_framework():
    """sharding imports neither Ray nor JAX nor Keras nor pandas, nor the runner.

    All but mesh, which says in Keras' words what the others decided.
    """
    modules = sorted({path.stem for path in (ROOT / "sharding").glob("*.py")} - {"mesh"})
    assert len(modules) > 5
    code = (
        "import sys\n"
        + "".join(f"import sharding.{name}\n" for name in modules if name != "__init__")
        + "heavy = {'ray', 'jax', 'keras', 'keras_hub', 'tensorflow', 'pandas', 'runner'}\n"
        + "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def lines_to_plan_and_merge(rows, folder):
    """Lines run in the driver's own work on so many rows."""
    from runner.data.submission import write_submission
    from runner.results.table import Merger

    lengths = np.minimum(np.random.default_rng(0).lognormal(6.5, 0.8, rows).astype(int) + 2, 1024)
    ids = [str(row) for row in range(rows)]
    with count_lines() as lines:
        buckets = choose_buckets(lengths, sequence_length=1024)
        plan = plan_batches(lengths, buckets=buckets, max_tokens_per_batch=4096)
        backlog = Backlog(plan.batches, cost=lambda shape: float(shape.tokens))
        merger = Merger(ids, 3)
        number, settings = 0, {"runnable": lambda shape: True, "alone": True, "share": 1 / 8}
        while batch := backlog.take(number % 8, **settings):
            answers = np.full((len(batch.rows), 3), 1 / 3, np.float32)
            merger.add(batch.rows, answers, how="predicted", lengths=lengths[list(batch.rows)])
            backlog.finish(batch)
            number += 1
        write_submission(folder / "submission.csv", ids, merger.finish())
        assert sum(len(batch.rows) for batch in plan.batches) == rows
        return lines()


def test_the_drivers_work_grows_with_the_rows_alone(tmp_path):
    few, many = (lines_to_plan_and_merge(rows, tmp_path) for rows in (2_500, 25_000))
    assert few < many < 15 * few, "of ten times as many"


def test_more_buckets_than_eight_must_pay_for_their_compiles():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.5, 0.8, 25_000).astype(int) + 2, 1024)

    def waste(buckets):
        return float(bucket_of(lengths, buckets).sum())

    def choose(cost_of_shape):
        return choose_buckets(lengths, sequence_length=1024, cost_of_shape=cost_of_shape)

    eight, sixteen = choose(float("inf")), choose(0.0)
    assert (len(eight), len(sixteen)) == (8, 16)
    assert waste(sixteen) < waste(eight)
    saved = waste(eight) - waste(sixteen)
    assert choose(saved) == eight
    some = choose(saved / 40)
    assert 8 < len(some) <= 16
    assert waste(eight) - waste(some) > (len(some) - 8) * saved / 40


def test_the_cost_of_attention_moves_buckets():
    """Where a row costs the square of its length, long rows get the closer buckets."""
    lengths = np.arange(1, 513)
    plain = choose_buckets(lengths, sequence_length=512, max_buckets=2, multiple_of=1)
    squared = choose_buckets(
        lengths, sequence_length=512, max_buckets=2, multiple_of=1, cost=lambda n: n * n
    )
    assert plain == (256, 512)
    assert squared[0] > 280


@pytest.mark.parametrize("most", [4, 32])
def test_batches_leave_little_of_a_bucket_over(most):
    """Rows of the next bucket that fill a last batch up are padded to a length they do not need."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 200, 2)
        lengths = np.repeat([128, 64], counts)
        plan = plan_batches(lengths, buckets=(64, 128), max_tokens_per_batch=most * 128)
        rows = plan.shapes[0].rows
        assert rows <= most
        strays = sum(row >= counts[0] for batch in plan.batches for row in batch.rows
                     if batch.shape.length == 128)  # fmt: skip
        assert strays <= min(-counts[0] % r for r in range(most - most // 4, most + 1))
