"""Calls to workers -> answers and failures as they arrive, and the clock that times them.

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
# If the clock is read later than this, the machine was suspended, and the workers with it.
LONGEST_LOOK_S = 10.0
# What Ray raises when a worker's process or its machine is gone.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)
STORE_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class Clock:
    """The seconds that workers have had; it stops while the machine is suspended."""

    def __init__(self) -> None:
        self.now, self._looked_at = 0.0, time.monotonic()

    def look(self) -> None:
        """Advance it to this moment."""
        now = time.monotonic()
        self.now += min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now


def finished_steps(
    groups: Sequence[Group],
    clock: Clock,
    *,
    timeout_s: float,
    is_idle_right: bool,
    on_death: Callable[[Group, Exception], None],
    on_failure: Callable[[Group, Step, ray.exceptions.RayTaskError], None],
) -> Iterator[tuple[Group, Step]]:
    """Wait for calls to end and yield the steps whose last answer has come.

    Args:
        is_idle_right: whether it is right that no call is in flight.
        on_death: called when a group's worker has died. on_failure: when one has raised an error.
    """
    owners = {reference: group for group in groups for reference in group.calls}
    if not owners:
        assert is_idle_right, "this is a bug: rows are missing and no worker has work"
        time.sleep(timeout_s)
        clock.look()
        return
    references = list(owners)
    ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
    if ready:
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    # First: if Ray itself has ended, the workers' deaths are not their own.
    check_ray()
    clock.look()
    for reference in ready:
        group = owners[reference]
        if reference not in group.calls:
            continue  # of an actor that was found dead in this loop
        step, place = group.calls.pop(reference)
        try:
            step.answers[place] = ray.get(reference)
        except DEATHS as death:
            on_death(group, death)
        except STORE_FULL as error:
            raise WorkerError(
                "Ray's object store is full: make room in /dev/shm and in the folder for "
                f"temporary files. ({first_line(error)})"
            ) from error
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
            f"Ray's object store has no room for the {size} of token ids: make room in "
            f"/dev/shm and in the folder for temporary files. ({first_line(error)})"
        ) from error


def get_within(asked: ray.ObjectRef, within_s: float) -> Any:
    """Return an answer; check that Ray still runs while waiting."""
    end = time.monotonic() + within_s
    while True:
        left_s = end - time.monotonic()
        ready, _ = ray.wait([asked], timeout=max(0.0, min(WAIT_S, left_s)))
        check_ray()
        if ready or left_s <= 0:
            return ray.get(asked, timeout=0)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn Ray's own errors into WorkerError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        check_ray()
        raise WorkerError(f"Ray failed: {type(error).__name__}: {first_line(error)}") from error
