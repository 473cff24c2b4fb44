"""Workers that die, hang or raise -> replicas that are restarted or given up, or an error.

`recovery.py` decides what becomes of the rows. Does not know batches that go well.
"""

import time

import ray.exceptions

from runner.common.errors import ArenaRunnerError, DeviceMemoryError, WorkerError, first_line
from runner.common.records import CompileInfo
from runner.common.units import seconds_text
from runner.executors.ray.calls import DEATHS, WAIT_S
from runner.executors.ray.crew import Crew
from runner.executors.ray.group import Group, Step
from runner.telemetry.logs import worker_log

# A replica is given up after this many restarts that no batch explains.
MAX_RESTARTS = 3
# A worker that takes longer for a step counts as hung. The slowest compile and load fit.
STEP_WITHIN_S = {"ping": 300.0, "meet": 120.0, "tokens": 300.0, "load": 600.0, "compile": 1800.0}
SLOWEST_LOAD_BYTES_PER_S = 20e6
# Seconds that a run waits for another node if all are gone.
NODE_COMES_WITHIN_S = 300.0


class Failures:
    """What a run does about workers that fail."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._deserted_since: float | None = None
        self._looked_for_hung_at = 0.0

    def died(self, group: Group, death: Exception) -> None:
        """Handle the end of a worker's process.

        Raises:
            WorkerError: no replica is left.
        """
        self._crew.computed.faults.worker_deaths += 1
        self._bury(group, "its worker died", death)

    def failed(self, group: Group, step: Step, failure: ray.exceptions.RayTaskError) -> None:
        """A worker raised an error: try the batch in another way, or end the run.

        Raises:
            ArenaRunnerError: the worker's error, if there is no other way.
        """
        cause = failure.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause  # passed on from an earlier stage
        is_ours = isinstance(cause, ArenaRunnerError)
        if isinstance(cause, DEATHS) or (not is_ours and group.actors.has_lost_one()):
            # The other members may hear of a death before the driver does.
            self.died(group, failure)
            return
        is_memory = isinstance(cause, DeviceMemoryError)
        if step.what == "compile" and is_memory:
            # A batch of this shape will fail in the same way, and can be split.
            step.answers = [CompileInfo(0.0, cached=False)] * len(step.answers)
            group.forget(step)
            self._crew.take_step(group, step)
            return
        if step.what != "predict" or (is_ours and not is_memory):
            raise self._explain(group, step, cause) from failure
        crew = self._crew
        backlog, recovery = crew.at_work.backlog, crew.at_work.recovery
        group.drop(step)
        if is_memory:
            alike = [one.number for one in crew.groups if one.device == group.device]
            recovery.too_large(group.number, alike, step.payload)
        else:
            crew.progress.keep(failure)
            said = f"{type(cause).__name__}: {first_line(cause)}"
            recovery.failed(group.number, step.payload, failure, said)
        if group.strategy_name == "tensor":
            # The other members still wait for the one that failed.
            for batch in group.end():
                backlog.put_back(batch, group.number)
            backlog.release(group.number)
            crew.spawn(group)

    def _explain(self, group: Group, step: Step, cause: BaseException) -> ArenaRunnerError:
        """Return the error of a worker, with replica and step, or batch and rows; the error of a
        file as it is."""
        replica = f"{group.noun.capitalize()} {group.number}"
        if not isinstance(cause, ArenaRunnerError):
            said = f"{type(cause).__name__}: {first_line(cause)}"
            return WorkerError(f"{replica} failed in {step.what}: {said}")
        if step.what == "predict":
            return self._crew.at_work.recovery.explain(replica, step.payload, cause)
        return cause

    def end_hung(self) -> None:
        """End and replace groups that take far longer for a step than they should.

        Raises:
            WorkerError: no replica is left.
        """
        crew, now = self._crew, self._crew.clock.now
        if now - self._looked_for_hung_at < WAIT_S:
            return
        self._looked_for_hung_at = now
        for group in crew.groups:
            for step, since in list(group.oldest()):
                limit = self._limit_s(group, step)
                if now - since <= limit or group.given_up:
                    continue
                crew.computed.faults.hangs += 1
                doing = "a batch" if step.what == "predict" else step.what
                crew.note_fault(
                    group,
                    f"warning: {group.noun} {group.number} hangs: "
                    f"{seconds_text(now - since)} in {doing}, expected at most "
                    f"{seconds_text(limit)}; ended",
                )
                if step.what == "predict":
                    # The batches behind it are not to blame.
                    for batch in tuple(group.in_flight)[1:]:
                        group.in_flight.remove(batch)
                        crew.at_work.backlog.put_back(batch, group.number)
                self._bury(group, "its worker hung")
                break

    def _limit_s(self, group: Group, step: Step) -> float:
        """Return the seconds after which a step counts as hung."""
        crew = self._crew
        if step.what == "predict":
            return crew.at_work.dealer.batch_limit_s(group, step.payload, crew.left_s())
        if step.what == "load":
            return load_within_s(crew.stored_bytes)
        return STEP_WITHIN_S[step.what]

    def follow_nodes(self) -> None:
        """Give up replicas whose node is gone.

        Raises:
            WorkerError: all nodes are gone, and no other came.
        """
        crew = self._crew
        if not crew.places.may_grow:
            return
        lost = crew.places.lost
        for group in crew.groups:
            if not group.given_up and any(slot.node in lost for slot in group.slots):
                crew.computed.faults.worker_deaths += group.loaded
                self._desert(group)
        if not crew.groups or not all(group.given_up for group in crew.groups):
            self._deserted_since = None
            return
        self._deserted_since = self._deserted_since or time.monotonic()
        if time.monotonic() - self._deserted_since > NODE_COMES_WITHIN_S:
            raise WorkerError(
                "All nodes with workers are gone, and no other came in "
                f"{seconds_text(NODE_COMES_WITHIN_S)}: expected one with free devices, as `ray "
                "status` shows them."
            )

    def _desert(self, group: Group) -> None:
        """A node is gone, and this group with it; other groups do its work."""
        crew, batches = self._crew, group.give_up()
        crew.at_work.recovery.lost(group.number, batches, "its node was lost")
        crew.places.forget(group.number)
        crew.show(group, "lost")
        crew.timeline.event("its node was lost; it is given up", group.number)
        names = ", ".join(dict.fromkeys(stats.node for stats in group.stats))
        crew.note_fault(
            group, f"warning: {group.noun} {group.number} is gone with its node ({names})"
        )

    def _bury(self, group: Group, reason: str, cause: Exception | None = None) -> None:
        """Take back the batches of a group that lost a worker, and restart it or give it up."""
        crew = self._crew
        if crew.places.has_lost(slot.node for slot in group.slots):
            self._desert(group)
            return
        batches = group.end()
        if not crew.at_work.recovery.lost(group.number, batches, reason):
            group.restarts += 1
        again = group.restarts <= MAX_RESTARTS
        ending = "; it is started again" if again else "; it is given up"
        crew.timeline.event(reason + ending, group.number)
        if again:
            for stats in group.stats:
                stats.restarts += 1
            crew.note_fault(
                group,
                f"{group.noun} {group.number} died and is started again",
                log=worker_log(group.number, "*"),
            )
            crew.spawn(group)
            return
        group.given_up = True
        crew.show(group, "dead")
        if all(other.given_up for other in crew.groups):
            raise WorkerError(
                f"Every {group.noun} died {MAX_RESTARTS + 1} times; the last was {group.noun} "
                f"{group.number}. Is there enough memory for the model and one batch? Fewer "
                "--num-workers or a smaller --max-tokens-per-batch need less. Its last output is "
                f"in {worker_log(group.number, '*')}."
            ) from cause
        crew.note_fault(
            group,
            f"warning: {group.noun} {group.number} died {MAX_RESTARTS + 1} times and is given up; "
            "the others do its work",
            log=worker_log(group.number, "*"),
        )


def load_within_s(stored_bytes: int) -> float:
    """Return the seconds that loading a model may take from the slowest disk."""
    return STEP_WITHIN_S["load"] + stored_bytes / SLOWEST_LOAD_BYTES_PER_S
