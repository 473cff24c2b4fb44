"""Requests to workers and the times of their answers -> spans of time, and events.

The report page and the trace are drawn from it. It keeps a small record of each batch and shape,
none of rows, and no ids. Does not know Ray, files or drawings.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from runner.common.records import Work
from sharding.batches import Batch, BatchShape

STARTING, LOADING, COMPILING = "starting", "loading", "compiling"
PREDICTING, LOST = "predicting", "lost"


@dataclass(frozen=True, slots=True)
class Span:
    """What one worker did from `start_s` to `end_s`, in seconds since the process started.

    what: STARTING, LOADING, COMPILING, PREDICTING, or LOST: work without an answer.
    batch: what it predicted or lost. is_copy: whether another replica had answered it before.
    shape: what it compiled. is_cached: whether the program was read from the cache on disk.
    """

    what: str
    replica: int
    member: int
    start_s: float
    end_s: float
    batch: Batch | None = None
    is_copy: bool = False
    shape: BatchShape | None = None
    is_cached: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Phase:
    """What the driver did from `start_s` to `end_s`, in seconds since the process started."""

    what: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """A fault or a decision, in words without ids; replica: None if it is not about one."""

    at_s: float
    what: str
    replica: int | None = None


class Timeline:
    """Records what the driver and the workers do.

    A worker answers requests in order, so no span begins before the worker's previous one ended.
    Compiling runs alongside predicting.

    Args:
        started: when the process started, by `clock`; None for now.
    """

    def __init__(
        self, started: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._started = clock() if started is None else started
        self._free_at: dict[tuple[int, int, bool], float] = {}
        self._answered: set[int] = set()
        self.spans: list[Span] = []
        self.phases: list[Phase] = []
        self.events: list[Event] = []

    def now(self) -> float:
        """Return the seconds since the process started."""
        return self._clock() - self._started

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Record what the driver does within; any thread may call it."""
        began = self.now()
        try:
            yield
        finally:
            self.phases.append(Phase(what, began, self.now()))

    def event(self, what: str, replica: int | None = None) -> None:
        """Record a fault or a decision now."""
        self.events.append(Event(self.now(), what, replica))

    def add(
        self,
        what: str,
        replica: int,
        member: int,
        asked_s: float,
        *,
        ended_s: float | None = None,
        batch: Batch | None = None,
        is_copy: bool = False,
        shape: BatchShape | None = None,
        is_cached: bool = False,
    ) -> None:
        """Record what a worker was asked for at `asked_s` and has done, or lost.

        Args:
            what, batch, is_copy, shape, is_cached: as in `Span`.
            ended_s: when it ended, None for now.
        """
        lane = (replica, member, what == COMPILING)
        ended = self.now() if ended_s is None else ended_s
        began = max(asked_s, self._free_at.get(lane, 0.0))
        if ended < began:
            return  # the clocks of two machines differ by more than the work took
        self._free_at[lane] = ended
        self.spans.append(
            Span(what, replica, member, began, ended, batch, is_copy, shape, is_cached)
        )

    def predicted(self, batch: Batch, replica: int, work: Sequence[Work], asked_s: float) -> None:
        """Record an answer that has just arrived, with the work of each member on the batch."""
        now, wall = self.now(), time.time()
        is_copy = batch.index in self._answered
        self._answered.add(batch.index)
        for member, entry in enumerate(work):
            # Two machines' clocks may differ; no work ended before it was asked for.
            age_s = wall - entry.ended_at if entry.ended_at else 0.0
            ended = now - min(max(0.0, age_s), max(0.0, now - asked_s))
            began = max(asked_s, ended - entry.seconds)
            self.add(
                PREDICTING, replica, member, began, ended_s=ended, batch=batch, is_copy=is_copy
            )
