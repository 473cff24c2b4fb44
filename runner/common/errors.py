"""The ways a run can fail.

    ArenaRunnerError
    |-- ConfigError    a flag or a config file is wrong                             exit code 2
    |-- DataError      a test set, preset, LoRA or head file is wrong               exit code 2
    |-- WorkerError    a worker failed, and the input does not explain it           exit code 1
    |   `-- DeviceMemoryError    a batch does not fit; it is retried in smaller ones
    |-- JournalError   finished rows cannot be saved, for example on a full disk    exit code 1
    |-- DeadlineError  the time limit was reached, and --on-deadline is fail        exit code 3
    `-- MergeError     the results do not make a complete, valid submission         exit code 1

The user can fix the first two: their message is one or two lines, without a traceback.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Exit codes other than 0.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DEADLINE, EXIT_INTERRUPTED = 1, 2, 3, 130
# The name of a thread that may be in native code, which nothing can interrupt. A process with such
# a thread does not exit by itself.
BUSY_THREAD = "replica"
# Messages on the screen are truncated to this length; only quoted text makes one longer.
MOST_CHARACTERS = 1500


class ArenaRunnerError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ArenaRunnerError):
    """A flag, or a value in a config file, cannot be used."""


class DataError(ArenaRunnerError):
    """An input file cannot be used."""


class WorkerError(ArenaRunnerError):
    """A worker died or failed; the message names the replica, the batch and its rows."""


class DeviceMemoryError(WorkerError):
    """A device has no room for a batch."""


class JournalError(ArenaRunnerError):
    """Finished rows cannot be saved; the message says where the earlier ones are safe."""


class DeadlineError(ArenaRunnerError):
    """The time limit was reached before all rows were done."""


class MergeError(ArenaRunnerError):
    """Rows are missing, repeated or not probabilities."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, to quote in a message.

    Keras puts a line about the layer before it, and ANSI colours around it; both are removed.
    """
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines()
    if lines and lines[0].startswith("Exception encountered when calling"):
        lines = [line for line in lines[1:] if line.strip()]
    return lines[0] if lines else ""


@contextmanager
def readable(path: object, part: str = "") -> Iterator[None]:
    """Turn any error inside the block into a DataError that says the file at `path` is damaged.

    Catches Exception, since h5py has no narrower class for damaged files.

    Args:
        part: which part of the file cannot be read, such as `layers/x cannot be read: `.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} is damaged or truncated: {part}{first_line(error)}. Copy it again from its "
            "source."
        ) from error


def shown(value: object, most: int = 60) -> str:
    """Return a file's value as a message quotes it, truncated to `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= most else text[:most] + "..."
    return repr(cut) if isinstance(value, str) else cut


def on_one_line(error: object) -> str:
    """Return a message as one line of at most `MOST_CHARACTERS`, control characters escaped, so
    that text quoted from a file cannot add lines or colours."""
    text = str(error)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def list_ids(ids: Sequence[str], rows: Sequence[int]) -> str:
    """Return the ids of the first five rows: `id a, b, ...`."""
    named = ", ".join(on_one_line(ids[row]) for row in rows[:5])
    return f"id {named}{', ...' if len(rows) > 5 else ''}"
