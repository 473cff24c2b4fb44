"""The replicas of a run and their current pass, which feeding and replacing them share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from runner.common.records import Faults, WorkerStats
from runner.executors.one_pass import Pass
from runner.executors.ray.calls import Clock
from runner.executors.ray.group import Group
from runner.executors.ray.places import Places
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline


@dataclass(slots=True, kw_only=True)
class Crew:
    """The replicas of a run, from its start to its end.

    at_work: the current pass; an empty one before the first. left_s: returns the seconds left for
    predicting. stored_bytes: the size of the model's files.
    """

    places: Places
    progress: Progress
    timeline: Timeline
    left_s: Callable[[], float]
    at_work: Pass
    groups: list[Group]
    faults: Faults
    clock: Clock = field(default_factory=Clock)
    stored_bytes: int = 0

    @property
    def stats(self) -> list[WorkerStats]:
        return [stats for group in self.groups for stats in group.stats]

    def show(self, group: Group, state: str) -> None:
        self.progress.set_worker(group.number, state)

    def spawn(self, group: Group) -> None:
        """Start a group's actors again."""
        self.show(group, "starting")
        group.spawn()

    def note_fault(self, group: Group, said: str, **facts: str) -> None:
        """Report a fault of a group."""
        self.progress.note(said, event="fault", replica=group.number, **facts)
