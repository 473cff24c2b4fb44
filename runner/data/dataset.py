"""A CSV, Parquet or JSON lines file -> Examples: ids and cells as spelled, in the file's order.

Does not know what cells mean: a task names the columns.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.common.errors import DataError, first_line, shown
from runner.common.records import Examples
from runner.config.suffixes import format_of
from runner.config.task import CONTEST, Task


def read_examples(path: Path, task: Task = CONTEST) -> Examples:
    """Return all rows of a test set, with the columns that a task names.

    Ids stay text, so numbers above 2^31, leading zeros and strings survive. Empty and missing text
    cells become empty text. Other columns are ignored. The suffix decides the format.

    Raises:
        DataError: the file does not have that format, a column is missing or repeated, or an id is
            null or repeated.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise DataError(
            f"--input must be an existing CSV, Parquet or JSON lines file. Received: {path}"
        )
    read = READERS.get(format_of(path), _read_csv)
    try:
        examples = read(path, task)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    _check_ids(path, task.id_column, examples.ids)
    return examples


def _read_csv(path: Path, task: Task) -> Examples:
    wanted, text = task.input_columns, _read_text(path)
    # Not pandas: it cannot pass surrogates through, and by default accepts unclosed quotes and rows
    # that are too long.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path} is empty: expected a header line with the columns.")
        _check_columns(path, wanted, header)
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(
            f"{path} is not a well-formed CSV: line {reader.line_num}: {error}"
        ) from None
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header):
            raise DataError(
                f"{path} is not a well-formed CSV: expected {len(header)} cells a row. "
                f"Received: {len(row)} in row {number}"
            )
    # In a row that ends early, the missing cells are empty.
    cells = {
        name: tuple(row[place] if place < len(row) else "" for row in rows)
        for name in wanted
        for place in [header.index(name)]
    }
    return _examples(task, cells, {name: cells[name] for name in task.keep_columns})


def _read_json_lines(path: Path, task: Task) -> Examples:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    # Not splitlines: a JSON string may contain U+2028 and other line separators.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not a well-formed JSON lines file: line {number}: {first_line(error)}"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path} must have a JSON object in every line. "
                f"Received: {shown(row)} in line {number}"
            )
        rows.append(row)
        numbers.append(number)
    if rows:
        _check_columns(
            path, task.input_columns, list(dict.fromkeys(key for row in rows for key in row))
        )
    cells = {}
    for name in (task.id_column, *task.text_columns):
        values = [row.get(name) for row in rows]
        for number, value in zip(numbers, values, strict=True):
            _check_json_cell(path, name, value, number, is_id=name == task.id_column)
        cells[name] = tuple("" if value is None else str(value) for value in values)
    kept = {name: [row.get(name) for row in rows] for name in (task.id_column, *task.keep_columns)}
    return _examples(task, cells, kept)


def _check_json_cell(path: Path, name: str, value: Any, number: int, *, is_id: bool) -> None:
    if value is None or isinstance(value, str) or (is_id and type(value) is int):
        return
    raise DataError(
        f"{path}: {name} must hold text{' or whole numbers' if is_id else ''}. "
        f"Received: {name} = {shown(value)} in line {number}"
    )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        # Keep surrogates here; they are removed from the prompts, as in the notebook.
        return data.decode("utf-8-sig", errors="surrogatepass")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} must be UTF-8. Received: byte 0x{data[error.start]:02x} in line {line}"
        ) from None


def _read_parquet(path: Path, task: Task) -> Examples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = task.input_columns
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, wanted, file.schema_arrow.names)
            table = file.read(columns=list(wanted))
        cells = {
            name: tuple(_cells(path, name, table.column(name), is_id=name == task.id_column))
            for name in (task.id_column, *task.text_columns)
        }
        kept = {name: table.column(name) for name in task.keep_columns}
        if pa.types.is_integer(table.column(task.id_column).type):
            kept[task.id_column] = table.column(task.id_column)
        return _examples(task, cells, kept)
    # Invalid UTF-8 is a ValueError, raised when the text is decoded.
    except (pa.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from None


# A format's name in `config/suffixes.py` -> its reader. Any other file is read as CSV.
READERS = {"Parquet": _read_parquet, "JSON lines": _read_json_lines}


def _examples(task: Task, cells: dict[str, tuple[str, ...]], kept: dict[str, Any]) -> Examples:
    columns = {name: cells[name] for name in task.text_columns}
    return Examples(cells[task.id_column], columns, kept)


def _cells(path: Path, name: str, column: Any, *, is_id: bool) -> list[str]:
    """Return the cells of a pyarrow column as text; null becomes empty text."""
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
                f"{name} is {'missing' if count == 0 else 'repeated'}. "
                f"Received: {', '.join(received)[:300]}"
            )


def _check_ids(path: Path, id_column: str, ids: Sequence[str]) -> None:
    """Check that ids are present, unique and valid; messages count rows from 1, header excluded."""
    first_seen: dict[str, int] = {}
    for number, value in enumerate(ids, start=1):
        if value == "":
            raise DataError(
                f"{path}: every row must have an id. Received: an empty {id_column} in row {number}"
            )
        if value in first_seen:
            raise DataError(
                f"{path}: every id must be unique. "
                f"Received: {id_column} {shown(value)} in rows {first_seen[value]} and {number}"
            )
        first_seen[value] = number
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(
                f"{path}: ids must be valid Unicode. "
                f"Received: {id_column} {shown(value)} in row {number}"
            )
