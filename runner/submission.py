"""A checked table -> a file that appears whole: written aside, flushed, renamed."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from runner.errors import ConfigError

LABEL_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")


def check_writable(flag: str, path: Path) -> None:
    """Try the folder of an output file before the work, leaving nothing behind.

    Raises:
        ConfigError: the folder is missing or takes no file, or the path is itself a folder.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise ConfigError(f"{flag} must name a file. Received: {path}, a folder")
    if not folder.is_dir():
        raise ConfigError(f"{flag} must lie in a folder that exists. Received: {path}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} must lie in a folder that can be written to. Received: {path} "
            f"({error.strerror or error})"
        ) from None


def write_submission(path: Path, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Write `id` and one column a class, in the order given.

    Args:
        probabilities: (rows, classes), as many classes as `LABEL_COLUMNS`.
    """
    table = pd.DataFrame(probabilities, columns=list(LABEL_COLUMNS))
    table.insert(0, "id", pd.Series(ids, dtype=object))
    write_whole(path, table.to_csv(index=False, lineterminator="\n"))


def rehearse(path: Path, ids: Sequence[str]) -> float:
    """Write a table of this size beside an output file and remove it; return the seconds it took.

    Raises:
        ConfigError: there is no room for it.
    """
    started = time.monotonic()
    rehearsal = path.with_name(f".{path.name}.{os.getpid()}.rehearsal")
    # As long as probabilities come out: 0.3333333333333333.
    values = np.full((len(ids), len(LABEL_COLUMNS)), 1 / 3)
    try:
        write_submission(rehearsal, ids, values)
    except OSError as error:
        raise ConfigError(
            f"--output needs room for {len(ids):,} rows in {path.resolve().parent}. "
            f"Received: {error.strerror or error}"
        ) from None
    finally:
        rehearsal.unlink(missing_ok=True)
    return time.monotonic() - started


def write_whole(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file so that whoever looks sees the old one or all of the new one.

    Args:
        private: its owner alone may read it, from its first byte on.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # Of a process that was killed and had this number: its mode is not to be inherited.
    aside.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(aside, flags, 0o600 if private else 0o666)
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
