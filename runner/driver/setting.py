"""What stays the same during a run: config, files, clock, limit and logs.

Does not know answers or executors.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from runner.common.records import Examples
from runner.config.run_config import RunConfig
from runner.data.inputs import read_rows
from runner.data.submission import rehearse
from runner.driver.deadline import Deadline
from runner.preset.resolve import Job
from runner.results.table import Merger
from runner.telemetry.logs import RunLogs
from runner.telemetry.progress import Progress
from runner.telemetry.timeline import Timeline
from sharding.strategies import Strategy

# Phases of the run itself, as its page names them.
PHASES = {"read": "reading", "tokenize": "tokenizing", "merge": "merging and writing"}
# Keys of the report's `seconds`.
SECONDS = ("total", "read", "tokenize", "start_workers", "load", "compile", "predict", "merge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What one run needs in every phase.

    started: of the process, by `time.monotonic()`. seconds: of the phases that `timed` has seen.
    """

    config: RunConfig
    job: Job
    strategy: Strategy | None
    progress: Progress
    logs: RunLogs
    deadline: Deadline
    timeline: Timeline
    started: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))

    def now(self) -> float:
        """Return the seconds since the process started."""
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Return whether there is no time left to predict."""
        return self.deadline.is_over(self.now())

    def last_call(self, *, is_starting: bool = False) -> float | None:
        """Return when the guard ends the run, by `time.monotonic()`."""
        last_call_s = self.deadline.last_call_s(is_starting=is_starting)
        return None if last_call_s is None else self.started + last_call_s

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Within, count the seconds of a phase, a key of `seconds`."""
        began = time.monotonic()
        with self.timeline.phase(PHASES.get(name, name)):
            yield
        self.seconds[name] += time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Rows:
    """What to predict: the test set, the text of each row, and the table of answers."""

    examples: Examples
    texts: list[str]
    table: Merger


def read(setting: Setting) -> Rows:
    """Read the test set, render its texts, and check that there is room for the output.

    Raises:
        ConfigError: there is no room. DataError: the file is not a test set.
    """
    config, job = setting.config, setting.job
    width = job.width(config.task)
    with setting.timed("read"):
        examples, texts = read_rows(job.test_set, config)
        ids, kept = examples.ids, examples.kept
        setting.deadline.rehearsed(
            rehearse(config.output, ids, task=config.task, width=width, kept=kept)
        )
    return Rows(examples, texts, Merger(ids, width, config.task.head))
