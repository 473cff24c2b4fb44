"""A queue of batches in runs of one shape does what a list of them does."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.batches import Batch, BatchShape
from sharding.queues import BatchQueue

SHAPES = [BatchShape(4, 8), BatchShape(2, 16), BatchShape(1, 32)]
steps = st.lists(
    st.tuples(st.sampled_from(["append", "appendleft", "popleft", "pop", "take"]),
              st.sampled_from(SHAPES), st.integers(0, 5)),
    max_size=60,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(steps)
def test_it_is_a_list(steps):
    queue, plain = BatchQueue(), []
    for index, (what, shape, count) in enumerate(steps):
        batch = Batch(index, (index,), shape)
        if what == "append":
            queue.append(batch)
            plain.append(batch)
        elif what == "appendleft":
            queue.appendleft(batch)
            plain.insert(0, batch)
        elif what == "take":
            first = next((n for n, one in enumerate(plain) if one.shape == shape), len(plain))
            assert list(queue.after(shape.__eq__)) == plain[first:]
            assert queue.take(shape.__eq__, count) == plain[first : first + count]
            del plain[first : first + count]
        elif plain:
            popped = plain.pop(0 if what == "popleft" else -1)
            assert getattr(queue, what)() == popped
        assert list(queue) == plain
        assert bool(queue) == bool(plain)
        assert queue.cost(lambda shape: shape.tokens) == sum(one.shape.tokens for one in plain)
        assert set(queue.shapes()) == {one.shape for one in plain}
        if plain:
            assert (queue.first, queue.last) == (plain[0], plain[-1])


def test_few_runs_for_many_batches():
    queue = BatchQueue(Batch(n, (n,), SHAPES[n // 1000]) for n in range(3000))
    assert list(queue.shapes()) == SHAPES
    assert [batch.index for batch in queue.take(SHAPES[1].__eq__, 1500)] == list(range(1000, 2500))
    assert list(queue.shapes()) == [SHAPES[0], SHAPES[2]]
    queue.take(SHAPES[2].__eq__, 1000)
    assert list(queue.shapes()) == [SHAPES[0]], "runs that come to touch are one"
