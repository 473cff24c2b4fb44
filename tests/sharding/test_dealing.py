"""What a replica is given next, by hand."""

import numpy as np
import pytest

from benchmarks.simulated import Replica
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, plan_batches
from sharding.dealing import (
    BATCH_WITHIN_S,
    COMPILE_WITHIN_S,
    FIRST_BATCH_WITHIN_S,
    HANG_FACTOR,
    PATIENCE_FACTOR,
    PATIENCE_S,
    Dealer,
)
from sharding.rates import ENOUGH_BATCHES, Rates
from tests.support.steps import count_lines

LONG, SHORT = BatchShape(1, 32), BatchShape(1, 8)


def tokens(shape):
    return float(shape.tokens)


class Table:
    """Replicas at 10 tokens a second, with programs of all shapes, and what is dealt to them."""

    def __init__(self, lengths, count, *, warm=(LONG, SHORT)):
        plan = plan_batches(np.array(lengths), buckets=(8, 32), max_tokens_per_batch=1)
        self.backlog, self.rates = Backlog(plan.batches, cost=tokens), Rates(tokens)
        self.replicas = [Replica(number, warm=set(warm)) for number in range(count)]
        self.dealer = Dealer(self.backlog, self.rates, self.replicas)
        for replica in self.replicas:
            self.measure(replica, 3.2)

    def measure(self, replica, seconds):
        for _ in range(ENOUGH_BATCHES + 30):
            self.rates.learn(replica.number, LONG, seconds)

    def give(self, replica, now=0.0):
        batch = self.dealer.next_batch(replica, now)
        if batch is not None:
            replica.in_flight.append(batch)
        return batch

    def finish(self, replica, now):
        batch = replica.in_flight.popleft()
        replica.finished_at = now
        return self.backlog.finish(batch)


def test_two_in_flight_and_no_more():
    table = Table([32] * 4, 1)
    only = table.replicas[0]
    assert not table.dealer.is_settled(only)
    assert table.give(only).rows == (0,)
    assert table.give(only).rows == (1,)
    assert table.give(only) is None
    assert not table.dealer.is_settled(only), "whether it lacks a program was not asked yet"
    assert table.dealer.next_shape(only, 0.0) is None
    assert table.dealer.is_settled(only)
    table.finish(only, 3.2)
    assert not table.dealer.is_settled(only)


def test_a_suspect_is_alone():
    table = Table([32, 8], 1)
    only = table.replicas[0]
    lost = table.give(only)
    only.in_flight.clear()
    table.backlog.setback(lost, 0, "it died")
    assert table.give(only).shape == SHORT
    assert table.give(only) is None, "a suspect does not come second"
    table.finish(only, 1.0)
    assert table.give(only) is lost
    table.backlog.add([Batch(0, (5,), SHORT)])
    assert table.give(only) is None, "nor does any other come behind it"


def test_the_last_batch_is_copied_where_that_ends_sooner():
    table = Table([32], 2)
    slow, idle = table.replicas
    batch = table.give(slow)
    assert table.give(idle, now=0.5) is None, "2.7 s are left, and its own would take 3.2"
    table.measure(slow, 9.6)
    slow_s, own_s = (table.rates.seconds(replica.number, LONG) for replica in table.replicas)
    now = slow_s - 1.3 * own_s
    assert table.give(idle, now=now) is batch, "its own would end sooner by three tenths"
    assert table.dealer.copied_batches == 1
    assert table.backlog.replicas_of(batch) == (0, 1)
    assert table.finish(idle, 8.0)
    assert not table.finish(slow, 9.6), "the first answer counts"


def test_a_batch_that_is_overdue_is_copied_though_it_should_have_ended():
    table = Table([32], 2)
    hung, idle = table.replicas
    batch = table.give(hung)
    assert table.give(idle, now=3.0) is None
    assert table.give(idle, now=6.0) is None, "2.8 s late"
    assert table.give(idle, now=6.5) is batch, "longer late than its own would take"


def test_the_batch_that_ends_last_is_copied_first():
    table = Table([32] * 2, 2)
    busy, idle = table.replicas
    first, second = table.give(busy), table.give(busy)
    assert table.give(idle, now=0.5) is second, "behind the first it ends last"
    assert first.index != second.index
    third = Table([32], 3)
    slow, one, other = third.replicas
    third.measure(slow, 32.0)
    only = third.give(slow)
    assert third.give(one) is only
    assert third.give(other) is None, "two compute it already"


def test_no_copy_of_a_shape_without_a_program():
    table = Table([32], 2)
    slow, idle = table.replicas
    table.measure(slow, 32.0)
    table.give(slow)
    idle.warm = {SHORT}
    assert table.give(idle) is None


def test_a_shape_is_compiled_once_on_a_node():
    table = Table([32, 32, 8, 8], 3, warm=())
    one, other, far = table.replicas
    far.node = "far"
    dealer = table.dealer
    for replica in (one, far):
        assert dealer.next_shape(replica, 0.0) == LONG
        replica.compiling = LONG
    assert dealer.next_shape(one, 0.0) is None, "it compiles already"
    assert dealer.next_shape(other, 0.0) == SHORT, "the other is being compiled on its node"
    other.compiling = SHORT
    one.compiling = None
    one.warm.add(LONG)
    dealer.compiled(one, LONG)
    other.compiling = None
    other.warm.add(SHORT)
    one.compiling = SHORT
    assert dealer.next_shape(other, 0.0) == LONG, "compiled there, it is in the cache"
    other.warm.add(LONG)
    assert dealer.next_shape(other, 0.0) is None
    stuck = Table([32], 2, warm=())
    stuck.replicas[0].compiling = LONG
    assert stuck.dealer.next_shape(stuck.replicas[1], COMPILE_WITHIN_S - 1) is None
    assert stuck.dealer.next_shape(stuck.replicas[1], COMPILE_WITHIN_S + 1) == LONG


def test_no_compiler_beside_the_first_batches():
    table = Table([32] * 8, 2, warm=(LONG,))
    new = Replica(7, warm={LONG})
    table.replicas.append(new)
    table.backlog.add([Batch(0, (90,), SHORT)])
    assert table.give(new) is not None
    assert table.dealer.next_shape(new, 0.0) is None
    table.measure(new, 3.2)
    assert table.dealer.next_shape(new, 0.0) == SHORT


def test_when_a_batch_hangs():
    table = Table([32] * 3, 1)
    known, new = table.replicas[0], Replica(5)
    batch = table.give(known)
    none, forecast_s = float("inf"), table.rates.seconds(0, LONG)
    limit_s = table.dealer.batch_limit_s
    assert limit_s(known, batch, none) == pytest.approx(BATCH_WITHIN_S + HANG_FACTOR * forecast_s)
    assert limit_s(known, batch, 150.0) == pytest.approx(15.0), "a tenth of what is left"
    least = PATIENCE_S + PATIENCE_FACTOR * forecast_s
    assert limit_s(known, batch, 20.0) == pytest.approx(least)
    assert limit_s(new, batch, 20.0) >= FIRST_BATCH_WITHIN_S, "nothing is known of its pace"
    known.compiling = SHORT
    assert limit_s(known, batch, none) == pytest.approx(
        2 * (BATCH_WITHIN_S + HANG_FACTOR * forecast_s)
    )


def test_a_batch_of_an_earlier_run_is_no_matter():
    table = Table([32], 2)
    left_over, idle = table.replicas
    left_over.in_flight.append(Batch(99, (1,), LONG))
    left_over.is_ready = idle.is_ready = True
    batch = table.give(left_over)
    assert table.give(idle, now=2.0) in (None, batch)
    assert len(table.dealer.paces(2.0, shapes=None, compile_s=lambda alike: 1.0)) == 2


def test_paces():
    table = Table([32] * 8, 3, warm=(LONG,))
    ready, starting, gone = table.replicas
    for replica in (ready, gone):
        replica.is_ready, replica.start_s = True, 6.0
    gone.given_up = True
    starting.spawned_at, starting.warm = 10.0, set()
    paces = table.dealer.paces(12.0, shapes=None, compile_s=lambda alike: 5.0)
    assert [pace.speed for pace in paces] == pytest.approx([10.0, 10.0], rel=0.01)
    assert paces[0].delay_s == 0
    assert paces[1].delay_s == pytest.approx(4.0), "as long as the others took"
    late = table.dealer.paces(50.0, shapes=None, compile_s=lambda alike: 5.0)
    assert late[1].delay_s == pytest.approx(10.0), "a quarter of what it has taken"
    table.give(ready, now=12.0)
    overdue = table.dealer.paces(30.0, shapes=None, compile_s=lambda alike: 5.0)
    assert overdue[0].delay_s == pytest.approx(18.0 + 6.0), "as long again, and a start"


def lines_of_a_decision(count):
    """Lines run for each of so many batches, from the first to the last."""
    batches = [Batch(n, (n,), (LONG, SHORT)[2 * n // count]) for n in range(count)]
    rates = Rates(tokens)
    replicas = [Replica(number, warm={LONG, SHORT}) for number in range(16)]
    for replica in replicas:
        for _ in range(ENOUGH_BATCHES):
            rates.learn(replica.number, LONG, 1.0)
    backlog = Backlog(batches, cost=tokens)
    dealer, turn = Dealer(backlog, rates, replicas), 0
    with count_lines() as lines:
        while backlog:
            turn += 1
            for replica in replicas:
                while batch := dealer.next_batch(replica, float(turn)):
                    replica.in_flight.append(batch)
                dealer.next_shape(replica, float(turn))
                dealer.is_settled(replica)
                if replica.in_flight:
                    backlog.finish(replica.in_flight.popleft())
                    rates.learn(replica.number, LONG, 1.0)
        return lines() / count


def test_a_decision_does_not_look_at_every_batch():
    few, many = lines_of_a_decision(800), lines_of_a_decision(8_000)
    assert 10 < many < 2 * few, "of ten times as many"


def test_one_that_has_become_slow_is_known_by_its_last_batch():
    table = Table([32], 2)
    slowed, idle = table.replicas
    batch = table.give(slowed)
    table.rates.learn(slowed.number, LONG, 3 * 3.2)
    assert table.rates.slowness(slowed.number) == pytest.approx(3.0, rel=0.01)
    assert table.rates.slowness(idle.number) == pytest.approx(1.0)
    assert table.give(idle, now=0.5) is batch, "by its mean speed it would end sooner"


def test_a_copy_does_not_make_the_first_one_younger():
    table = Table([32], 2)
    hung, idle = table.replicas
    hung.is_ready = idle.is_ready = True
    batch = table.give(hung, now=1.0)
    assert table.give(idle, now=30.0) is batch
    assert table.dealer.began(hung, batch) == 1.0
    assert table.dealer.began(idle, batch) == 30.0
    late, on_time = table.dealer.paces(31.0, shapes=None, compile_s=lambda alike: 1.0)
    assert (late.delay_s, on_time.delay_s) == (30.0, 0.0)
