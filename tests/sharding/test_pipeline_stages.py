"""sharding/stages.py: the cut against all cuts, and by hand."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.common.errors import ConfigError
from runner.config.run_config import RunConfig
from runner.preset.auto import choose_strategy, tokens_per_batch
from runner.preset.reader import Preset
from sharding.costs import ModelShape
from sharding.memory import values_of
from sharding.stages import StageLayers, cut_stages
from sharding.strategies import tensor_bytes_per_token


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_no_cut_is_better(layers, num_stages, first, last, limit):
    costs, weights = [cost for cost, _ in layers], [weight for _, weight in layers]
    size = len(layers)
    options = []
    for inner in combinations(range(1, size), num_stages - 1):
        edges = (0, *inner, size)
        pairs = list(pairwise(edges))
        held = [sum(weights[a:b]) + first * (a == 0) + last * (b == size) for a, b in pairs]
        if limit is None or max(held) <= limit:
            options.append((max(sum(costs[a:b]) for a, b in pairs), max(held)))
    bytes_of = {"first_bytes": first, "last_bytes": last, "max_bytes": limit}
    if not options:
        with pytest.raises(ValueError, match="stage"):
            cut_stages(costs, weights, num_stages, **bytes_of)
        return
    stages = cut_stages(costs, weights, num_stages, **bytes_of)
    assert [stage.start for stage in stages] == [0, *(stage.stop for stage in stages[:-1])]
    assert stages[-1].stop == size
    slowest = max(sum(costs[stage.start : stage.stop]) for stage in stages)
    assert (slowest, max(stage.weight_bytes for stage in stages)) == min(options)


def test_a_heavy_embedding_takes_the_shorter_stage():
    assert cut_stages([1] * 3, [10] * 3, 2, first_bytes=50) == (
        StageLayers(0, 1, 60),
        StageLayers(1, 3, 20),
    )
    assert cut_stages([1] * 3, [10] * 3, 2, last_bytes=50) == (
        StageLayers(0, 2, 20),
        StageLayers(2, 3, 60),
    )


GEMMA_2_9B = ModelShape(
    vocabulary_size=256_000, num_layers=42, hidden_dim=3584, num_query_heads=16,
    num_key_value_heads=8, head_dim=256, intermediate_dim=14336,
)  # fmt: skip


def gemma_2_9b_on(monkeypatch, tmp_path, memory_mib):
    """Return its preset, on GPUs that a made-up nvidia-smi tells of."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{memory_mib}\\n{memory_mib}\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return Preset(tmp_path, "GemmaBackbone", GEMMA_2_9B, tokenizer=None, weight_files=())


def strategy_for(monkeypatch, tmp_path, memory_mib, **flags):
    preset = gemma_2_9b_on(monkeypatch, tmp_path, memory_mib)
    return choose_strategy(RunConfig(mode="model-parallel", **flags), preset)


def test_the_batch_fits_beside_the_weights(monkeypatch, tmp_path):
    preset = gemma_2_9b_on(monkeypatch, tmp_path, 15_360)
    int8 = RunConfig(quantization="int8")
    tokens = tokens_per_batch(int8, preset, "gpu")
    assert tokens == 16_384, "9.2 GB of weights and 151 kB a token"
    halves = RunConfig(mode="model-parallel", dtype="float16")
    assert tokens_per_batch(halves, preset, "gpu") == 16_384
    assert tokens_per_batch(RunConfig(max_tokens_per_batch=77), preset, "gpu") == 77
    assert tokens_per_batch(int8, preset, "cpu") == 2048
    assert tokens_per_batch(RunConfig(), gemma_2_9b_on(monkeypatch, tmp_path, 143_000), "gpu") == (
        16_384
    )
    tight = tokens_per_batch(int8, gemma_2_9b_on(monkeypatch, tmp_path, 11_000), "gpu")
    working = tight * GEMMA_2_9B.working_bytes_per_token(512, values_of("float16", "int8"))
    assert 4096 < tight < 16_384
    assert 9.24e9 + working == pytest.approx(0.9 * 11_000 * 2**20, rel=0.01)


def test_gemma_2_9b_on_two_t4(monkeypatch, tmp_path):
    strategy = strategy_for(monkeypatch, tmp_path, 15_360, dtype="float16")
    assert strategy.name == "pipeline"
    first, second = strategy.stages
    assert (first.start, second.stop) == (0, 42)
    assert first.stop == second.start == 21, "equal work, though the first holds the embedding too"
    assert (first.weight_bytes, second.weight_bytes) == pytest.approx((10.16e9, 8.32e9), rel=0.01)
    assert strategy.bytes_per_token == 7168
    # 0.60 MB a token in two all-reduces of each of 42 layers.
    assert tensor_bytes_per_token(GEMMA_2_9B, 2, 2) == pytest.approx(0.60e6, rel=0.01)


def test_memory_moves_the_cut_and_ends_it(monkeypatch, tmp_path):
    tight = strategy_for(monkeypatch, tmp_path, 11_000, dtype="float16")
    assert tight.stages[0].stop < 21
    assert max(stage.weight_bytes for stage in tight.stages) <= 0.85 * (11_000 << 20)
    with pytest.raises(ConfigError, match=r"18.5 GB of weights cannot be cut into 2 stages"):
        strategy_for(monkeypatch, tmp_path, 8_000, dtype="float16")
    assert (
        len(strategy_for(monkeypatch, tmp_path, 8_000, dtype="float16", group_size=3).stages) == 3
    )


def test_more_members_than_layers_take_slices(monkeypatch, tmp_path):
    strategy = strategy_for(monkeypatch, tmp_path, 8_000, group_size=64)
    assert strategy.name == "tensor"
    assert "42 layers cannot be cut into 64 stages" in strategy.why


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match=r"there are 2. Received: --group-size 3"):
        cut_stages([1, 1], [1, 1], 3)
    with pytest.raises(ValueError, match=r"18.5 GB of weights.*2 stages of at most 8.0 GB"):
        cut_stages([1] * 2, [9_000_000_000] * 2, 2, first_bytes=500_000_000, max_bytes=8 * 10**9)
