"""A plan -> the batch that each replica computes next, until every row is answered or given up.

Faster replicas pull larger shards, and at the end an idle replica steals from another's shard. A
batch that was in flight when its replica failed is a suspect. Suspects run last and alone. After
`MOST_SETBACKS` failures a suspect is halved, until the row that causes them is found; that row gets
further tries. Does not know workers, time or answers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

from sharding.batches import Batch, BatchShape
from sharding.queues import BatchQueue
from sharding.shards import shard_size

# A batch that failed this often, on any replicas, is assumed to be the cause.
MOST_SETBACKS = 2
# One row gets more tries before it is given up: something else may have ended its replica.
MOST_SETBACKS_OF_A_ROW = 3

Runnable = Callable[[BatchShape], bool]


class Backlog:
    """The batches of a run: waiting, in flight, or done.

    Each row is in exactly one batch. `rows_left` are the rows that are not done; `given_up` maps
    the rows that no replica can compute to the reason. Decisions look at shapes and replicas, never
    at every batch. `version` grows when the result of `shapes` may have changed.

    Args:
        batches: in the order of work.
        cost: of a shape, in any unit that is proportional to time.
        first_index: the number of the first batch. It must be larger than any number of an earlier
            backlog whose answers may still arrive.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        *,
        cost: Callable[[BatchShape], float],
        first_index: int = 0,
    ) -> None:
        self._cost = cost
        self._queue = BatchQueue()
        self._suspects: deque[Batch] = deque()
        self._shards: dict[int, BatchQueue] = {}
        # Shape -> number of waiting batches, shards and suspects included.
        self._waiting: Counter[BatchShape] = Counter()
        self._in_flight = _InFlight()
        self._budgets = _Budgets()
        # Index of a suspect -> how often it failed.
        self._setbacks: dict[int, int] = {}
        self.next_index = first_index
        self.version = 0
        self.given_up: dict[int, str] = {}
        self.rows_left: set[int] = set()
        self._append(batches)
        self.rows_left = {row for batch in self.waiting() for row in batch.rows}

    def __bool__(self) -> bool:
        """Return whether any row still needs an answer."""
        return bool(self.rows_left)

    def waiting(self) -> Iterator[Batch]:
        """Return the waiting batches, in the order of work."""
        return chain(*self._shards.values(), self._queue, self._suspects)

    def counts(self) -> Mapping[BatchShape, int]:
        """Return how many batches of each shape are waiting."""
        return self._waiting

    def last_shape(self) -> BatchShape | None:
        """Return the shape of the last waiting batch, None if there is none."""
        if self._suspects:
            return self._suspects[-1].shape
        queues = chain([self._queue], reversed(self._shards.values()))
        return next((queue.last.shape for queue in queues if queue), None)

    def in_flight(self) -> Iterator[Batch]:
        """Return the batches in flight."""
        return iter(self._in_flight)

    def replicas_of(self, batch: Batch) -> tuple[int, ...]:
        """Return the replicas that are computing a batch, in the order in which they began."""
        return self._in_flight.replicas_of(batch)

    def is_suspect(self, batch: Batch) -> bool:
        """Return whether a batch was in flight when a replica failed, and so must run alone."""
        return batch.index in self._setbacks

    def shapes(self, replica: int) -> tuple[BatchShape, ...]:
        """Return the shapes that a replica may still get, each once.

        First those of its own shard, the queue and suspects, in the order of work, then those of
        other shards.
        """
        own = self._shards[replica].shapes() if replica in self._shards else ()
        suspects = (batch.shape for batch in self._suspects)
        ordered = chain(own, self._queue.shapes(), suspects, self._waiting)
        return tuple(dict.fromkeys(self._budgets.fitted(shape, replica) for shape in ordered))

    def take(
        self, replica: int, *, runnable: Runnable, alone: bool, share: float = 1.0
    ) -> Batch | None:
        """Move a replica's next batch in flight and return it; None if the replica must wait.

        Args:
            runnable: whether the replica has a program for a shape.
            alone: whether the replica has nothing else in flight, which suspects require.
            share: the replica's share of the total speed.
        """
        shard = self._shards.setdefault(replica, BatchQueue())
        if not shard:
            self._pull(shard, replica, runnable, share)
        if not shard and not self._queue:
            self._steal(shard, replica, runnable)
        if shard:
            if not runnable(self._budgets.fitted(shard.first.shape, replica)):
                return None
            return self._start(shard.popleft(), replica, shard.appendleft)
        for place, suspect in enumerate(self._suspects if alone else ()):
            if runnable(self._budgets.fitted(suspect.shape, replica)):
                del self._suspects[place]
                return self._start(suspect, replica, partial(self._suspects.insert, place))
        return None

    def copy(self, batch: Batch, replica: int) -> None:
        """Note that another replica computes a batch in flight too; the first answer counts."""
        self._in_flight.add(batch, replica)

    def finish(self, batch: Batch) -> bool:
        """Note an answer; return whether it is the first for this batch."""
        if not self._in_flight.end(batch):
            return False
        self._setbacks.pop(batch.index, None)
        self.rows_left.difference_update(batch.rows)
        return True

    def put_back(self, batch: Batch, replica: int) -> None:
        """Return a batch from a replica to the front of the queue; the replica did not fail."""
        if self._in_flight.leave(batch, replica):
            (self._suspects if self.is_suspect(batch) else self._queue).appendleft(batch)
            self._count(batch.shape, 1)

    def setback(self, batch: Batch, replica: int, reason: str) -> str | None:
        """Note that a replica failed while a batch was in flight.

        Args:
            reason: to record if a row is given up.

        Returns:
            `halved` or `given up`; None if the batch is only tried again.
        """
        count = self._setbacks.get(batch.index, 0) + 1
        if self.replicas_of(batch):
            self._setbacks[batch.index] = count
        if not self._in_flight.leave(batch, replica):
            return None
        is_one = len(batch.rows) == 1
        if count < (MOST_SETBACKS_OF_A_ROW if is_one else MOST_SETBACKS):
            self._suspects.append(batch)
            self._count(batch.shape, 1)
            return None
        del self._setbacks[batch.index]
        if is_one:
            self._give_up(batch, reason)
            return "given up"
        half = -(-len(batch.rows) // 2)
        for piece in self._cut(batch, half):
            self._setbacks[piece.index] = MOST_SETBACKS - 1
            self._suspects.append(piece)
            self._count(piece.shape, 1)
        return "halved"

    def too_large(
        self, batch: Batch, replicas: Iterable[int], replica: int, reason: str
    ) -> int | None:
        """Note that a batch does not fit the memory of `replica`.

        Half of the batch becomes the budget of `replicas`, those with such a device; larger batches
        are cut when they take them. A batch of one row is given up.

        Returns:
            The new budget in tokens; 0 if the row was given up, None if another replica is still
            computing it.
        """
        if batch.shape.rows == 1:
            if not self._in_flight.leave(batch, replica):
                return None
            self._give_up(batch, reason)
            return 0
        budget = self._budgets.halve(batch.shape, replicas)
        self.version += 1
        self.put_back(batch, replica)
        return budget

    def release(self, replica: int) -> None:
        """Return the batches of a replica's shard to the queue."""
        shard = self._shards.pop(replica, BatchQueue())
        while shard:
            self._queue.appendleft(shard.pop())

    def withdraw(self, kept: Iterable[Batch] = ()) -> tuple[int, ...]:
        """Remove all waiting batches except suspects, to be planned again; return their rows.

        Args:
            kept: waiting batches that stay, at the front of the queue.
        """
        stay = {batch.index for batch in kept}
        waiting = [*chain(*self._shards.values(), self._queue)]
        rows = [row for batch in waiting if batch.index not in stay for row in batch.rows]
        self._shards.clear()
        self._queue = BatchQueue(batch for batch in waiting if batch.index in stay)
        self._waiting = Counter(batch.shape for batch in self.waiting())
        self.version += 1
        self.rows_left.difference_update(rows)
        return tuple(rows)

    def add(self, batches: Iterable[Batch]) -> None:
        """Append batches of rows that are not in the backlog, with new numbers."""
        batches = tuple(batches)
        self._append(batches)
        self.rows_left.update(row for batch in batches for row in batch.rows)

    def _append(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._queue.append(self._numbered(batch))
            self._count(batch.shape, 1)

    def _count(self, shape: BatchShape, more: int) -> None:
        """Add to the number of waiting batches of a shape."""
        before = self._waiting[shape]
        self._waiting[shape] = before + more
        if not before or not self._waiting[shape]:
            self.version += 1
        if not self._waiting[shape]:
            del self._waiting[shape]

    def _pull(self, shard: BatchQueue, replica: int, runnable: Runnable, share: float) -> None:
        """Move batches from the queue to a shard, from the first that the replica can run."""

        def is_first(shape: BatchShape) -> bool:
            return runnable(self._budgets.fitted(shape, replica))

        size = shard_size(
            (self._cost(batch.shape) for batch in self._queue.after(is_first)),
            remaining=self._queue.cost(self._cost),
            share=share,
        )
        shard.extend(self._queue.take(is_first, size))

    def _steal(self, shard: BatchQueue, replica: int, runnable: Runnable) -> None:
        """Move the last batch of the largest other shard; that replica may be slow or hang."""
        if not self._waiting:
            return
        others = (other for number, other in self._shards.items() if number != replica and other)
        largest = max(others, key=lambda other: other.cost(self._cost), default=None)
        if largest and runnable(self._budgets.fitted(largest.last.shape, replica)):
            shard.append(largest.pop())

    def _start(self, batch: Batch, replica: int, put_back: Callable[[Batch], None]) -> Batch:
        """Move a waiting batch in flight, cut to the replica's budget; put back other pieces."""
        self._count(batch.shape, -1)
        fitted = self._budgets.fitted(batch.shape, replica)
        pieces = [batch]
        if fitted != batch.shape:
            setbacks = self._setbacks.pop(batch.index, None)
            pieces = self._cut(batch, fitted.rows)
            self._count(fitted, len(pieces) - 1)
            if setbacks is not None:
                self._setbacks |= {piece.index: setbacks for piece in pieces}
        first, *others = pieces
        self._in_flight.add(first, replica)
        for piece in reversed(others):
            put_back(piece)
        return first

    def _cut(self, batch: Batch, rows: int) -> list[Batch]:
        """Cut a batch into pieces of one shape, with `rows` rows each; the last may have fewer."""
        shape = replace(batch.shape, rows=rows)
        pieces = (batch.rows[start : start + rows] for start in range(0, len(batch.rows), rows))
        return [self._numbered(Batch(0, piece, shape)) for piece in pieces]

    def _numbered(self, batch: Batch) -> Batch:
        self.next_index += 1
        return replace(batch, index=self.next_index - 1)

    def _give_up(self, batch: Batch, reason: str) -> None:
        self._setbacks.pop(batch.index, None)
        self.rows_left.difference_update(batch.rows)
        self.given_up |= dict.fromkeys(batch.rows, reason)


class _InFlight:
    """The batches in flight, and the replicas that compute each."""

    def __init__(self) -> None:
        # By batch index; the replica that began it comes first.
        self._found: dict[int, tuple[Batch, list[int]]] = {}

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in self._found.values())

    def replicas_of(self, batch: Batch) -> tuple[int, ...]:
        return tuple(self._found[batch.index][1]) if batch.index in self._found else ()

    def add(self, batch: Batch, replica: int) -> None:
        self._found.setdefault(batch.index, (batch, []))[1].append(replica)

    def end(self, batch: Batch) -> bool:
        """Remove a batch; return whether it was in flight."""
        return self._found.pop(batch.index, None) is not None

    def leave(self, batch: Batch, replica: int) -> bool:
        """Note that a replica stopped computing a batch.

        Return whether it is unfinished and no other replica computes it.
        """
        if batch.index not in self._found:
            return False
        replicas = self._found[batch.index][1]
        replicas.remove(replica)
        return not replicas and self.end(batch)


class _Budgets:
    """The maximum tokens per batch of each replica that has run out of memory."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def halve(self, shape: BatchShape, replicas: Iterable[int]) -> int:
        """Set the budget of `replicas` to half of a batch's tokens, and return it."""
        budget = (shape.rows // 2) * shape.length
        for number in replicas:
            self._tokens[number] = min(budget, self._tokens.get(number, budget))
        return budget

    def fitted(self, shape: BatchShape, replica: int) -> BatchShape:
        """Return the shape, with fewer rows if a replica's budget requires it."""
        budget = self._tokens.get(replica)
        if budget is None or shape.tokens <= budget:
            return shape
        return replace(shape, rows=max(1, budget // shape.length))
