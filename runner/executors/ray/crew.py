"""The replicas of a run, what feeding and replacing them share, and their start.

Does not know where batches come from, nor what becomes of a worker that fails.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from runner.common.errors import ConfigError
from runner.common.records import Computed, WorkerInfo
from runner.executors.one_pass import Pass
from runner.executors.ray.calls import Clock
from runner.executors.ray.group import Group, Step
from runner.executors.ray.places import Places
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline


@dataclass(slots=True, kw_only=True)
class Crew:
    """The replicas of a run, from its start to its end.

    at_work: the current pass; an empty one before the first. left_s: returns the seconds in which
    rows can still be predicted. stored_bytes: of the model's files. created_at: by
    `time.monotonic()`.
    """

    places: Places
    progress: Progress
    timeline: Timeline
    left_s: Callable[[], float]
    at_work: Pass
    groups: list[Group]
    computed: Computed
    created_at: float
    clock: Clock = field(default_factory=Clock)
    stored_bytes: int = 0
    _notes: set[str] = field(default_factory=set)

    def show(self, group: Group, state: str) -> None:
        self.progress.set_worker(group.number, state)

    def spawn(self, group: Group) -> None:
        """Start a group's actors again."""
        self.show(group, "starting")
        group.spawn()

    def note_fault(self, group: Group, said: str, **facts: str) -> None:
        """Report a fault of a group."""
        self.progress.note(said, event="fault", replica=group.number, **facts)

    def take_step(self, group: Group, step: Step) -> None:
        """Take the answers to a step of a start: process, model, tokens or a program is there.

        Raises:
            ConfigError: --dtype auto means different things on the devices.
        """
        if step.what == "ping":
            self.computed.start_workers_s = time.monotonic() - self.created_at
            self.show(group, "loading")
        elif step.what == "load":
            self._take_load(group, step.answers)
        elif step.what == "tokens":
            group.has_tokens = True
        elif step.what == "compile":
            group.take_compiled(step)
            self.at_work.dealer.compiled(group, step.payload)
        group.go_on_after(step)

    def hand_tokens(self, group: Group) -> None:
        """Give a group the tokens of the current pass if it has loaded and there are any."""
        info, tokens = self.computed.info, self.at_work.tokens
        if group.loaded and tokens is not None:
            assert info is not None, "this is a bug: a loaded worker has said what it is"
            self.at_work.rates.expect(group.number, info.matmul_flops_per_s * group.members)
            group.hand_tokens(tokens)

    def _take_load(self, group: Group, answers: list[WorkerInfo]) -> None:
        for info in answers:
            known = self.computed.info
            if known is not None and known.dtype != info.dtype:
                raise ConfigError(
                    "The devices differ in what --dtype auto means; name one dtype. Received: "
                    f"{known.device}: {known.dtype}, {info.device}: {info.dtype}"
                )
            self.computed.info = info
            for note in info.notes:
                if note not in self._notes:
                    self._notes.add(note)
                    self.progress.note(note)
        group.take_load(answers)
        self.show(group, "loaded")
        self.hand_tokens(group)
