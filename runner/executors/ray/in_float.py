"""Batches once more in float32, after a run's passes, in one process in the place of a replica."""

import numpy as np
import ray.exceptions

from runner.common.errors import WorkerError, first_line
from runner.executors.ray.actors import Actors
from runner.executors.ray.calls import DEATHS, get_within, ray_errors
from runner.executors.ray.crew import Crew
from runner.executors.ray.failures import MAX_RESTARTS, load_within_s
from sharding.batches import Batch


class FloatWorker:
    """The process that predicts in float32: started when it is first needed, and again if it
    ends."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._running: Actors | None = None

    def predict(self, batch: Batch, *, within_s: float) -> np.ndarray:
        """Return a batch's probabilities; see `Executor.predict_in_float`."""
        crew = self._crew
        within_s = min(within_s, load_within_s(crew.stored_bytes))
        group = next((group for group in crew.groups if not group.given_up), crew.groups[0])
        failure: Exception
        with ray_errors():
            for _ in range(MAX_RESTARTS + 1):
                self._running = self._running or group.replace_by_one(crew.at_work.tokens)
                try:
                    answer: np.ndarray = get_within(self._running.predict_in_float(batch), within_s)
                    return answer
                except DEATHS as death:
                    # The one that ended may have had nothing to do with these rows.
                    crew.faults.worker_deaths += 1
                    self._running, failure = None, death
                except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
                    self._running, failure = None, error
                    break
        raise WorkerError(
            f"{group.noun} {group.number}: {type(failure).__name__}: {first_line(failure)}"
        ) from failure
