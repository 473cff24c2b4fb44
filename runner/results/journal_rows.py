"""The tables of a journal -> the rows of a run, each checked against what was written.

Does not know the file that holds them (`journal_file.py`).
"""

import json
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.results.fingerprint import Fingerprint
from runner.results.journal_file import Unusable
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


@dataclass(frozen=True, slots=True)
class Owner:
    """The run to which a journal belongs.

    ids: one per row. classes: numbers per row. head: one of `task.HEADS`, which decides what is
    valid.
    """

    fingerprint: Fingerprint
    ids: Sequence[str]
    classes: int
    head: str


@dataclass(frozen=True, slots=True)
class Done:
    """The rows of a journal, in the input's order.

    rows: int64 (n,), numbers of rows. probabilities: float32 (n, classes). how: of each row, a word
    of `table.py`. lengths: int64 (n,), tokens.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    how: tuple[str, ...]
    lengths: np.ndarray


def check_meta(connection: sqlite3.Connection, run: Owner) -> None:
    """Check that the database is intact and belongs to this run.

    Raises:
        Unusable: it does not.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not names:
        raise Unusable("is half-written (it has no tables)")
    fault = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if fault != "ok":
        raise Unusable(f"is damaged ({' '.join(fault.split())})")
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if meta.get("schema") != str(SCHEMA):
        raise Unusable(f"is damaged (its schema is {meta.get('schema')}, not {SCHEMA})")
    try:
        parts = json.loads(meta["fingerprint"])
        counts = int(meta["rows"]), int(meta["classes"])
        different = run.fingerprint.differences(parts)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise Unusable("is damaged (it does not say to which run it belongs)") from None
    if different:
        raise Unusable(f"belongs to another run ({'; '.join(different)})")
    if counts != (len(run.ids), run.classes):
        raise Unusable(f"is damaged (it is for {counts[0]} rows of {counts[1]} classes)")


def read_rows(connection: sqlite3.Connection, run: Owner) -> Done:
    """Return all rows after checking each.

    Raises:
        Unusable: a row is not as it was written.
    """
    ids, classes = run.ids, run.classes
    found = connection.execute(
        "SELECT row, id, probabilities, how, length, crc32 FROM rows ORDER BY row"
    ).fetchall()
    size = classes * LITTLE_ENDIAN_FLOAT32.itemsize
    for row, row_id, blob, how, length, crc in found:
        if not 0 <= row < len(ids):
            raise Unusable(f"is damaged (it has row {row} of {len(ids)})")
        if row_id != ids[row]:
            raise Unusable(f"is damaged (row {row} has id {row_id}, not {ids[row]})")
        if not isinstance(blob, bytes) or len(blob) != size:
            raise Unusable(f"is damaged (row {row}, id {row_id}, does not have {classes} classes)")
        if crc != checksum(row_id, how, length, blob):
            raise Unusable(f"is damaged (the checksum of row {row}, id {row_id}, does not match)")
    blobs = b"".join(blob for _, _, blob, _, _, _ in found)
    probabilities = np.frombuffer(blobs, LITTLE_ENDIAN_FLOAT32).reshape(len(found), classes)
    if (wrong := unsound(probabilities, run.head)).any():
        row, row_id = found[int(wrong.argmax())][:2]
        raise Unusable(f"is damaged (row {row}, id {row_id}, does not hold probabilities)")
    return Done(
        np.array([entry[0] for entry in found], dtype=np.int64),
        probabilities.astype(np.float32),
        tuple(entry[3] for entry in found),
        np.array([entry[4] for entry in found], dtype=np.int64),
    )


def checksum(row_id: str, how: str, length: int, blob: bytes) -> int:
    """Return the CRC-32 of a row's fields; blob: its probabilities, little-endian float32."""
    return zlib.crc32(blob, zlib.crc32(f"{row_id}\0{how}\0{length}".encode()))
