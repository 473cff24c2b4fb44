"""A path -> an SQLite file that one run holds: found, opened, made durable, renamed, explained.

Does not know what is in its tables (`journal.py`).

The lock is a POSIX lock, which ends when its process closes *any* descriptor of the file: while a
journal is held, nothing else in this process may open it, not even to read.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from runner.common.errors import ConfigError

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


class Unusable(Exception):
    """A journal cannot be gone on with; the text follows its name in a sentence."""


@contextmanager
def one_opens(folder: Path) -> Iterator[None]:
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


def check_file(path: Path, resume: str, held: set[Identity]) -> bool:
    """Return whether a file lies there, and leave alone what no run has written: a person may have
    named a wrong one.

    Raises:
        ConfigError: it is no journal, is held in this process, cannot be read, or is missing and
            `require`.
        Unusable: it cannot be opened without losing what lies beside it.
    """
    identity = identity_of(path)
    if identity is None:
        if resume == "require":
            raise ConfigError(
                "--resume require needs a journal to go on from. "
                f"Received: {path}, which is not there; --resume auto starts afresh"
            )
        if sidecars(path):
            raise Unusable("is gone, and what SQLite kept beside it is left")
        return False
    if identity in held:
        raise in_use(path)
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
            raise Unusable("is damaged (its beginning is gone)")  # SQLite would delete its -wal
        return True
    if not head.startswith(MAGIC[: len(head)]):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is no SQLite database"
        )
    own = head[APPLICATION_ID_AT:].startswith(APPLICATION_ID)
    if not own and len(head) == HEADER_BYTES and (sidecars(path) or _has_tables(path)):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is another program's database"
        )
    return True


def _has_tables(path: Path) -> bool:
    """Look into a database without so much as locking it; one that cannot be read has some."""
    connection = connect(path, "mode=ro&immutable=1")
    try:
        return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True
    finally:
        connection.close()


def connect(path: Path, how: str = "mode=rw") -> sqlite3.Connection:
    """Open a file that is there; reads and locks nothing yet."""
    name = quote(os.fsencode(os.path.abspath(path)))
    try:
        return sqlite3.connect(f"file:{name}?{how}", uri=True, isolation_level=None, timeout=0)
    except sqlite3.Error as error:
        raise ConfigError(f"--journal cannot be opened. Received: {path} ({error})") from None


def begin(connection: sqlite3.Connection) -> None:
    """Begin a transaction, and keep every other process out until the connection is closed or the
    process ends."""
    # Set before the first access, so that the -wal's index stays in memory: no -shm file, and
    # a lock that is held from one transaction to the next.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")


def make_durable(connection: sqlite3.Connection) -> None:
    """Let every commit wait for the disk, but write only to the end of the -wal for it."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def keep_aside(path: Path, connection: sqlite3.Connection | None) -> Path:
    """Rename a journal and what lies beside it to the first free name, and close it."""
    number = 1
    while os.path.lexists(aside := _beside(path, f".{number}")) or sidecars(aside):
        number += 1
    try:
        if connection is not None:
            # Of a damaged journal that may fail: what lies beside it then goes with it.
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                for file in sidecars(path):
                    file.unlink()
        for file in sidecars(path):
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
        close(connection)
    return aside


def sidecars(path: Path) -> list[Path]:
    """The files that SQLite has left beside a database."""
    return [file for suffix in SIDECARS if os.path.lexists(file := _beside(path, suffix))]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def identity_of(path: Path) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into: in use, trouble around the file, or damage in it."""
    try:
        yield
    except sqlite3.Error as error:
        if result_code(error) == sqlite3.SQLITE_BUSY:
            raise in_use(path) from None
        if result_code(error) in SURROUNDINGS:
            raise ConfigError(f"--journal cannot be used. Received: {path} ({error})") from None
        raise Unusable(f"is damaged ({error})") from None


def result_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; Python's own complaints, as of text that is no UTF-8, lack
    one."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"Another run uses this journal. Received: --journal {path}; wait for that run to end, or "
        "name another --journal FILE"
    )
