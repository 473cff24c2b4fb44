"""What workers answer while they start: process, model, tokens and programs are there.

Does not know batches, nor what becomes of a worker that fails to start.
"""

import time

from runner.common.errors import ConfigError
from runner.common.records import WorkerInfo
from runner.executors.ray.crew import Crew
from runner.executors.ray.group import Group, Step


class Setup:
    """The starts of all groups, from the first to the last of a run.

    Attributes:
        info: of a worker that has loaded, None before one has.
        start_workers_s: seconds until the last process was up.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._said: set[str] = set()
        self.created_at = time.monotonic()
        self.info: WorkerInfo | None = None
        self.start_workers_s = 0.0

    def take_step(self, group: Group, step: Step) -> None:
        """Take the answers to a step of starting up.

        Raises:
            ConfigError: the devices differ in what --dtype auto means.
        """
        if step.what == "ping":
            self.start_workers_s = max(self.start_workers_s, time.monotonic() - self.created_at)
            self._crew.show(group, "loading")
        elif step.what == "load":
            self._take_load(group, step.answers)
        elif step.what == "tokens":
            group.has_tokens = True
        elif step.what == "compile":
            group.take_compiled(step)
            self._crew.at_work.dealer.compiled(group, step.payload)
        group.go_on_after(step)

    def hand_tokens(self, group: Group) -> None:
        """Give a group the tokens of the current pass, if it has loaded and there are any."""
        at_work = self._crew.at_work
        if group.loaded and at_work.tokens is not None:
            assert self.info is not None, "this is a bug: a loaded worker has said what it is"
            at_work.rates.expect(group.number, self.info.matmul_flops_per_s * group.members)
            group.hand_tokens(at_work.tokens)

    def _take_load(self, group: Group, answers: list[WorkerInfo]) -> None:
        for info in answers:
            if self.info is not None and self.info.dtype != info.dtype:
                raise ConfigError(
                    "The devices differ in what --dtype auto means; name one dtype. Received: "
                    f"{self.info.device}: {self.info.dtype}, {info.device}: {info.dtype}"
                )
            self.info = info
            for note in info.notes:
                if note not in self._said:
                    self._said.add(note)
                    self._crew.progress.note(note)
        group.take_load(answers)
        self._crew.show(group, "loaded")
        self.hand_tokens(group)
