"""Calls to workers -> their answers and failures, as they come; and the clock that measures waits.

All answers arrive through one `ray.wait`, so a dead worker shows as a failed call. Does not know
what was asked or what happens after a failure.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from runner.common.errors import WorkerError, first_line
from runner.common.records import TokenTable
from runner.common.units import mb
from runner.executors.ray.group import Group, Step
from runner.executors.ray.session import check_ray

# Seconds to wait for an answer before the clock is read again.
WAIT_S = 0.2
# If a look at the clock comes later than this, the machine was suspended, and its workers with it.
LONGEST_LOOK_S = 10.0
# What Ray raises if a worker's process or machine has ended.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)
STORE_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class Clock:
    """Counts the seconds in which workers could work: it stops while the machine is suspended."""

    def __init__(self) -> None:
        self.now, self._looked_at = 0.0, time.monotonic()

    def look(self) -> None:
        """Advance to this moment."""
        now = time.monotonic()
        self.now += min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now


def finished_steps(
    groups: Sequence[Group],
    clock: Clock,
    *,
    timeout_s: float,
    may_be_idle: bool,
    on_death: Callable[[Group, Exception], None],
    on_failure: Callable[[Group, Step, ray.exceptions.RayTaskError], None],
) -> Iterator[tuple[Group, Step]]:
    """Wait for calls to end and yield the steps whose last answer has come.

    Args:
        may_be_idle: whether it is right that no call is under way.
        on_death: called if a worker of a group has died. on_failure: if one has raised an error.
    """
    owners = {reference: group for group in groups for reference in group.calls}
    if not owners:
        assert may_be_idle, "this is a bug: rows are missing and no worker has work"
        time.sleep(timeout_s)
        clock.look()
        return
    references = list(owners)
    ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
    if ready:
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    # First: if Ray has ended, its workers' ends must not count as deaths of their own.
    check_ray()
    clock.look()
    for reference in ready:
        group = owners[reference]
        if reference not in group.calls:
            continue  # its actor was found dead a moment ago
        step, place = group.calls.pop(reference)
        try:
            step.answers[place] = ray.get(reference)
        except DEATHS as death:
            on_death(group, death)
        except STORE_FULL as error:
            raise WorkerError(f"Ray's object store is full: {_make_room(error)}") from error
        except ray.exceptions.RayTaskError as failure:
            on_failure(group, step, failure)
        else:
            step.missing -= 1
            if not step.missing:
                yield group, step


def store(tokens: TokenTable) -> ray.ObjectRef:
    """Put the tokens into Ray's object store, where workers on this machine read them in place.

    Raises:
        WorkerError: the store has no room for them.
    """
    try:
        return ray.put(tokens)
    except STORE_FULL as error:
        size = mb(tokens.values.nbytes + tokens.offsets.nbytes)
        raise WorkerError(
            f"Ray's object store has no room for the {size} of token ids: {_make_room(error)}"
        ) from error


def _make_room(error: Exception) -> str:
    return f"make room in /dev/shm and in the folder for temporary files. ({first_line(error)})"


def get_within(asked: ray.ObjectRef, within_s: float) -> Any:
    """Wait for an answer and return it; check meanwhile that Ray still runs.

    Raises:
        GetTimeoutError: it did not come within so many seconds.
    """
    end = time.monotonic() + within_s
    while True:
        left_s = end - time.monotonic()
        ready, _ = ray.wait([asked], timeout=max(0.0, min(WAIT_S, left_s)))
        check_ray()
        if ready or left_s <= 0:
            return ray.get(asked, timeout=0)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Within, an error of Ray itself becomes a WorkerError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        check_ray()
        raise WorkerError(f"Ray failed: {type(error).__name__}: {first_line(error)}") from error
