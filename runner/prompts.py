"""Examples -> the text each row is classified by. Does not know tokens."""

import json
import re

from runner.errors import DataError, shown
from runner.records import Examples

_SURROGATES = re.compile("[\ud800-\udfff]")


def render_prompts(examples: Examples, *, text_format: str) -> list[str]:
    """Return one text a row, as the notebook made it.

    `raw` takes the cells as they stand. `turns` decodes each cell, a JSON list of strings and
    nulls, and joins its turns by a newline; a null turn and an empty cell are empty text.

    Raises:
        DataError: with `turns`, a cell is no such list; names its row and column.
    """
    columns = list(examples.columns.items())
    if text_format == "turns":
        columns = [
            (
                name,
                tuple(
                    _join_turns(cell, row, examples.ids[row], name)
                    for row, cell in enumerate(cells)
                ),
            )
            for name, cells in columns
        ]
    texts = zip(*(cells for _, cells in columns), strict=True)
    return [_SURROGATES.sub("", "\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(row)) for row in texts]


def _join_turns(cell: str, row: int, row_id: str, column: str) -> str:
    if cell == "":
        return ""
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not all(isinstance(turn, str | None) for turn in turns):
        raise DataError(
            f"Row {row + 1} (id {row_id[:60]}), column {column}: --text-format turns needs a JSON "
            f"list of strings and nulls. Received: {shown(cell)}"
        )
    return "\n".join(turn or "" for turn in turns)
