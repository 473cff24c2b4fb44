"""What was asked of workers, and when their answers came -> spans of time and events.

The page and the trace are drawn from it. One small record a batch and a shape, none a row. Does
not know Ray, files, nor what is drawn; it holds no ids.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from runner.common.records import Work
from sharding.batches import Batch, BatchShape

STARTING, LOADING, COMPILING, PREDICTING, LOST = (
    *("starting", "loading", "compiling", "predicting"),
    "lost",
)


@dataclass(frozen=True, slots=True)
class Span:
    """What one worker did from `start_s` to `end_s`, in seconds since the process started.

    what: STARTING, LOADING, COMPILING, PREDICTING, or LOST: work that no answer came of.
    batch: what it predicted, or lost. is_copy: another replica's answer to it came before.
    shape: what it compiled. is_cached: its program was read from the cache on disk.
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
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Stage:
    """What the driver itself did from `start_s` to `end_s`."""

    what: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Event:
    """A fault or a decision, in words without ids; replica: None where it is about no one's."""

    at_s: float
    what: str
    replica: int | None = None


class Timeline:
    """A recorder. What one worker is asked for it does in that order: a span that would begin
    before the worker's last one ended begins there. Compiling goes on beside predicting.

    Args:
        started: of the process, by `clock`.
    """

    def __init__(
        self, started: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._started = clock() if started is None else started
        self._free_at: dict[tuple[int, int, bool], float] = {}
        self._answered: set[int] = set()
        self.spans: list[Span] = []
        self.stages: list[Stage] = []
        self.events: list[Event] = []

    def now(self) -> float:
        """Seconds since the process started."""
        return self._clock() - self._started

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Within, the driver does this; from any thread."""
        began = self.now()
        try:
            yield
        finally:
            self.stages.append(Stage(what, began, self.now()))

    def event(self, what: str, replica: int | None = None) -> None:
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
        """Keep what a worker was asked for at `asked_s` and has done, or lost, by now.

        Args:
            ended_s: None for now.
        """
        lane = (replica, member, what == COMPILING)
        ended = self.now() if ended_s is None else ended_s
        began = max(asked_s, self._free_at.get(lane, 0.0))
        if ended < began:
            return  # clocks of two machines that differ by more than the work took
        self._free_at[lane] = ended
        self.spans.append(
            Span(what, replica, member, began, ended, batch, is_copy, shape, is_cached)
        )

    def predicted(self, batch: Batch, replica: int, work: Sequence[Work], asked_s: float) -> None:
        """Keep an answer that has come: of each member what it spent on the batch, and when."""
        now, wall = self.now(), time.time()
        is_copy = batch.index in self._answered
        self._answered.add(batch.index)
        for member, entry in enumerate(work):
            # Between two machines the clocks may differ; no work ended before it was asked for.
            age_s = wall - entry.ended_at if entry.ended_at else 0.0
            ended = now - min(max(0.0, age_s), max(0.0, now - asked_s))
            began = max(asked_s, ended - entry.seconds)
            self.add(
                *(PREDICTING, replica, member, began),
                ended_s=ended,
                batch=batch,
                is_copy=is_copy,
            )
