"""What becomes of batches: every row is answered once, or given up because it alone is at fault."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.backlog import MOST_SETBACKS, MOST_SETBACKS_OF_A_ROW, Backlog
from sharding.batches import Batch, BatchShape, plan_batches
from sharding.rates import EXPECTED_MFU, Rates


def cost(shape):
    return float(shape.tokens)


def anything(shape):
    return True


def backlog_of(lengths, budget=64):
    plan = plan_batches(np.array(lengths), buckets=(8, 16, 32), max_tokens_per_batch=budget)
    return Backlog(plan.batches, cost=cost)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=60),
    st.integers(1, 4),
    st.sets(st.integers(0, 59), max_size=3),
    st.sampled_from([None, 8, 16, 40]),
    st.integers(0, 2**16),
)
def test_every_row_is_answered_once_or_at_fault(lengths, replicas, poison, memory, seed):
    """Replicas that die of poison rows, run out of memory, die for nothing and are copied."""
    chance = random.Random(seed)
    backlog = backlog_of(lengths)
    in_flight = {number: [] for number in range(replicas)}
    answered = []
    for _ in range(5000):
        waiting = list(backlog.waiting())
        assert backlog.counts() == Counter(batch.shape for batch in waiting)
        assert backlog.last_shape() == (waiting[-1].shape if waiting else None)
        if not backlog:
            break
        replica = chance.randrange(replicas)
        if memory is None:
            assert set(backlog.shapes(replica)) == {batch.shape for batch in waiting}
        mine = in_flight[replica]
        if len(mine) < 2 and not any(map(backlog.is_suspect, mine)):
            batch = backlog.take(replica, runnable=anything, alone=not mine, share=1 / replicas)
            if batch is not None:
                mine.append(batch)
                continue
            elsewhere = [b for b in backlog.in_flight() if b not in mine]
            if not mine and elsewhere and len(backlog.replicas_of(elsewhere[0])) == 1:
                backlog.copy(elsewhere[0], replica)
                mine.append(elsewhere[0])
                continue
        if not mine:
            continue
        batch = mine[0]
        if memory is not None and batch.shape.tokens > memory and batch.shape.rows > 1:
            mine.remove(batch)
            backlog.too_large(batch, range(replicas), replica, "memory")
        elif poison & set(batch.rows):
            for lost in mine:
                backlog.setback(lost, replica, "poison")
            mine.clear()
            backlog.release(replica)
        elif chance.random() < 0.02:
            for lost in mine:
                backlog.put_back(lost, replica)
            mine.clear()
            backlog.release(replica)
        else:
            mine.remove(batch)
            if backlog.finish(batch):
                answered += batch.rows
    assert not backlog
    guilty = poison & set(range(len(lengths)))
    assert set(backlog.given_up) == guilty
    assert sorted(answered) == sorted(set(range(len(lengths))) - guilty)


def test_a_suspect_waits_for_the_end_and_is_computed_alone():
    backlog = backlog_of([32, 32, 16, 16], budget=32)
    first = backlog.take(0, runnable=anything, alone=True)
    assert backlog.setback(first, 0, "why") is None
    assert backlog.is_suspect(first)
    others = []
    while batch := backlog.take(0, runnable=anything, alone=False):
        others.append(batch)
    assert first not in others
    assert sorted(row for batch in others for row in batch.rows) == [1, 2, 3]
    assert backlog.take(0, runnable=anything, alone=True) == first
    assert backlog.finish(first)
    assert not backlog.is_suspect(first)


def test_halving_finds_the_row():
    batch = Batch(0, (0, 1, 2, 3), BatchShape(4, 8))
    backlog, deaths = Backlog([batch], cost=cost), 0
    while backlog:
        taken = backlog.take(0, runnable=anything, alone=True)
        if 2 in taken.rows:
            deaths += 1
            backlog.setback(taken, 0, "it kills")
        else:
            backlog.finish(taken)
    assert backlog.given_up == {2: "it kills"}
    assert deaths == MOST_SETBACKS + MOST_SETBACKS_OF_A_ROW, (
        "two of four rows, one of two, two of one"
    )


def test_memory_is_remembered_for_devices_that_are_alike():
    backlog = backlog_of([32] * 8, budget=128)
    batch = backlog.take(0, runnable=anything, alone=True)
    assert batch.shape == BatchShape(4, 32)
    assert backlog.too_large(batch, [0, 1], 0, "memory") == 64
    assert backlog.shapes(1) == (BatchShape(2, 32),)
    assert backlog.shapes(2) == (BatchShape(4, 32),)
    assert backlog.take(1, runnable=anything, alone=True).shape == BatchShape(2, 32)
    # Of the half that is left of the first batch, and a whole one.
    assert backlog.take(2, runnable=anything, alone=True).shape.rows in (2, 4)
    alone = Backlog([Batch(0, (5,), BatchShape(1, 32))], cost=cost)
    row = alone.take(0, runnable=anything, alone=True)
    assert alone.too_large(row, [0], 0, "no room") == 0
    assert alone.given_up == {5: "no room"}


def test_withdrawn_rows_are_planned_anew():
    backlog = backlog_of([32, 32, 16, 8], budget=32)
    taken = backlog.take(0, runnable=anything, alone=True, share=0.1)
    rows = backlog.withdraw()
    assert sorted((*rows, *taken.rows)) == [0, 1, 2, 3]
    assert backlog.rows_left == set(taken.rows)
    backlog.add([Batch(0, rows, BatchShape(3, 8))])
    again = backlog.take(0, runnable=anything, alone=True)
    assert again.index != taken.index
    assert backlog.finish(taken)
    assert backlog.finish(again)
    assert not backlog.finish(again), "the first answer counts"
    assert not backlog


def test_a_replica_waits_for_its_program():
    backlog = backlog_of([32, 16], budget=32)
    assert backlog.take(0, runnable=lambda shape: False, alone=True) is None
    small = backlog.take(0, runnable=lambda shape: shape.length == 16, alone=True)
    assert small.rows == (1,)


def test_rates_are_learnt_by_replica_and_shape():
    rates = Rates(cost)
    long, short = BatchShape(2, 32), BatchShape(4, 8)
    assert rates.seconds(0, long) == 0
    rates.expect(0, 100.0)
    assert rates.seconds(0, long) == pytest.approx(64 / (100 * EXPECTED_MFU))
    for _ in range(60):
        rates.learn(0, long, 2.0)
        rates.learn(1, long, 6.0)
        rates.learn(0, short, 0.5)
    assert rates.seconds(0, long) == pytest.approx(2.0, rel=0.02)
    assert rates.seconds(1, long) == pytest.approx(6.0, rel=0.02)
    assert rates.seconds(0, short) == pytest.approx(0.5, rel=0.05)
    assert rates.seconds(1, short) == pytest.approx(1.5, rel=0.05), "never seen there"
    assert rates.knows(1)
    assert not rates.knows(2)
    for _ in range(40):
        rates.learn(0, long, 4.0)
    assert rates.seconds(0, long) == pytest.approx(4.0, rel=0.1), "it slowed down"


def test_an_idle_replica_takes_from_a_shard_that_is_left():
    backlog = backlog_of([32] * 8, budget=32)
    first = backlog.take(0, runnable=anything, alone=True)
    taken = [batch.rows[0] for batch in iter(
        lambda: backlog.take(1, runnable=anything, alone=False), None)]  # fmt: skip
    assert sorted([first.rows[0], *taken]) == list(range(8)), "also what replica 0 had pulled"
    assert backlog.take(0, runnable=anything, alone=False) is None
