"""The replicas of a run and the pass that they are at: what feeding them and mending them share."""

from collections.abc import Callable
from dataclasses import dataclass, field

import ray

from runner.common.records import Faults, WorkerStats
from runner.executors.ray.calls import Clock
from runner.executors.ray.group import Group
from runner.executors.ray.places import Places
from runner.executors.recovery import Recovery
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline
from sharding.backlog import Backlog
from sharding.dealing import Dealer
from sharding.rates import Rates


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over rows. tokens: where they are stored, None before there are any."""

    backlog: Backlog
    rates: Rates
    dealer: Dealer
    recovery: Recovery
    tokens: ray.ObjectRef | None


@dataclass(slots=True, kw_only=True)
class Crew:
    """The replicas of a run, from its start to its end.

    at_work: the pass that they are at; an empty one before the first. left_s: the seconds in which
    rows can still be predicted. stored_bytes: of the model's files.
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
        """Start a group's actors."""
        self.show(group, "starting")
        group.spawn()

    def note_fault(self, group: Group, said: str, **facts: str) -> None:
        """Say what went wrong with a group."""
        self.progress.note(said, event="fault", replica=group.number, **facts)
