"""Rows that are done -> an SQLite file beside the output, from which a killed run goes on.

A row counts as done when `Journal.add` has returned: it is on the disk then, and neither SIGKILL
nor a power cut takes it back. One run at a time holds a journal. Knows no batches and not what
decides an answer: a fingerprint says whether the rows of an earlier run are this run's too.

The lock is a POSIX lock, which ends when its process closes *any* descriptor of the file: while a
journal is held, nothing else in this process may open it, not even to read.
"""

import fcntl
import json
import os
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar
from urllib.parse import quote

import numpy as np

from runner.common.errors import ConfigError, JournalError
from runner.common.files import check_writable
from runner.results.fingerprint import Fingerprint
from runner.results.table import unsound

SCHEMA = 1
TABLES = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE rows (
        row INTEGER PRIMARY KEY, id TEXT NOT NULL, probabilities BLOB NOT NULL, how TEXT NOT NULL,
        worker TEXT NOT NULL, length INTEGER NOT NULL, finished_at REAL NOT NULL,
        crc32 INTEGER NOT NULL
    )
"""
LITTLE_ENDIAN_FLOAT32 = np.dtype("<f4")
# The first bytes of an SQLite file, and those that tell a journal from other programs' databases:
# https://www.sqlite.org/fileformat.html#the_database_header
MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
APPLICATION_ID = b"AREN"
APPLICATION_ID_AT = 68
SIDECARS = ("-wal", "-journal", "-shm")
# What SQLite reports of the disk or the file system, not of the journal's content.
SURROUNDINGS = frozenset(
    (
        *(sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
    )
)

# Device and inode of a file: what it is, however it is named.
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Done:
    """The rows of a journal, by row: rows and lengths int64 (n,), probabilities float32
    (n, classes), and how each was made."""

    rows: np.ndarray
    probabilities: np.ndarray
    how: tuple[str, ...]
    lengths: np.ndarray


class Journal:
    """The open journal of one run.

    Attributes:
        notes: sentences for the person on what became of a journal that was there.
    """

    # The files that journals of this process hold; see the module on its lock.
    _held: ClassVar[set[Identity]] = set()

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        *,
        ids: Sequence[str],
        classes: int,
        head: str,
        rows: set[int],
        notes: tuple[str, ...],
    ) -> None:
        self.notes = notes
        self._head = head
        self._path = path
        self._connection = connection
        self._ids = ids
        self._classes = classes
        self._rows = rows
        self._identity = _identity(path)
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
        """Go on with the journal at `path`, or start one there.

        Args:
            classes: numbers a row. head: of `task.HEADS`, what they must be.
            resume: `auto` goes on where the fingerprint agrees and every row is sound, and starts
                afresh where not; `require` goes on or raises; `never` starts afresh. A journal
                that is not gone on with is renamed to the first free of `<name>.1`, `<name>.2`.

        Raises:
            ConfigError: another run holds it, it is no journal, it cannot be made or read, or
                `require` and it cannot be gone on with; nothing was changed then.
        """
        check_writable("--journal", path)
        if path.is_symlink():
            path = path.resolve()  # SQLite lays its -wal beside the file itself
        with _one_opens(path.parent):
            connection, rows, notes = _open(
                path, cls._held, fingerprint, ids, classes, head, resume
            )
        return cls(path, connection, ids=ids, classes=classes, head=head, rows=rows, notes=notes)

    def __len__(self) -> int:
        """How many rows are in it."""
        return len(self._rows)

    def done(self) -> Done:
        """Return all rows so far.

        Raises:
            JournalError: the disk does not give back what was written.
        """
        try:
            return _read_rows(self._connection, self._ids, self._classes, self._head)
        except (_Unusable, sqlite3.Error) as error:
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
        """Keep rows with their probabilities, float32 (len(rows), classes): durably, once this
        returns. A row that is there already is replaced.

        Args:
            how: a word on how the rows were made. lengths: the tokens that each was made from.

        Raises:
            JournalError: they cannot be kept; says where the rows before them are safe.
        """
        entries = self._entries(rows, probabilities, how, worker, lengths)
        try:
            # One transaction, undone by whatever comes between, an interrupt too.
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entries
                )
        except sqlite3.Error as error:
            if not self._is_gone():
                full = _code(error) == sqlite3.SQLITE_FULL
                raise JournalError(
                    f"The journal cannot be written: {error}. "
                    f"{len(self._rows):,} of {len(self._ids):,} rows are safe in {self._path}; the "
                    "same command with --resume auto goes on from there once "
                    f"{'there is room' if full else 'it can be written'}."
                ) from error
        else:
            self._rows.update(entry[0] for entry in entries)
        self.check()

    def check(self) -> None:
        """Make sure that what is done is where it should be.

        Raises:
            JournalError: it is not; names the copy that was saved.
        """
        if self._is_gone():
            self._rescue()

    def close(self, *, keep_empty: bool = True) -> None:
        """Leave one file and no -wal beside it, for the next run to go on from.

        Args:
            keep_empty: whether the file stays where no row is in it.
        """
        if self._identity is not None:
            self._held.discard(self._identity)
        if self._rows or keep_empty or self._is_gone():
            # Its last connection carries the -wal over into the file, and leaves it where it
            # cannot.
            self._connection.close()
        else:
            with _one_opens(self._path.parent):
                self._connection.close()
                self._path.unlink(missing_ok=True)
        self._identity = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _entries(
        self,
        rows: Sequence[int],
        probabilities: np.ndarray,
        how: str,
        worker: str,
        lengths: Sequence[int],
    ) -> list[tuple[int, str, bytes, str, str, int, float, int]]:
        if probabilities.shape != (len(rows), self._classes) or len(lengths) != len(rows):
            raise JournalError(
                f"This is a bug: {len(rows)} rows need probabilities of shape "
                f"{(len(rows), self._classes)} and a length each. "
                f"Received: {probabilities.shape} and {len(lengths)} lengths"
            )
        if (wrong := unsound(probabilities, self._head)).any():
            row = int(rows[int(wrong.argmax())])
            raise JournalError(
                f"This is a bug: a row without probabilities is not done. Received: row {row} "
                f"(id {self._ids[row]})"
            )
        now, entries = time.time(), []
        for row, values, length in zip(rows, probabilities, lengths, strict=True):
            row, length = int(row), int(length)
            blob = np.asarray(values, dtype=LITTLE_ENDIAN_FLOAT32).tobytes()
            crc = _crc(self._ids[row], how, length, blob)
            entries.append((row, self._ids[row], blob, how, worker, length, now, crc))
        return entries

    def _is_gone(self) -> bool:
        """Whether the path no longer leads to the open file: what is written would be lost."""
        identity = _identity(self._path)
        return identity is None or identity != self._identity

    def _rescue(self) -> None:
        rows = f"all {len(self._rows):,} rows that are done"
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


class _Unusable(Exception):
    """A journal cannot be gone on with; the text follows its name in a sentence."""


@contextmanager
def _one_opens(folder: Path) -> Iterator[None]:
    """Let runs that start together look at a journal, move it and make it one after the other.

    By a lock on the folder, which leaves no file behind. The journal's own lock cannot do it: it
    is on a file that may be about to be renamed, or is not there yet.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield  # a folder that may not be listed: runs that start together may disturb each other
        return
    try:
        with suppress(OSError):  # so may they on a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open(
    path: Path,
    held: set[Identity],
    fingerprint: Fingerprint,
    ids: Sequence[str],
    classes: int,
    head: str,
    resume: str,
) -> tuple[sqlite3.Connection, set[int], tuple[str, ...]]:
    """Return what `Journal.open` needs: the open database, its rows, and notes."""
    connection = None
    notes: tuple[str, ...] = ()
    try:
        if _check_file(path, resume, held):
            connection = _connect(path)
            rows = _take_up(connection, path, fingerprint, ids, classes, head, resume)
            notes = (f"resuming {path}: {len(rows):,} of {len(ids):,} rows are done",)
            return connection, rows, notes
    except _Unusable as why:
        if resume == "require":
            _close(connection)
            raise ConfigError(
                f"--resume require cannot go on: {path} {why}. "
                "--resume auto keeps it aside and starts afresh"
            ) from None
        notes = (f"{path} {why}: kept as {_keep_aside(path, connection)}, starting afresh",)
    except BaseException:
        _close(connection)
        raise
    return _create(path, fingerprint, ids, classes), set(), notes


def _take_up(
    connection: sqlite3.Connection,
    path: Path,
    fingerprint: Fingerprint,
    ids: Sequence[str],
    classes: int,
    head: str,
    resume: str,
) -> set[int]:
    """Hold a journal that is there and return its rows.

    Raises:
        ConfigError: another run holds it, or the disk does not let it be read.
        _Unusable: it is damaged or another run's, or is not to be gone on with.
    """
    with _explained(path):
        _begin(connection)
        connection.execute("ROLLBACK")  # COMMIT would make an empty file a database
        if resume == "never":
            raise _Unusable("is not gone on with (--resume never)")
        _check_meta(connection, fingerprint, ids, classes)
        done = _read_rows(connection, ids, classes, head)
        _make_durable(connection)
    for file in (path, *_sidecars(path)):
        with suppress(OSError):  # as a person has copied them; another's file stays as it is
            os.chmod(file, 0o600)
    return {int(row) for row in done.rows}


def _check_file(path: Path, resume: str, held: set[Identity]) -> bool:
    """Return whether a file lies there, and leave alone what no run has written: a person may have
    named a wrong one.

    Raises:
        ConfigError: it is no journal, is held in this process, cannot be read, or is missing and
            `require`.
        _Unusable: it cannot be opened without losing what lies beside it.
    """
    identity = _identity(path)
    if identity is None:
        if resume == "require":
            raise ConfigError(
                "--resume require needs a journal to go on from. "
                f"Received: {path}, which is not there; --resume auto starts afresh"
            )
        if _sidecars(path):
            raise _Unusable("is gone, and what SQLite kept beside it is left")
        return False
    if identity in held:
        raise _in_use(path)
    if not path.is_file():
        raise ConfigError(f"--journal must name a file. Received: {path}")
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise ConfigError(
            f"--journal must be a file that can be read. Received: {path} ({error.strerror})"
        ) from None
    if not head.strip(b"\0"):
        # Nothing was ever written, or the power went before it was.
        if os.path.lexists(_beside(path, "-wal")):
            raise _Unusable("is damaged (its beginning is gone)")  # SQLite would delete its -wal
        return True
    if not head.startswith(MAGIC[: len(head)]):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is no SQLite database"
        )
    own = head[APPLICATION_ID_AT:].startswith(APPLICATION_ID)
    if not own and len(head) == HEADER_BYTES and (_sidecars(path) or _has_tables(path)):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is another program's database"
        )
    return True


def _has_tables(path: Path) -> bool:
    """Look into a database without so much as locking it; one that cannot be read has some."""
    connection = _connect(path, "mode=ro&immutable=1")
    try:
        return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True
    finally:
        connection.close()


def _connect(path: Path, how: str = "mode=rw") -> sqlite3.Connection:
    """Open a file that is there; reads and locks nothing yet."""
    name = quote(os.fsencode(os.path.abspath(path)))
    try:
        return sqlite3.connect(f"file:{name}?{how}", uri=True, isolation_level=None, timeout=0)
    except sqlite3.Error as error:
        raise ConfigError(f"--journal cannot be opened. Received: {path} ({error})") from None


def _begin(connection: sqlite3.Connection) -> None:
    """Begin a transaction, and keep every other process out until the connection is closed or the
    process ends."""
    # Set before the first access, so that the -wal's index stays in memory: no -shm file, and
    # a lock that is held from one transaction to the next.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")


def _make_durable(connection: sqlite3.Connection) -> None:
    """Let every commit wait for the disk, but write only to the end of the -wal for it."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _check_meta(
    connection: sqlite3.Connection, fingerprint: Fingerprint, ids: Sequence[str], classes: int
) -> None:
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not names:
        raise _Unusable("is half-written (it has no tables)")
    fault = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if fault != "ok":
        raise _Unusable(f"is damaged ({' '.join(fault.split())})")
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("schema") != str(SCHEMA):
        raise _Unusable(f"is damaged (its schema is {meta.get('schema')}, not {SCHEMA})")
    try:
        parts = json.loads(meta["fingerprint"])
        counts = int(meta["rows"]), int(meta["classes"])
        different = fingerprint.differences(parts)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise _Unusable("is damaged (it does not say of which run it is)") from None
    if different:
        raise _Unusable(f"is of another run ({'; '.join(different)})")
    if counts != (len(ids), classes):
        raise _Unusable(f"is damaged (it counts {counts[0]} rows of {counts[1]} classes)")


def _read_rows(connection: sqlite3.Connection, ids: Sequence[str], classes: int, head: str) -> Done:
    """Return every row after checking it.

    Raises:
        _Unusable: a row is not as it was written.
    """
    found = connection.execute(
        "SELECT row, id, probabilities, how, length, crc32 FROM rows ORDER BY row"
    ).fetchall()
    size = classes * LITTLE_ENDIAN_FLOAT32.itemsize
    for row, row_id, blob, how, length, crc in found:
        if not 0 <= row < len(ids):
            raise _Unusable(f"is damaged (it has row {row} of {len(ids)})")
        if row_id != ids[row]:
            raise _Unusable(f"is damaged (row {row} is of id {row_id}, not {ids[row]})")
        if not isinstance(blob, bytes) or len(blob) != size:
            raise _Unusable(f"is damaged (row {row}, id {row_id}, is not of {classes} classes)")
        if crc != _crc(row_id, how, length, blob):
            raise _Unusable(f"is damaged (the checksum of row {row}, id {row_id}, does not agree)")
    blobs = b"".join(blob for _, _, blob, _, _, _ in found)
    probabilities = np.frombuffer(blobs, LITTLE_ENDIAN_FLOAT32).reshape(len(found), classes)
    if (wrong := unsound(probabilities, head)).any():
        row, row_id = found[int(wrong.argmax())][:2]
        raise _Unusable(f"is damaged (row {row}, id {row_id}, does not hold probabilities)")
    return Done(
        np.array([entry[0] for entry in found], dtype=np.int64),
        probabilities.astype(np.float32),
        tuple(entry[3] for entry in found),
        np.array([entry[4] for entry in found], dtype=np.int64),
    )


def _crc(row_id: str, how: str, length: int, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(f"{row_id}\0{how}\0{length}".encode()))


def _create(
    path: Path, fingerprint: Fingerprint, ids: Sequence[str], classes: int
) -> sqlite3.Connection:
    """Make a journal without rows, readable by its owner alone from its first byte on."""
    try:
        # SQLite gives the file that it finds, and its mode to the -wal.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise _in_use(path) from None
    except OSError as error:
        raise ConfigError(
            f"--journal cannot be made. Received: {path} ({error.strerror})"
        ) from None
    meta = {
        "schema": str(SCHEMA),
        "fingerprint": json.dumps(fingerprint.parts),
        "rows": str(len(ids)),
        "classes": str(classes),
        "created_at": str(time.time()),
    }
    connection = _connect(path)
    try:
        with _explained(path):
            _begin(connection)
            try:
                # All or nothing: what a kill leaves here is a file without tables.
                with connection:
                    number = int.from_bytes(APPLICATION_ID, "big")
                    connection.execute(f"PRAGMA application_id = {number}")
                    for statement in TABLES.split(";"):
                        connection.execute(statement)
                    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                _make_durable(connection)
            except BaseException:
                for file in (path, *_sidecars(path)):
                    file.unlink(missing_ok=True)
                raise
    except BaseException:
        connection.close()
        raise
    return connection


def _keep_aside(path: Path, connection: sqlite3.Connection | None) -> Path:
    """Rename a journal and what lies beside it to the first free name, and close it."""
    number = 1
    while os.path.lexists(aside := _beside(path, f".{number}")) or _sidecars(aside):
        number += 1
    try:
        if connection is not None:
            # Of a damaged journal that may fail: what lies beside it then goes with it.
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                for file in _sidecars(path):
                    file.unlink()
        for file in _sidecars(path):
            if file.stat().st_size == 0:
                file.unlink()
        for suffix in ("", *SIDECARS):
            if os.path.lexists(old := _beside(path, suffix)):
                os.rename(old, _beside(aside, suffix))
    except OSError as error:
        raise ConfigError(
            f"--journal cannot be kept aside as {aside}. Received: {path} ({error.strerror})"
        ) from None
    finally:
        # Only now: SQLite sees that its file has moved, and touches nothing.
        _close(connection)
    return aside


def _sidecars(path: Path) -> list[Path]:
    """The files that SQLite has left beside a database."""
    return [file for suffix in SIDECARS if os.path.lexists(file := _beside(path, suffix))]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _identity(path: Path) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into: in use, trouble around the file, or damage in it."""
    try:
        yield
    except sqlite3.Error as error:
        if _code(error) == sqlite3.SQLITE_BUSY:
            raise _in_use(path) from None
        if _code(error) in SURROUNDINGS:
            raise ConfigError(f"--journal cannot be used. Received: {path} ({error})") from None
        raise _Unusable(f"is damaged ({error})") from None


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; Python's own complaints, as of text that is no UTF-8, lack
    one."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"Another run uses this journal. Received: --journal {path}; wait for that run to end, or "
        "name another --journal FILE"
    )
