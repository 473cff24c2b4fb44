"""Calls to workers -> their answers and failures, as they come; and a clock to wait by.

Every answer arrives through one `ray.wait`, so a dead worker is seen as a failed call. Does not
know what was asked, nor what becomes of a failure.
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

# Seconds between looks at the clock when nothing arrives.
WAIT_S = 0.2
# A look at the clock that comes so late was late for the workers too: the machine was suspended.
LONGEST_LOOK_S = 10.0
# What Ray raises if a worker's process or its machine has ended.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)
STORE_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class Clock:
    """Seconds that workers have had: it stands still while the machine is suspended."""

    def __init__(self) -> None:
        self.now, self._looked_at = 0.0, time.monotonic()

    def look(self) -> None:
        """Let it go on to this moment."""
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
        is_idle_right: whether there may be no call at all.
        on_death: a worker of a group has died. on_failure: one has raised an error.
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
    # First of all: else each worker that ended with Ray would be taken for a death of its own.
    check_ray()
    clock.look()
    for reference in ready:
        group = owners[reference]
        if reference not in group.calls:
            continue  # of an actor that was seen dead a moment ago
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
    """Put the tokens where workers on this machine read them without a copy.

    Raises:
        WorkerError: there is no room for them.
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
    """Return an answer, looking after Ray while it is waited for."""
    end = time.monotonic() + within_s
    while True:
        left_s = end - time.monotonic()
        ready, _ = ray.wait([asked], timeout=max(0.0, min(WAIT_S, left_s)))
        check_ray()
        if ready or left_s <= 0:
            return ray.get(asked, timeout=0)


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn what Ray itself raises within into a WorkerError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        check_ray()
        raise WorkerError(f"Ray failed: {type(error).__name__}: {first_line(error)}") from error
