"""A checked table -> a file that appears whole: written aside, flushed, renamed."""

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ConfigError
from runner.config.task import CONTEST, Task
from runner.data.formats import csv_text, format_of
from runner.results.table import table_dtype

# A file aside of a killed process: its name holds the process' number. One that nobody has written
# to for so many seconds is of no process on another machine either.
ASIDE = re.compile(r"\.(\d+)\.(?:partial|rehearsal)")
LEFT_AFTER_S = 120.0


def check_writable(flag: str, path: Path) -> None:
    """Try the folder of an output file before the work, leaving nothing behind, and remove what a
    killed process left there.

    Raises:
        ConfigError: the folder is missing or takes no file, or the path is itself a folder.
    """
    folder = path.resolve().parent
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise ConfigError(f"{flag} must name a file. Received: {path}, a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        # It would be replaced by a file: /dev/null, for one, by whoever may.
        raise ConfigError(f"{flag} must name a file. Received: {path}, a device or the like")
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag} must lie in a folder that exists. Received: {path}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".partial"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} must lie in a folder that can be written to. Received: {path} "
            f"({error.strerror or error})"
        ) from None
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what processes that are gone had written aside of an output file."""
    own = tuple(f"{dots}{path.stem}." for dots in (".", ".."))  # a rehearsal is written aside too
    with suppress(OSError):
        for entry in os.scandir(path.resolve().parent):
            number = ASIDE.search(entry.name)
            if (
                number is not None
                and entry.name.startswith(own)
                and time.time() - entry.stat().st_mtime > LEFT_AFTER_S
                and _is_gone(int(number[1]))
            ):
                os.unlink(entry.path)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def write_submission(
    path: Path,
    ids: Sequence[str],
    values: np.ndarray,
    *,
    task: Task = CONTEST,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write the ids, the columns that are copied, and one column a label or, without labels, the
    embeddings, in the order given and as the suffix says.

    Args:
        values: (rows, labels), or (rows, hidden).
        kept: as in `Examples.kept`.
    """
    kept, write = kept or {}, format_of(path)
    # Ids that are numbers stay numbers where the format has any.
    keys = ids if write is csv_text else kept.get(task.id_column, ids)
    copied = {name: kept[name] for name in task.keep_columns}
    write_whole(path, write({task.id_column: keys, **copied}, values, task.label_columns))


def rehearse(
    path: Path,
    ids: Sequence[str],
    *,
    task: Task = CONTEST,
    width: int = len(CONTEST.label_columns),
    kept: Mapping[str, Any] | None = None,
) -> float:
    """Write a table of this size beside an output file and remove it; return the seconds it took.

    Args:
        width: numbers a row. kept: as in `Examples.kept`.

    Raises:
        ConfigError: there is no room for it.
    """
    started = time.monotonic()
    rehearsal = path.with_name(f".{path.stem}.{os.getpid()}.rehearsal{path.suffix}")
    # As long as what comes out, and no easier to compress.
    values = np.random.default_rng(0).random((len(ids), width), dtype=table_dtype(task.head))
    try:
        write_submission(rehearsal, ids, values, task=task, kept=kept)
    except OSError as error:
        raise ConfigError(
            f"--output needs room for {len(ids):,} rows in {path.resolve().parent}. "
            f"Received: {error.strerror or error}"
        ) from None
    finally:
        rehearsal.unlink(missing_ok=True)
    return time.monotonic() - started


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> None:
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
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
