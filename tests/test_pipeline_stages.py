"""sharding/stages.py: the cut against all cuts, and by hand."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.stages import Stage, cut_stages


@settings(max_examples=200, deadline=None)
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
    assert cut_stages([1] * 3, [10] * 3, 2, first_bytes=50) == (Stage(0, 1, 60), Stage(1, 3, 20))
    assert cut_stages([1] * 3, [10] * 3, 2, last_bytes=50) == (Stage(0, 2, 20), Stage(2, 3, 60))


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match=r"there are 2. Received: --group-size 3"):
        cut_stages([1, 1], [1, 1], 3)
    with pytest.raises(ValueError, match=r"18.5 GB of weights.*2 stages of at most 8.0 GB"):
        cut_stages([1] * 2, [9_000_000_000] * 2, 2, first_bytes=500_000_000, max_bytes=8 * 10**9)
