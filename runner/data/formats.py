"""Columns to copy and a table of numbers -> the bytes of a CSV, Parquet or JSON lines file.

Does not know files: `submission.py` writes the bytes. Every writer takes the arguments of `Write`.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd

from runner.config.task import EMBEDDING

# Arguments: columns by name, as in `Examples.kept`; numbers, (rows, width); and the names of their
# columns, empty if each row is one embedding.
Write = Callable[[Mapping[str, Any], np.ndarray, Sequence[str]], bytes]
# Embeddings held in memory as text at a time; one takes about 30 kB.
ROWS_AT_A_TIME = 1000
_SURROGATES = re.compile("[\ud800-\udfff]")


def csv_text(columns: Mapping[str, Any], values: np.ndarray, names: Sequence[str]) -> bytes:
    """Return a CSV; an embedding has a column for each number."""
    cells = {name: _as_text(column) for name, column in columns.items()}
    if not names:
        text = _csv_of_embeddings(cells, values)
    else:
        table = pd.DataFrame(values, columns=list(names))
        for place, (name, column) in enumerate(cells.items()):
            table.insert(place, name, pd.Series(column, dtype=object))
        # Before Python 3.13, csv does not quote a lone carriage return, which is read back as a
        # line end.
        has_returns = any("\r" in cell for column in cells.values() for cell in column)
        quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if has_returns else csv.QUOTE_MINIMAL
        text = table.to_csv(index=False, lineterminator="\n", quoting=quoting)
    # Write cells as they were read, lone surrogates included.
    return text.encode("utf-8", errors="surrogatepass")


def parquet(columns: Mapping[str, Any], values: np.ndarray, names: Sequence[str]) -> bytes:
    """Return a Parquet file; an embedding is one cell, a list of float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {name: _as_arrow(column) for name, column in columns.items()}
    if names:
        table |= {name: pa.array(values[:, place]) for place, name in enumerate(names)}
    else:
        flat = pa.array(np.ravel(values))
        table[EMBEDDING] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    file = io.BytesIO()
    pq.write_table(pa.table(table), file)
    return file.getvalue()


def json_lines(columns: Mapping[str, Any], values: np.ndarray, names: Sequence[str]) -> bytes:
    """Return one JSON object per line; an embedding is a list of numbers."""
    parts = [_labelled(name, _as_json(column)) for name, column in columns.items()]
    if names:
        numbers = [_shortest(values[:, place]).to_pylist() for place in range(len(names))]
        parts += [_labelled(name, column) for name, column in zip(names, numbers, strict=True)]
    else:
        lists = (f"[{numbers}]" for numbers in _joined(values, ", "))
        parts.append(_labelled(EMBEDDING, lists))
    return "".join(f"{{{', '.join(row)}}}\n" for row in zip(*parts, strict=True)).encode()


# A format's name in `config/suffixes.py` -> its writer.
WRITERS: dict[str, Write] = {"CSV": csv_text, "Parquet": parquet, "JSON lines": json_lines}


def _csv_of_embeddings(cells: Mapping[str, Sequence[str]], values: np.ndarray) -> str:
    """Faster than pandas: 25,000 embeddings of 768 take 2 s on one core instead of 11 s."""
    lines: list[str] = []
    end = "\r\n"  # makes csv quote cells that contain either character
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator=end)
    writer.writerow([*cells, *(f"{EMBEDDING}_{place}" for place in range(values.shape[1]))])
    writer.writerows(zip(*cells.values(), strict=True))
    header, *rows = (line.removesuffix(end) for line in lines)
    numbers = _joined(values, ",")
    whole = (f"{row},{floats}\n" for row, floats in zip(rows, numbers, strict=True))
    return f"{header}\n{''.join(whole)}"


def _joined(values: np.ndarray, between: str) -> Iterator[str]:
    """Yield the numbers of each row of (rows, width) as text, joined by `between`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    width = values.shape[1]
    for start in range(0, len(values), ROWS_AT_A_TIME):
        some = values[start : start + ROWS_AT_A_TIME]
        ends = pa.array(np.arange(len(some) + 1, dtype=np.int32) * width, pa.int32())
        lists = pa.ListArray.from_arrays(ends, _shortest(np.ravel(some)))
        yield from pc.binary_join(lists, between).to_pylist()


def _shortest(values: np.ndarray) -> Any:
    """Return an Arrow array with the shortest text of each number that parses back to it."""
    import pyarrow as pa

    return pa.array(values).cast(pa.string())


def _labelled(name: str, texts: Any) -> list[str]:
    key = json.dumps(name)
    return [f"{key}: {text}" for text in texts]


def _as_text(column: Any) -> Sequence[str]:
    """Return cells as text: nulls are empty, lists and objects are JSON."""
    if hasattr(column, "to_pylist"):
        import pyarrow as pa

        with suppress(pa.ArrowException):
            column = column.cast(pa.large_string())
        column = column.to_pylist()
    if all(type(cell) is str for cell in column):
        return column
    return [
        "" if cell is None else cell if isinstance(cell, str) else _json_of(cell) for cell in column
    ]


def _as_arrow(column: Any) -> Any:
    """Return an Arrow array of cells in the type that Arrow infers, else as text."""
    import pyarrow as pa

    if hasattr(column, "to_pylist"):
        return column
    try:
        return pa.array(column, pa.string() if not len(column) else None)
    except (pa.ArrowException, UnicodeError, OverflowError):
        text = (_SURROGATES.sub("\ufffd", cell) for cell in _as_text(column))
        return pa.array(list(text), pa.string())


def _as_json(column: Any) -> list[str]:
    values = column.to_pylist() if hasattr(column, "to_pylist") else column
    return [_json_of(value) for value in values]


def _json_of(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "null"  # JSON has neither NaN nor infinity
    return json.dumps(value, default=str)
