"""Finished rows -> an SQLite file beside the output, from which a killed run resumes.

A row is done once `Journal.add` has returned: it is on the disk then, and survives SIGKILL and a
power cut. Only one run at a time can hold a journal. Does not know batches, or what determines an
answer: a fingerprint says whether an earlier run's rows are valid for this one. `journal_file.py`
has the file and its lock, `journal_rows.py` the tables.
"""

import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np

from runner.common.errors import ConfigError, JournalError
from runner.common.files import check_writable
from runner.results.fingerprint import Fingerprint
from runner.results.journal_file import (
    APPLICATION_ID,
    Identity,
    Unusable,
    begin,
    check_file,
    close,
    connect,
    explained,
    identity_of,
    in_use,
    keep_aside,
    make_durable,
    one_opens,
    result_code,
    sidecars,
)
from runner.results.journal_rows import (
    LITTLE_ENDIAN_FLOAT32,
    SCHEMA,
    TABLES,
    Done,
    Owner,
    check_meta,
    checksum,
    read_rows,
)
from runner.results.table import unsound


class Journal:
    """The open journal of one run.

    Attributes:
        notes: sentences for the user about what was done with an earlier journal.
    """

    # The files that this process holds; `journal_file.py` explains the lock.
    _held: ClassVar[set[Identity]] = set()

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        run: Owner,
        rows: set[int],
        notes: tuple[str, ...],
    ) -> None:
        self.notes = notes
        self._path = path
        self._connection = connection
        self._run = run
        self._rows = rows
        self._identity = identity_of(path)
        if self._identity is not None:
            self._held.add(self._identity)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        fingerprint: Fingerprint,
        ids: Sequence[str],
        classes: int,
        resume: str,
        head: str = "softmax",
    ) -> "Journal":
        """Resume the journal at `path`, or create one there.

        Args:
            classes: numbers per row. head: one of `task.HEADS`, which decides what is valid.
            resume: `auto` resumes if the fingerprint agrees and every row is valid, and otherwise
                starts afresh; `require` resumes or raises; `never` starts afresh. A journal that
                is not resumed is renamed to the first free one of `<name>.1`, `<name>.2`, ...

        Raises:
            ConfigError: another run holds it, it is not a journal, it cannot be created or read,
                or `require` cannot resume it. Nothing was changed then.
        """
        check_writable("--journal", path)
        if path.is_symlink():
            path = path.resolve()  # SQLite puts its -wal beside the file itself
        run = Owner(fingerprint, ids, classes, head)
        with one_opens(path.parent):
            connection, rows, notes = _open(path, cls._held, run, resume)
        return cls(path, connection, run, rows, notes)

    def __len__(self) -> int:
        """Return the number of rows in it."""
        return len(self._rows)

    def done(self) -> Done:
        """Return all rows so far.

        Raises:
            JournalError: it cannot be read, or a row differs from what was written.
        """
        try:
            return read_rows(self._connection, self._run)
        except (Unusable, sqlite3.Error) as error:
            raise JournalError(f"The journal {self._path} cannot be read: {error}.") from error

    def add(
        self,
        rows: Sequence[int],
        probabilities: np.ndarray,
        *,
        how: str,
        worker: str,
        lengths: Sequence[int],
    ) -> None:
        """Save rows durably with their probabilities, float32 (len(rows), classes).

        Rows that are already there are replaced.

        Args:
            how: how the rows were made, a word of `table.py`. worker: who made them, in words.
            lengths: tokens of each row.

        Raises:
            JournalError: they cannot be saved; says where the earlier rows are safe.
        """
        entries = self._entries(rows, probabilities, how, worker, lengths)
        try:
            # One transaction: any error rolls it back, even an interrupt.
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entries
                )
        except sqlite3.Error as error:
            if not self._is_gone():
                full = result_code(error) == sqlite3.SQLITE_FULL
                raise JournalError(
                    f"The journal cannot be written: {error}. "
                    f"{len(self._rows):,} of {len(self._run.ids):,} rows are safe in "
                    f"{self._path}; the same command with --resume auto goes on from there once "
                    f"{'there is room' if full else 'it can be written'}."
                ) from error
        else:
            self._rows.update(entry[0] for entry in entries)
        self.check()

    def check(self) -> None:
        """Check that the journal's file is still in its place.

        Raises:
            JournalError: it is not; names a copy that was saved.
        """
        if self._is_gone():
            self._rescue()

    def close(self, *, keep_empty: bool = True) -> None:
        """Close the journal, leaving one file without a -wal, from which the next run can resume.

        Args:
            keep_empty: whether a journal without rows is kept.
        """
        if self._identity is not None:
            self._held.discard(self._identity)
        if self._rows or keep_empty or self._is_gone():
            # SQLite merges the -wal into the file, or keeps it if it cannot.
            self._connection.close()
        else:
            with one_opens(self._path.parent):
                self._connection.close()
                self._path.unlink(missing_ok=True)
        self._identity = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _entries(
        self,
        rows: Sequence[int],
        probabilities: np.ndarray,
        how: str,
        worker: str,
        lengths: Sequence[int],
    ) -> list[tuple[int, str, bytes, str, str, int, float, int]]:
        ids, expected = self._run.ids, (len(rows), self._run.classes)
        if probabilities.shape != expected or len(lengths) != len(rows):
            raise JournalError(
                f"This is a bug: {len(rows)} rows need probabilities of shape {expected} and a "
                f"length each. Received: {probabilities.shape} and {len(lengths)} lengths"
            )
        if (wrong := unsound(probabilities, self._run.head)).any():
            row = int(rows[int(wrong.argmax())])
            raise JournalError(
                f"This is a bug: a finished row needs probabilities. Received: row {row} "
                f"(id {ids[row]})"
            )
        now, entries = time.time(), []
        for row, values, length in zip(
            map(int, rows), probabilities, map(int, lengths), strict=True
        ):
            blob = np.asarray(values, dtype=LITTLE_ENDIAN_FLOAT32).tobytes()
            crc = checksum(ids[row], how, length, blob)
            entries.append((row, ids[row], blob, how, worker, length, now, crc))
        return entries

    def _is_gone(self) -> bool:
        """Return whether the path no longer leads to the open file; writes would be lost."""
        identity = identity_of(self._path)
        return identity is None or identity != self._identity

    def _rescue(self) -> None:
        rows = f"all {len(self._rows):,} finished rows"
        fact = f"The journal {self._path} is no longer there: it was moved or removed"
        try:
            descriptor, name = tempfile.mkstemp(prefix="arena-runner-", suffix=".journal")
            try:
                self._connection.execute("VACUUM INTO ?", (name,))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{fact}, and {rows} could not be saved: {error}.") from error
        raise JournalError(
            f"{fact}. A copy of {rows} is safe in {name}; the same command with --journal {name} "
            "goes on from there."
        )


def _open(
    path: Path, held: set[Identity], run: Owner, resume: str
) -> tuple[sqlite3.Connection, set[int], tuple[str, ...]]:
    """Return what `Journal.open` needs: the open database, its rows, and notes."""
    connection = None
    notes: tuple[str, ...] = ()
    try:
        if check_file(path, resume, held):
            connection = connect(path)
            rows = _resume(connection, path, run, resume)
            notes = (f"resuming {path}: {len(rows):,} of {len(run.ids):,} rows are done",)
            return connection, rows, notes
    except Unusable as why:
        if resume == "require":
            close(connection)
            raise ConfigError(
                f"--resume require cannot go on: {path} {why}. "
                "--resume auto renames it and starts afresh"
            ) from None
        notes = (f"{path} {why}: kept as {keep_aside(path, connection)}, starting afresh",)
    except BaseException:
        close(connection)
        raise
    return _create(path, run), set(), notes


def _resume(connection: sqlite3.Connection, path: Path, run: Owner, resume: str) -> set[int]:
    """Lock an existing journal and return its rows.

    Raises:
        ConfigError: another run holds it, or it cannot be read.
        Unusable: it is damaged, belongs to another run, or `resume` is `never`.
    """
    with explained(path):
        begin(connection)
        connection.execute("ROLLBACK")  # COMMIT would make an empty file a database
        if resume == "never":
            raise Unusable("is not resumed (--resume never)")
        check_meta(connection, run)
        done = read_rows(connection, run)
        make_durable(connection)
    for file in (path, *sidecars(path)):
        with suppress(OSError):  # a copied file may have any mode; another owner's keeps it
            os.chmod(file, 0o600)
    return {int(row) for row in done.rows}


def _create(path: Path, run: Owner) -> sqlite3.Connection:
    """Create a journal without rows that only its owner can read."""
    try:
        # Created here, since SQLite keeps the mode of an existing file and copies it to the -wal.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise in_use(path) from None
    except OSError as error:
        raise ConfigError(
            f"--journal cannot be created. Received: {path} ({error.strerror})"
        ) from None
    meta = {
        "schema": str(SCHEMA),
        "fingerprint": json.dumps(run.fingerprint.parts),
        "rows": str(len(run.ids)),
        "classes": str(run.classes),
        "created_at": str(time.time()),
    }
    connection = connect(path)
    try:
        with explained(path):
            begin(connection)
            try:
                # All or nothing: a kill in between leaves a file without tables.
                with connection:
                    number = int.from_bytes(APPLICATION_ID, "big")
                    connection.execute(f"PRAGMA application_id = {number}")
                    for statement in TABLES.split(";"):
                        connection.execute(statement)
                    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                make_durable(connection)
            except BaseException:
                for file in (path, *sidecars(path)):
                    file.unlink(missing_ok=True)
                raise
    except BaseException:
        connection.close()
        raise
    return connection
