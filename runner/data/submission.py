"""A validated table -> a submission file; and a rehearsal that checks early if there is room.

Does not know the formats, which are in `formats.py`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ConfigError
from runner.common.files import write_whole
from runner.config.suffixes import format_of
from runner.config.task import CONTEST, Task
from runner.data.formats import WRITERS, csv_text
from runner.results.table import table_dtype


def write_submission(
    path: Path,
    ids: Sequence[str],
    values: np.ndarray,
    *,
    task: Task = CONTEST,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write ids, copied columns, and a column for each label, or the embeddings.

    Rows keep their order; the suffix decides the format.

    Args:
        values: (rows, labels), or (rows, hidden).
        kept: as in `Examples.kept`.

    Raises:
        OSError: the file cannot be written.
    """
    kept, write = kept or {}, WRITERS[format_of(path)]
    # Numeric ids stay numbers if the format has number types.
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
        width: numbers per row. kept: as in `Examples.kept`.

    Raises:
        ConfigError: it cannot be written, for example on a full disk.
    """
    started = time.monotonic()
    rehearsal = path.with_name(f".{path.stem}.{os.getpid()}.rehearsal{path.suffix}")
    # As large as the real table, and no easier to compress.
    values = np.random.default_rng(0).random((len(ids), width), dtype=table_dtype(task.head))
    try:
        write_submission(rehearsal, ids, values, task=task, kept=kept)
    except OSError as error:
        raise ConfigError(
            f"--output needs space for {len(ids):,} rows in {path.resolve().parent}. "
            f"Received: {error.strerror or error}"
        ) from None
    finally:
        rehearsal.unlink(missing_ok=True)
    return time.monotonic() - started
