"""A CSV or Parquet file -> Examples: ids as they were spelled, text cells, the file's order.

Does not know what the cells mean.
"""

import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.errors import DataError, first_line, shown
from runner.records import Examples

ID_COLUMN = "id"
TEXT_COLUMNS = ("prompt", "response_a", "response_b")


def read_examples(
    path: Path, *, id_column: str = ID_COLUMN, text_columns: Sequence[str] = TEXT_COLUMNS
) -> Examples:
    """Return all rows of a test set.

    Ids stay text: numbers above 2^31, leading zeros and strings survive. Empty and missing text
    cells are empty text. Further columns are ignored.

    Raises:
        DataError: the file cannot be read as its suffix says, a column is missing or named twice,
            or an id is null or repeated.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise DataError(f"--input must be a CSV or Parquet file that exists. Received: {path}")
    wanted = [id_column, *text_columns]
    try:
        is_parquet = path.suffix.lower() in (".parquet", ".pq")
        table = _read_parquet(path, wanted) if is_parquet else _read_csv(path, wanted)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    _check_ids(path, id_column, table[id_column])
    return Examples(tuple(table[id_column]), {name: tuple(table[name]) for name in text_columns})


def _read_csv(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    data = path.read_bytes()
    try:
        # Surrogates pass here and are removed from the prompts, as in the notebook.
        text = data.decode("utf-8-sig", errors="surrogatepass")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} must be UTF-8. Received: byte 0x{data[error.start]:02x} in line {line}"
        ) from None
    # Not pandas: it cannot pass surrogates, and reads over a quote that never closes or a row
    # that is too long unless asked in several ways.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path} is empty: expected a header line with the columns.")
        _check_columns(path, wanted, header)
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path} is no well-formed CSV: line {reader.line_num}: {error}") from None
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header):
            raise DataError(
                f"{path} is no well-formed CSV: expected {len(header)} cells a row. "
                f"Received: {len(row)} in row {number}"
            )
    # A row that ends early lacks cells: they are empty.
    return {
        name: [row[place] if place < len(row) else "" for row in rows]
        for name in wanted
        for place in [header.index(name)]
    }


def _read_parquet(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, wanted, file.schema_arrow.names)
            table = file.read(columns=list(wanted))
        return {
            name: _cells(path, name, table.column(name), is_id=name == wanted[0]) for name in wanted
        }
    # Text that is no UTF-8 is a ValueError, and only seen when it is decoded.
    except (pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{path} is no readable Parquet file: {first_line(error)}") from None


def _cells(path: Path, name: str, column: Any, *, is_id: bool) -> list[str]:
    """Return a pyarrow column as text; null is empty text."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = (
        types.is_string(column.type)
        or types.is_large_string(column.type)
        or types.is_string_view(column.type)
        or types.is_null(column.type)
    )
    if not is_text and not (is_id and types.is_integer(column.type)):
        raise DataError(
            f"{path}: column {name} must hold text{' or whole numbers' if is_id else ''}. "
            f"Received: {name} of type {column.type}"
        )
    return [cell or "" for cell in column.cast(pa.large_string()).to_pylist()]


def _check_columns(path: Path, wanted: Sequence[str], received: Sequence[str]) -> None:
    for name in wanted:
        count = list(received).count(name)
        if count != 1:
            raise DataError(
                f"{path} must have the columns {', '.join(wanted)}, each once: "
                f"{name} is {'missing' if count == 0 else 'there twice'}. "
                f"Received: {', '.join(received)[:300]}"
            )


def _check_ids(path: Path, id_column: str, ids: list[str]) -> None:
    """Rows are counted from 1, the header left out."""
    first_seen: dict[str, int] = {}
    for number, value in enumerate(ids, start=1):
        if value == "":
            raise DataError(
                f"{path}: every row must have an id. Received: an empty {id_column} in row {number}"
            )
        if value in first_seen:
            raise DataError(
                f"{path}: every id must be there once. "
                f"Received: {id_column} {shown(value)} in rows {first_seen[value]} and {number}"
            )
        first_seen[value] = number
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(
                f"{path}: ids must be valid Unicode. "
                f"Received: {id_column} {shown(value)} in row {number}"
            )
