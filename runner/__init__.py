"""Reads a test set, predicts every row on many devices and writes a validated submission.

    from runner import RunConfig, run

    report = run(RunConfig(preset="gemma2", head_kernel="k.npy", head_bias="b.npy", input="a.csv"))

Importing it loads nothing else: names are loaded on first use, since workers import it too.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.api import run
    from runner.common.errors import (
        ArenaRunnerError,
        ConfigError,
        DataError,
        DeadlineError,
        DeviceMemoryError,
        JournalError,
        MergeError,
        WorkerError,
    )
    from runner.config.run_config import RunConfig

__version__ = "0.1.0"
__all__ = [
    "ArenaRunnerError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DeviceMemoryError",
    "JournalError",
    "MergeError",
    "RunConfig",
    "WorkerError",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"run": "api", "RunConfig": "config.run_config"}.get(name, "common.errors")
    return getattr(importlib.import_module(f"runner.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
