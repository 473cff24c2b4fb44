"""Runs by a clock that jumps end close to the bound that no scheduler beats."""

import pytest

from benchmarks.driver import measure
from benchmarks.scheduling import (
    MOST_ABOVE,
    lower_bound_s,
    many_workers,
    two_workers,
    useful_s,
)
from benchmarks.simulated import Replica


def test_two_workers_of_different_speed():
    run = two_workers(seed=1)
    assert 0 <= run["above_bound"] <= MOST_ABOVE, run


def test_many_workers_that_die_hang_and_slow_down():
    run = many_workers(60_000, 64, 1.0, seed=3)
    assert 0 <= run["above_bound"] <= MOST_ABOVE, run
    assert run["died"] + run["hung"] + run["slowed"] >= 3, "the drill has lost its faults"
    assert run["planning_s"] < 30


def test_a_driver_that_is_too_slow_shows():
    quick = many_workers(16_000, 64, 1.0, seed=3)
    slow = many_workers(16_000, 64, 1.0, seed=3, driver_s=2 / 64)
    assert slow["makespan_s"] > 1.5 * quick["makespan_s"]


def test_the_bound_by_hand():
    replica = Replica(0, speed=10.0, starts_in_s=2.0, compiles_in_s=1.0, restarts_in_s=5.0)
    assert useful_s(replica, 2.5) == 0
    assert useful_s(replica, 13.0) == pytest.approx(10.0)
    assert lower_bound_s(100.0, [replica]) == pytest.approx(13.0)
    assert lower_bound_s(100.0, [replica, replica]) == pytest.approx(8.0)
    late = Replica(1, speed=10.0, starts_in_s=4.0, compiles_in_s=1.0)
    assert useful_s(late, 13.0, in_cache_at=3.0) == pytest.approx(8.8), "its program is there"
    assert lower_bound_s(188.0, [replica, late]) == pytest.approx(13.0)
    replica.slows_at, replica.slows_to = 8.0, 0.5
    assert useful_s(replica, 13.0) == pytest.approx(5 + 2.5)
    replica.slows_at, replica.dies_at = float("inf"), 8.0
    assert useful_s(replica, 10.0) == pytest.approx(5.0), "it is dead"
    assert useful_s(replica, 14.0) == pytest.approx(5 + 0.8), "back after 5.2 s"


@pytest.mark.slow
def test_the_driver_alone():
    found = measure(600)
    assert found["batches"] == 600
    assert 0 < found["batch_cpu_s"] < 0.05
    assert found["batch_s"] < 0.1
    assert all(0 < seconds < 0.1 for seconds in found["look_s"].values())
