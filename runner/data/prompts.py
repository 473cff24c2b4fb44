"""Examples -> the text of each row, which the model classifies. Does not know tokens."""

import json
import re

from runner.common.errors import DataError, shown
from runner.common.records import Examples
from runner.config.task import CONTEST, Task

_SURROGATES = re.compile("[\ud800-\udfff]")


def render_prompts(examples: Examples, *, text_format: str, task: Task = CONTEST) -> list[str]:
    """Return one text per row: the task's template with the row's cells filled in.

    Surrogates are removed, since no tokenizer accepts them. The contest's template is the
    notebook's.

    Args:
        text_format: `raw` uses the cells unchanged. `turns` decodes each cell, a JSON list of
            strings and nulls, and joins its turns with newlines; nulls and empty cells are empty.

    Raises:
        DataError: with `turns`, a cell is not such a list; the message names its row and column.
    """
    columns = examples.columns
    if text_format == "turns":
        columns = {
            name: tuple(
                _join_turns(cell, row, examples.ids[row], name) for row, cell in enumerate(cells)
            )
            for name, cells in columns.items()
        }
    pattern = "".join(
        literal.replace("%", "%%") + ("%s" if name is not None else "")
        for literal, name in task.pieces
    )
    cells = zip(*(columns[name] for _, name in task.pieces if name is not None), strict=True)
    return [_SURROGATES.sub("", pattern % row) for row in cells]


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
