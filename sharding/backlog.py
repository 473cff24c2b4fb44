"""A plan -> what each replica does next, until every row is answered or given up.

Shards are pulled by speed, and in the end an idle replica takes from another's. A batch that was
under way when its replica failed is a suspect: it waits for the end, is then computed alone, and
after `MOST_SETBACKS` is halved, until the row that does it is found and has had chances of its own.
Pure bookkeeping over rows and batches: does not know workers, time or answers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

from sharding.batches import Batch, BatchShape
from sharding.queues import BatchQueue
from sharding.shards import shard_size

# A batch that failed this often, on whichever replicas, is taken to be the cause.
MOST_SETBACKS = 2
# A row is left out for good after more: its replica may have been ended by something else.
MOST_SETBACKS_OF_A_ROW = 3

Runnable = Callable[[BatchShape], bool]


class Backlog:
    """The batches of a run: waiting, under way, or done.

    A row is in exactly one of them; `rows_left` are those not done, `given_up` those that no
    replica can compute, with the reason. A decision looks at shapes and replicas, never at every
    batch; `version` grows whenever what `shapes` says may have changed. One class, though a long
    one: each method moves batches between the same three places.

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
        self._queue = BatchQueue()
        self._suspects: deque[Batch] = deque()
        self._shards: dict[int, BatchQueue] = {}
        # Of each shape the batches that wait, wherever.
        self._waiting: Counter[BatchShape] = Counter()
        self._under_way = _UnderWay()
        self._budgets = _Budgets()
        # Of each suspect, by its index: how often it failed.
        self._setbacks: dict[int, int] = {}
        self.next_index = first_index
        self.version = 0
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

    def counts(self) -> Mapping[BatchShape, int]:
        """Return how many batches of each shape nobody computes now; empty if none waits."""
        return self._waiting

    def last_shape(self) -> BatchShape | None:
        """Return the shape of the last of the batches that wait, None if none does."""
        if self._suspects:
            return self._suspects[-1].shape
        queues = chain([self._queue], reversed(self._shards.values()))
        return next((queue.last.shape for queue in queues if queue), None)

    def under_way(self) -> Iterator[Batch]:
        """Batches that some replica computes now."""
        return iter(self._under_way)

    def replicas_of(self, batch: Batch) -> tuple[int, ...]:
        """The replicas that compute a batch now, the first one first."""
        return self._under_way.replicas_of(batch)

    def is_suspect(self, batch: Batch) -> bool:
        """Whether a batch was under way when a replica failed, and so is computed alone."""
        return batch.index in self._setbacks

    def shapes(self, replica: int) -> tuple[BatchShape, ...]:
        """The shapes that a replica may still be given: first those of what it pulled, of the queue
        and of suspects, in the order of work, then those that others pulled."""
        own = self._shards[replica].shapes() if replica in self._shards else ()
        suspects = (batch.shape for batch in self._suspects)
        ordered = chain(own, self._queue.shapes(), suspects, self._waiting)
        return tuple(dict.fromkeys(self._budgets.fitted(shape, replica) for shape in ordered))

    def take(
        self, replica: int, *, runnable: Runnable, alone: bool, share: float = 1.0
    ) -> Batch | None:
        """Return the next batch of a replica, now under way; None if it has to wait.

        Args:
            runnable: whether the replica has a program for a shape.
            alone: whether it computes nothing else, as suspects ask for.
            share: the replica's part of the speed of all.
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
        """A second replica computes a batch that is under way; the first answer counts."""
        self._under_way.add(batch, replica)

    def finish(self, batch: Batch) -> bool:
        """An answer came; return whether it is the first for this batch."""
        if not self._under_way.end(batch):
            return False
        self._setbacks.pop(batch.index, None)
        self.rows_left.difference_update(batch.rows)
        return True

    def put_back(self, batch: Batch, replica: int) -> None:
        """A replica gave a batch back unharmed: it is the next to be pulled."""
        if self._under_way.leave(batch, replica):
            (self._suspects if self.is_suspect(batch) else self._queue).appendleft(batch)
            self._count(batch.shape, 1)

    def setback(self, batch: Batch, replica: int, reason: str) -> str | None:
        """A replica failed while a batch was under way. Return what became of it, in words, if
        it is more than another try.

        Args:
            reason: why a row is given up, if it comes to that.
        """
        count = self._setbacks.get(batch.index, 0) + 1
        if self.replicas_of(batch):
            self._setbacks[batch.index] = count
        if not self._under_way.leave(batch, replica):
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
        """A batch does not fit the memory of `replica`: remember half of it as the budget of all
        replicas on such a device, to which what waits is cut when they take it. One row alone is
        given up.

        Returns:
            The new budget, in tokens; 0 if the row was given up, None if another replica
            still computes it.
        """
        if batch.shape.rows == 1:
            if not self._under_way.leave(batch, replica):
                return None
            self._give_up(batch, reason)
            return 0
        budget = self._budgets.halve(batch.shape, replicas)
        self.version += 1
        self.put_back(batch, replica)
        return budget

    def release(self, replica: int) -> None:
        """What a replica pulled and has not begun goes back to all."""
        shard = self._shards.pop(replica, BatchQueue())
        while shard:
            self._queue.appendleft(shard.pop())

    def withdraw(self, kept: Iterable[Batch] = ()) -> tuple[int, ...]:
        """Take out all that waits but for suspects, to be planned anew; return its rows.

        Args:
            kept: of those that wait, some that stay, the next to be pulled by whoever can.
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
        """Append batches of rows that are not in the backlog; they are numbered on."""
        batches = tuple(batches)
        self._append(batches)
        self.rows_left.update(row for batch in batches for row in batch.rows)

    def _append(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self._queue.append(self._numbered(batch))
            self._count(batch.shape, 1)

    def _count(self, shape: BatchShape, more: int) -> None:
        """Count batches that begin to wait, or no longer do."""
        before = self._waiting[shape]
        self._waiting[shape] = before + more
        if not before or not self._waiting[shape]:
            self.version += 1
        if not self._waiting[shape]:
            del self._waiting[shape]

    def _pull(self, shard: BatchQueue, replica: int, runnable: Runnable, share: float) -> None:
        """Move the first run of batches that a replica can begin now from the queue."""

        def is_first(shape: BatchShape) -> bool:
            return runnable(self._budgets.fitted(shape, replica))

        size = shard_size(
            (self._cost(batch.shape) for batch in self._queue.after(is_first)),
            remaining=self._queue.cost(self._cost),
            share=share,
        )
        shard.extend(self._queue.take(is_first, size))

    def _steal(self, shard: BatchQueue, replica: int, runnable: Runnable) -> None:
        """Move the last batch from the shard of the replica that has the most left: it may be slow
        or hang."""
        if not self._waiting:
            return
        others = (other for number, other in self._shards.items() if number != replica and other)
        largest = max(others, key=lambda other: other.cost(self._cost), default=None)
        if largest and runnable(self._budgets.fitted(largest.last.shape, replica)):
            shard.append(largest.pop())

    def _start(self, batch: Batch, replica: int, put_back: Callable[[Batch], None]) -> Batch:
        """Begin a batch that waited, cut to the replica's budget; put the other pieces back."""
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
        self._under_way.add(first, replica)
        for piece in reversed(others):
            put_back(piece)
        return first

    def _cut(self, batch: Batch, rows: int) -> list[Batch]:
        """Cut a batch into pieces of one shape, `rows` rows each but for the last."""
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


class _UnderWay:
    """Batches that are computed now, and by which replicas."""

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
        """Nobody needs to compute a batch any longer; return whether anybody did."""
        return self._found.pop(batch.index, None) is not None

    def leave(self, batch: Batch, replica: int) -> bool:
        """A replica no longer computes a batch; return whether nobody does and it is not done."""
        if batch.index not in self._found:
            return False
        replicas = self._found[batch.index][1]
        replicas.remove(replica)
        return not replicas and self.end(batch)


class _Budgets:
    """The tokens of a batch that fit the memory of each replica whose memory was once short."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def halve(self, shape: BatchShape, replicas: Iterable[int]) -> int:
        """A batch does not fit: return half of its tokens, from now on the most of replicas."""
        budget = (shape.rows // 2) * shape.length
        for number in replicas:
            self._tokens[number] = min(budget, self._tokens.get(number, budget))
        return budget

    def fitted(self, shape: BatchShape, replica: int) -> BatchShape:
        """Return a shape with no more rows than fit a replica."""
        budget = self._tokens.get(replica)
        if budget is None or shape.tokens <= budget:
            return shape
        return replace(shape, rows=max(1, budget // shape.length))
