"""A function -> a Future of its result, from a daemon thread; the environment for a new Python."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import runner

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` in a daemon thread; return a Future of its result or error."""
    future: Future[T] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True, name=name).start()
    return future


def python_environment() -> dict[str, str]:
    """Return the environment in which a new Python process can import this package."""
    root = str(Path(runner.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
