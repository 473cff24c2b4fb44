"""A plan -> what each replica does next, until every row is answered or given up.

Shards are pulled by speed, and in the end an idle replica takes from another's. A batch that was
under way when its replica failed is a suspect: it waits for the end, is then computed alone, and
after `MOST_SETBACKS` is halved, until the row that does it is found and has had chances of its own.
Pure bookkeeping over rows and batches: does not know workers, time or answers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from sharding.batches import Batch, BatchShape
from sharding.shards import shard_size

# A batch that failed this often, on whichever replicas, is taken to be the cause.
MOST_SETBACKS = 2
# A row is left out for good after more: its replica may have been ended by something else.
MOST_SETBACKS_OF_A_ROW = 3

Runnable = Callable[[BatchShape], bool]


class Backlog:
    """The batches of a run: waiting, under way, or done.

    A row is in exactly one of them; `rows_left` are those not done, `given_up` those that no
    replica can compute, with the reason.

    Args:
        batches: in the order of work.
        cost: of a shape, any unit that time is proportional to.
        first_index: the number of the first batch, beyond those of an earlier backlog whose
            answers may still come.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        *,
        cost: Callable[[BatchShape], float],
        first_index: int = 0,
    ) -> None:
        self._cost = cost
        self._queue: deque[Batch] = deque()
        self._suspects: deque[Batch] = deque()
        self._shards: dict[int, deque[Batch]] = {}
        # Batch index -> the replicas that compute it.
        self._under_way: dict[int, list[int]] = {}
        self._batches_under_way: dict[int, Batch] = {}
        self._setbacks: dict[int, int] = {}
        self._budgets: dict[int, int] = {}
        self.next_index = first_index
        self.given_up: dict[int, str] = {}
        self.rows_left: set[int] = set()
        self._append(batches)
        self.rows_left = {row for batch in self.waiting() for row in batch.rows}

    def __bool__(self) -> bool:
        """Whether there are rows without an answer."""
        return bool(self.rows_left)

    def waiting(self) -> Iterator[Batch]:
        """Batches that nobody computes now, in the order of work."""
        return chain(*self._shards.values(), self._queue, self._suspects)

    def under_way(self) -> Iterator[Batch]:
        """Batches that some replica computes now."""
        return iter(self._batches_under_way.values())

    def replicas_of(self, batch: Batch) -> tuple[int, ...]:
        """The replicas that compute a batch now, the first one first."""
        return tuple(self._under_way.get(batch.index, ()))

    def is_suspect(self, batch: Batch) -> bool:
        """Whether a batch was under way when a replica failed, and so is computed alone."""
        return batch.index in self._setbacks

    def shapes(self, replica: int) -> tuple[BatchShape, ...]:
        """The shapes that a replica may still be given, in the order of first use."""
        others = chain.from_iterable(
            shard for number, shard in self._shards.items() if number != replica
        )
        batches = chain(self._shards.get(replica, ()), self._queue, self._suspects, others)
        return tuple(dict.fromkeys(self._fitted(batch.shape, replica) for batch in batches))

    def take(
        self, replica: int, *, runnable: Runnable, alone: bool, share: float = 1.0
    ) -> Batch | None:
        """Return the next batch of a replica, now under way; None where it has to wait.

        Args:
            runnable: whether the replica has a program for a shape.
            alone: whether it computes nothing else, as suspects ask for.
            share: the replica's part of the speed of all.
        """
        shard = self._shards.setdefault(replica, deque())
        if not shard:
            self._pull(shard, replica, runnable, share)
        if not shard and not self._queue:
            self._steal(shard, replica, runnable)
        if shard:
            return self._start(shard, 0, replica, runnable)
        if alone:
            for place in range(len(self._suspects)):
                if batch := self._start(self._suspects, place, replica, runnable):
                    return batch
        return None

    def copy(self, batch: Batch, replica: int) -> None:
        """A second replica computes a batch that is under way; the first answer counts."""
        self._under_way[batch.index].append(replica)

    def finish(self, batch: Batch) -> bool:
        """An answer came; return whether it is the first for this batch."""
        if self._under_way.pop(batch.index, None) is None:
            return False
        del self._batches_under_way[batch.index]
        self._setbacks.pop(batch.index, None)
        self.rows_left.difference_update(batch.rows)
        return True

    def put_back(self, batch: Batch, replica: int) -> None:
        """A replica gave a batch back unharmed: it is the next to be pulled."""
        if self._leave(batch, replica):
            (self._suspects if self.is_suspect(batch) else self._queue).appendleft(batch)

    def setback(self, batch: Batch, replica: int, reason: str) -> str | None:
        """A replica failed while a batch was under way. Return what became of it, in words, where
        it is more than another try.

        Args:
            reason: why a row is given up, if it comes to that.
        """
        count = self._setbacks.get(batch.index, 0) + 1
        if batch.index in self._under_way:
            self._setbacks[batch.index] = count
        if not self._leave(batch, replica):
            return None
        is_one = len(batch.rows) == 1
        if count < (MOST_SETBACKS_OF_A_ROW if is_one else MOST_SETBACKS):
            self._suspects.append(batch)
            return None
        del self._setbacks[batch.index]
        if is_one:
            self._give_up(batch, reason)
            return "given up"
        half = -(-len(batch.rows) // 2)
        for piece in self._cut(batch, half):
            self._setbacks[piece.index] = MOST_SETBACKS - 1
            self._suspects.append(piece)
        return "halved"

    def too_large(
        self, batch: Batch, replicas: Iterable[int], replica: int, reason: str
    ) -> int | None:
        """A batch does not fit the memory of `replica`: remember half of it as the budget of all
        replicas on such a device, to which what waits is cut when they take it. One row alone is
        given up.

        Returns:
            The new budget, in tokens; 0 where the row was given up, None where another replica
            still computes it.
        """
        if batch.shape.rows == 1:
            if not self._leave(batch, replica):
                return None
            self._give_up(batch, reason)
            return 0
        budget = (batch.shape.rows // 2) * batch.shape.length
        for number in replicas:
            self._budgets[number] = min(budget, self._budgets.get(number, budget))
        self.put_back(batch, replica)
        return budget

    def release(self, replica: int) -> None:
        """What a replica pulled and has not begun goes back to all."""
        self._queue.extendleft(reversed(self._shards.pop(replica, ())))

    def withdraw(self, kept: Iterable[Batch] = ()) -> tuple[int, ...]:
        """Take out all that waits but for suspects, to be planned anew; return its rows.

        Args:
            kept: of those that wait, some that stay, the next to be pulled by whoever can.
        """
        stay = {batch.index for batch in kept}
        waiting = [*chain(*self._shards.values(), self._queue)]
        rows = [row for batch in waiting if batch.index not in stay for row in batch.rows]
        self._shards.clear()
        self._queue = deque(batch for batch in waiting if batch.index in stay)
        self.rows_left.difference_update(rows)
        return tuple(rows)

    def add(self, batches: Iterable[Batch]) -> None:
        """Append batches of rows that are not in the backlog; they are numbered on."""
        batches = tuple(batches)
        self._append(batches)
        self.rows_left.update(row for batch in batches for row in batch.rows)

    def _append(self, batches: Iterable[Batch]) -> None:
        self._queue.extend(self._numbered(batch) for batch in batches)

    def _pull(self, shard: deque[Batch], replica: int, runnable: Runnable, share: float) -> None:
        """Move the first run of batches that a replica can begin now from the queue."""
        remaining = sum(self._cost(batch.shape) for batch in self._queue)
        for first, batch in enumerate(self._queue):
            if runnable(self._fitted(batch.shape, replica)):
                costs = (self._cost(self._queue[n].shape) for n in range(first, len(self._queue)))
                size = shard_size(costs, remaining=remaining, share=share)
                self._queue.rotate(-first)
                shard.extend(self._queue.popleft() for _ in range(size))
                self._queue.rotate(first)
                return

    def _steal(self, shard: deque[Batch], replica: int, runnable: Runnable) -> None:
        """Move the last batch from the shard of the replica that has the most left: it may be slow
        or hang."""
        others = (other for number, other in self._shards.items() if number != replica and other)
        largest = max(others, key=lambda other: sum(self._cost(one.shape) for one in other),
                      default=None)  # fmt: skip
        if largest and runnable(self._fitted(largest[-1].shape, replica)):
            shard.append(largest.pop())

    def _start(
        self, batches: deque[Batch], place: int, replica: int, runnable: Runnable
    ) -> Batch | None:
        """Begin the batch at a place, cut to the replica's budget; None if it is not runnable."""
        batch = batches[place]
        fitted = self._fitted(batch.shape, replica)
        if not runnable(fitted):
            return None
        del batches[place]
        if fitted != batch.shape:
            setbacks = self._setbacks.pop(batch.index, None)
            pieces = self._cut(batch, fitted.rows)
            if setbacks is not None:
                self._setbacks |= {piece.index: setbacks for piece in pieces}
            batch = pieces[0]
            for piece in reversed(pieces[1:]):
                batches.insert(place, piece)
        self._under_way[batch.index] = [replica]
        self._batches_under_way[batch.index] = batch
        return batch

    def _fitted(self, shape: BatchShape, replica: int) -> BatchShape:
        budget = self._budgets.get(replica)
        if budget is None or shape.tokens <= budget:
            return shape
        return replace(shape, rows=max(1, budget // shape.length))

    def _cut(self, batch: Batch, rows: int) -> list[Batch]:
        """Cut a batch into pieces of one shape, `rows` rows each but for the last."""
        shape = replace(batch.shape, rows=rows)
        pieces = (batch.rows[start : start + rows] for start in range(0, len(batch.rows), rows))
        return [self._numbered(Batch(0, piece, shape)) for piece in pieces]

    def _numbered(self, batch: Batch) -> Batch:
        self.next_index += 1
        return replace(batch, index=self.next_index - 1)

    def _leave(self, batch: Batch, replica: int) -> bool:
        """A replica no longer computes a batch; return whether nobody does and it is not done."""
        replicas = self._under_way.get(batch.index)
        if replicas is None:
            return False
        replicas.remove(replica)
        if replicas:
            return False
        del self._under_way[batch.index], self._batches_under_way[batch.index]
        return True

    def _give_up(self, batch: Batch, reason: str) -> None:
        self._setbacks.pop(batch.index, None)
        self.rows_left.difference_update(batch.rows)
        self.given_up |= dict.fromkeys(batch.rows, reason)
