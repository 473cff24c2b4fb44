"""The ways a run can fail.

    ArenaRunnerError
    |-- ConfigError    a flag or a file of flags is wrong                           exit code 2
    |-- DataError      a test set, preset, LoRA or head file is wrong               exit code 2
    |-- WorkerError    a worker failed at work that the input does not explain      exit code 1
    `-- MergeError     the results do not make a complete and sound submission      exit code 1

The first two are the person's to mend: their message is one or two lines and no traceback.
"""


class ArenaRunnerError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ArenaRunnerError):
    """A flag, or a value in a config file, cannot be used."""


class DataError(ArenaRunnerError):
    """An input file cannot be used."""


class WorkerError(ArenaRunnerError):
    """A worker died or failed; the message names the replica, the batch and its rows."""


class MergeError(ArenaRunnerError):
    """Rows are missing, repeated or not probabilities."""
