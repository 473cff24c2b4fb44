"""A path -> an SQLite file that one run holds: found, opened, locked, made durable, renamed.

Does not know its tables, which are in `journal_rows.py`.

The lock is a POSIX lock, which ends when its process closes *any* descriptor of the file: while a
journal is held, nothing else in this process may open it, not even to read it.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from runner.common.errors import ConfigError

# The first bytes of an SQLite file, and those that distinguish a journal from other databases:
# https://www.sqlite.org/fileformat.html#the_database_header
MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
APPLICATION_ID = b"AREN"
APPLICATION_ID_AT = 68
SIDECARS = ("-wal", "-journal", "-shm")
# SQLite's result codes about the disk or the file system, rather than the journal's content.
SURROUNDINGS = frozenset(
    (
        *(sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
    )
)
# Device and inode of a file, which identify it under any name.
Identity = tuple[int, int]


class Unusable(Exception):
    """A journal cannot be resumed. The text continues a sentence that begins with its path."""


@contextmanager
def one_opens(folder: Path) -> Iterator[None]:
    """Within, no other run in this folder checks, renames or creates a journal.

    The lock is on the folder, so it leaves no file behind. The journal's own lock is not enough,
    since its file may be about to be renamed or not be there yet.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield  # the folder is not readable: runs that start together are not kept apart
        return
    try:
        with suppress(OSError):  # nor are they on a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_file(path: Path, resume: str, held: set[Identity]) -> bool:
    """Return whether there is a journal at `path`. Changes no file.

    Args:
        held: the journals that this process holds.

    Raises:
        ConfigError: it is not a journal, is in `held`, cannot be read, or is missing although
            `resume` is `require`.
        Unusable: opening it would destroy a -wal beside it.
    """
    identity = identity_of(path)
    if identity is None:
        if resume == "require":
            raise ConfigError(
                "--resume require needs a journal to go on from. "
                f"Received: {path}, which is not there; --resume auto starts afresh"
            )
        if sidecars(path):
            raise Unusable("is gone, but what SQLite kept beside it is still there")
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
        # Nothing was ever written, or a power cut came first.
        if os.path.lexists(_beside(path, "-wal")):
            raise Unusable("is damaged (its beginning is gone)")  # SQLite would delete its -wal
        return True
    if not head.startswith(MAGIC[: len(head)]):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is not an SQLite database"
        )
    own = head[APPLICATION_ID_AT:].startswith(APPLICATION_ID)
    if not own and len(head) == HEADER_BYTES and (sidecars(path) or _has_tables(path)):
        raise ConfigError(
            "--journal must name a journal of this program or a new file; nothing was changed. "
            f"Received: {path}, which is another program's database"
        )
    return True


def _has_tables(path: Path) -> bool:
    """Return whether a database has tables, without locking it; True if it cannot be read."""
    connection = connect(path, "mode=ro&immutable=1")
    try:
        return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.Error:
        return True
    finally:
        connection.close()


def connect(path: Path, how: str = "mode=rw") -> sqlite3.Connection:
    """Open an existing file, without reading or locking it yet.

    Raises:
        ConfigError: it cannot be opened.
    """
    name = quote(os.fsencode(os.path.abspath(path)))
    try:
        return sqlite3.connect(f"file:{name}?{how}", uri=True, isolation_level=None, timeout=0)
    except sqlite3.Error as error:
        raise ConfigError(f"--journal cannot be opened. Received: {path} ({error})") from None


def begin(connection: sqlite3.Connection) -> None:
    """Begin a transaction, and lock out other processes until the connection is closed."""
    # Set before the first access, so that the -wal's index stays in memory, without a -shm file,
    # and the lock is held between transactions.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")


def make_durable(connection: sqlite3.Connection) -> None:
    """Make every commit wait for the disk, at the price of one append to the -wal."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def keep_aside(path: Path, connection: sqlite3.Connection | None) -> Path:
    """Close a journal and rename it, with its sidecars, to the first free `<name>.<number>`.

    Raises:
        ConfigError: it cannot be renamed.
    """
    number = 1
    while os.path.lexists(aside := _beside(path, f".{number}")) or sidecars(aside):
        number += 1
    try:
        if connection is not None:
            # This may fail for a damaged journal, whose sidecars are then renamed with it.
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
            f"--journal cannot be renamed to {aside}. Received: {path} ({error.strerror})"
        ) from None
    finally:
        # Close only now: SQLite sees that its file has moved, and changes nothing.
        close(connection)
    return aside


def sidecars(path: Path) -> list[Path]:
    """Return the files that SQLite left beside a database."""
    return [file for suffix in SIDECARS if os.path.lexists(file := _beside(path, suffix))]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def identity_of(path: Path) -> Identity | None:
    """Return what identifies the file at `path`, None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def close(connection: sqlite3.Connection | None) -> None:
    """Close a connection, if there is one."""
    if connection is not None:
        connection.close()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a ConfigError (the journal is in use, or the disk is in trouble) or
    into Unusable (the file is damaged)."""
    try:
        yield
    except sqlite3.Error as error:
        if result_code(error) == sqlite3.SQLITE_BUSY:
            raise in_use(path) from None
        if result_code(error) in SURROUNDINGS:
            raise ConfigError(f"--journal cannot be used. Received: {path} ({error})") from None
        raise Unusable(f"is damaged ({error})") from None


def result_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code; Python's own errors, as for invalid UTF-8, have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def in_use(path: Path) -> ConfigError:
    """Return the error for a journal that another run holds."""
    return ConfigError(
        f"Another run uses this journal. Received: --journal {path}; wait for that run to end, or "
        "name another --journal FILE"
    )
