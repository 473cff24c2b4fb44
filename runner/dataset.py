"""A CSV or Parquet file -> Examples: ids as they were spelled, text cells, the file's order.

Does not know what the cells mean.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from runner.errors import DataError
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
    if not path.is_file():
        raise DataError(f"--input must be a CSV or Parquet file that exists. Received: {path}")
    wanted = [id_column, *text_columns]
    try:
        is_parquet = path.suffix.lower() in (".parquet", ".pq")
        table = _read_parquet(path, wanted) if is_parquet else _read_csv(path, wanted)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    ids = table[id_column].tolist()
    _check_ids(path, id_column, ids)
    return Examples(tuple(ids), {name: tuple(table[name].tolist()) for name in text_columns})


def _read_csv(path: Path, wanted: Sequence[str]) -> pd.DataFrame:
    data = path.read_bytes()
    try:
        # Surrogates pass here and are removed from the prompts, as in the notebook.
        text = data.decode("utf-8-sig", errors="surrogatepass")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} must be UTF-8. Received: byte 0x{data[error.start]:02x} in line {line}"
        ) from None
    _check_columns(path, wanted, _header(path, text))
    try:
        with warnings.catch_warnings():
            # pandas only warns when it drops the cells of rows that are too long.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.StringIO(text),
                dtype=object,
                keep_default_na=False,
                na_filter=False,
                index_col=False,
                encoding_errors="surrogatepass",
                usecols=None,
                low_memory=False,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeError) as error:
        raise DataError(f"{path} is no well-formed CSV: {str(error).strip()}") from None
    # A row that ends early has NaN in the columns it lacks, filter or no filter.
    return table[list(wanted)].map(lambda cell: cell if isinstance(cell, str) else "")


def _header(path: Path, text: str) -> list[str]:
    """Column names as spelled; read_csv alone would rename a second `id` to `id.1`."""
    try:
        first = pd.read_csv(
            io.StringIO(text),
            header=None,
            nrows=1,
            dtype=object,
            na_filter=False,
            encoding_errors="surrogatepass",
        )
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty: expected a header line with the columns.") from None
    except (pd.errors.ParserError, UnicodeError) as error:
        raise DataError(f"{path} is no well-formed CSV: {str(error).strip()}") from None
    return [str(name) for name in first.iloc[0]]


def _read_parquet(path: Path, wanted: Sequence[str]) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_columns(path, wanted, file.schema_arrow.names)
        table = file.read(columns=list(wanted))
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None
    columns = {}
    for name in wanted:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        is_id = name == wanted[0]
        if not (
            is_text or pa.types.is_null(column.type) or (is_id and pa.types.is_integer(column.type))
        ):
            raise DataError(
                f"{path}: column {name} must hold text{' or whole numbers' if is_id else ''}. "
                f"Received: {name} of type {column.type}"
            )
        cells = column.cast(pa.string()).to_pylist()
        columns[name] = np.array([cell or "" for cell in cells], dtype=object)
    return pd.DataFrame(columns)


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
                f"Received: {id_column} {value!r} in rows {first_seen[value]} and {number}"
            )
        first_seen[value] = number
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(
                f"{path}: ids must be valid Unicode. "
                f"Received: {id_column} {value!r} in row {number}"
            )
