"""A run in the caller's process: a script, one of its threads, or a notebook kernel.

Does what the command does, then restores the process: signal handlers, environment, warning
filters, modules. Does not know the phases of a run.
"""

import faulthandler
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runner.common.errors import ConfigError
from runner.config.run_config import RunConfig

# A process has one Ray, one set of devices and one standard error.
_one_at_a_time = threading.Lock()


def run(config: RunConfig) -> dict[str, Any]:
    """Do what `config` asks for and return the run's report, or with `plan=True` the plan.

    Prints what the command prints, and writes the same files. It may be called again, from any
    thread; Ray is shut down before it returns. If the time limit passes while the run hangs in a
    call that does not return, the submission is written and the process is ended.

    Raises:
        ConfigError, DataError: a value or an input is wrong; nothing was written.
        DeadlineError: the time limit passed and `on_deadline` is "fail"; the journal is kept.
        WorkerError, MergeError, JournalError: the run failed; the message says which rows are safe
            in the journal, and names the log.
        KeyboardInterrupt: interrupted; finished rows are in the journal, and the same call resumes.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "run needs a RunConfig, such as run(RunConfig(input='test.csv')). Received: "
            f"{type(config).__name__}"
        )
    if not _one_at_a_time.acquire(blocking=False):
        raise ConfigError(
            "A run is already in progress in this process: wait for it, or use another process."
        )
    try:
        _check_process(config)
        with _process_restored() as restore_signals:
            if config.plan:
                from runner.planner.command import plan

                return plan(config)
            from runner.driver import run as driver

            return driver.run(config, on_signals_taken=restore_signals)
    finally:
        _one_at_a_time.release()


def _check_process(config: RunConfig) -> None:
    """Raise ConfigError if what this process has already loaded prevents the run."""
    if config.plan:
        return
    if config.mode != "single":
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            raise ConfigError(
                f"--mode {config.mode} starts its own Ray, and this process is already using Ray: "
                "call ray.shutdown() first, or use another process."
            )
        return
    keras = sys.modules.get("keras")
    backend = keras.backend.backend() if keras is not None else "jax"
    if backend != "jax":
        raise ConfigError(
            "--mode single runs in this process and needs Keras on JAX: set KERAS_BACKEND=jax "
            f"before Keras is imported, or use another mode. Received: Keras on {backend}"
        )


@contextmanager
def _process_restored() -> Iterator[Callable[[], None]]:
    """Restore the process afterwards; yields a function that restores its signal handlers."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment, shows_faults = dict(os.environ), faulthandler.is_enabled()
    blocked = _blocked_modules()

    def restore_signals() -> None:
        for number, handler in handlers.items():
            if in_main and handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    try:
        with warnings.catch_warnings():
            yield restore_signals
    finally:
        restore_signals()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for name in _blocked_modules() - blocked:
            del sys.modules[name]  # blocked while Keras was imported
        if not shows_faults:
            faulthandler.disable()


def _blocked_modules() -> set[str]:
    return {name for name, module in sys.modules.items() if module is None}
