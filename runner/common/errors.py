"""The ways a run can fail.

    ArenaRunnerError
    |-- ConfigError    a flag or a file of flags is wrong                           exit code 2
    |-- DataError      a test set, preset, LoRA or head file is wrong               exit code 2
    |-- WorkerError    a worker failed at work that the input does not explain      exit code 1
    |   `-- DeviceMemoryError    a batch does not fit; survived by a smaller one
    |-- JournalError   rows that are done cannot be kept, the disk is full say      exit code 1
    |-- DeadlineError  the time limit came, and --on-deadline is fail               exit code 3
    `-- MergeError     the results do not make a complete and sound submission      exit code 1

The first two are the person's to mend: their message is one or two lines and no traceback.
"""

import re
from collections.abc import Sequence

# Exit codes beside 0.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DEADLINE, EXIT_INTERRUPTED = 1, 2, 3, 130
# The name of a thread inside native code, which nothing interrupts: a process that has one would
# not end by itself.
BUSY_THREAD = "replica"
# Of a message on the screen; only what it quotes can make it longer.
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
    """Rows that are done cannot be kept; the message names where those before are safe."""


class DeadlineError(ArenaRunnerError):
    """The time limit came before the rows were done."""


class MergeError(ArenaRunnerError):
    """Rows are missing, repeated or not probabilities."""


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's text, to be part of a message of ours.

    Keras puts a line about the layer before it and colours around it.
    """
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).strip().splitlines()
    if lines and lines[0].startswith("Exception encountered when calling"):
        lines = [line for line in lines[1:] if line.strip()]
    return lines[0] if lines else ""


def shown(value: object, most: int = 60) -> str:
    """Return a value of a file to be quoted in a message, its first `most` characters."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= most else text[:most] + "..."
    return repr(cut) if isinstance(value, str) else cut


def on_one_line(error: object) -> str:
    """Return a message with the line ends and control characters of what it quotes escaped, so
    that a file cannot write more lines, or colours, than the message has."""
    text = str(error)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def list_ids(ids: Sequence[str], rows: Sequence[int]) -> str:
    """Name rows by their ids, the first five of them: `id a, b, ...`."""
    named = ", ".join(on_one_line(ids[row]) for row in rows[:5])
    return f"id {named}{', ...' if len(rows) > 5 else ''}"
