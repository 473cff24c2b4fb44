"""A run in somebody else's process: a script, a thread of it, the kernel of a notebook.

Does what the command does, and leaves the process as it was: signal handlers, environment, filters
of warnings, modules. Does not know the stages of a run.
"""

import faulthandler
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.common.errors import ConfigError
from runner.config.run_config import RunConfig

# Ray, devices and standard error are one a process.
_one_at_a_time = threading.Lock()


def run(config: RunConfig) -> dict[str, Any]:
    """Do what `config` asks for and return the run's report, or with `plan=True` the plan.

    What the command prints is printed, and the same files are written. May be called again, and
    from any thread; Ray is ended before it returns. One thing it cannot leave as it was: a time
    limit that comes while the run is inside something that does not return ends the process, once
    the submission is written.

    Raises:
        ConfigError, DataError: yours to mend; nothing was written.
        DeadlineError: the time is over and `on_deadline` is "fail"; the journal is kept.
        WorkerError, MergeError, JournalError: the run failed; the message says what is safe in the
            journal, and names the log.
        KeyboardInterrupt: interrupted; what is done is in the journal, the same call goes on.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "run needs a RunConfig, such as run(RunConfig(input='test.csv')). Received: "
            f"{type(config).__name__}"
        )
    if not _one_at_a_time.acquire(blocking=False):
        raise ConfigError(
            "A run is on in this process already; wait for it, or use another process."
        )
    try:
        _check_process(config)
        with _as_it_was() as give_signals_back:
            if config.plan:
                from runner.planner.command import plan

                return plan(config)
            from runner.driver import run as driver

            return driver.run(config, on_signals_taken=give_signals_back)
    finally:
        _one_at_a_time.release()


def _check_process(config: RunConfig) -> None:
    """Raise ConfigError where what this process has loaded already would be in the way."""
    if config.plan:
        return
    if config.mode != "single":
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            raise ConfigError(
                f"--mode {config.mode} starts a Ray of its own, and this process uses one already: "
                "call ray.shutdown() before, or take another process."
            )
        return
    keras = sys.modules.get("keras")
    backend = keras.backend.backend() if keras is not None else "jax"
    if backend != "jax":
        raise ConfigError(
            "--mode single runs in this process and needs Keras on JAX: set KERAS_BACKEND=jax "
            f"before Keras is imported, or take another mode. Received: Keras on {backend}"
        )


@contextmanager
def _as_it_was() -> Iterator[Any]:
    """Within, a run may change the process; yields what gives its signal handlers back."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment, shows_faults = dict(os.environ), faulthandler.is_enabled()
    halted = {name for name, module in sys.modules.items() if module is None}

    def give_signals_back() -> None:
        for number, handler in handlers.items():
            if in_main and handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    try:
        with warnings.catch_warnings():
            yield give_signals_back
    finally:
        give_signals_back()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for name in [name for name, module in sys.modules.items() if module is None]:
            if name not in halted:
                del sys.modules[name]  # kept out while Keras was imported
        if not shows_faults:
            faulthandler.disable()
