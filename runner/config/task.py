"""What a row is and what to predict for it: columns, template, labels and the kind of head.

The default is the contest's task; a `[task]` table in the TOML file describes another. Only data
and checks: knows no file, no model and no row.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from runner.common.errors import ConfigError, shown

# What the head's outputs become. softmax: probabilities of mutually exclusive classes; sigmoid: an
# independent probability per label; regression: the numbers, unchanged. none: there is no head, and
# the pooled hidden states are written.
HEADS = ("softmax", "sigmoid", "regression", "none")
# The output without a head: a column of lists; in a CSV one column per number, embedding_0 etc.
EMBEDDING = "embedding"
# Between the text columns if there is no template.
BETWEEN = "\n\n"
# More must be a typo: each class is a column.
MOST_CLASSES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, checked when it is made.

    template: the text of a row, with each of `text_columns` in braces; {{ and }} are literal.
    label_columns: one per output of the head, in its order; empty without a head.
    keep_columns: columns of the input that are copied to the output unchanged.
    swap: two text columns that may be swapped, for --extra-passes swap.
    swap_labels: the two labels that are swapped with them; empty if the labels stay.

    Raises:
        ConfigError: the parts contradict each other.
    """

    text_columns: tuple[str, ...]
    template: str
    label_columns: tuple[str, ...] = ()
    head: str = "softmax"
    id_column: str = "id"
    keep_columns: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    swap_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(
                f"[task] head must be one of {', '.join(HEADS)}. Received: head = {self.head!r}"
            )
        _check_template(self)
        _check_labels(self)
        _check_distinct("id_column and text_columns", (self.id_column, *self.text_columns))
        for name in ("keep_columns", "label_columns"):
            _check_distinct(name, getattr(self, name))
        _check_distinct("id_column, keep_columns and the answers", self.output_columns)
        _check_embedding(self)
        _check_swap(self)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that a test set must have, without repetition, the id column first."""
        return tuple(dict.fromkeys((self.id_column, *self.text_columns, *self.keep_columns)))

    @property
    def output_columns(self) -> tuple[str, ...]:
        answers = (EMBEDDING,) if self.head == "none" else self.label_columns
        return (self.id_column, *self.keep_columns, *answers)

    @property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as pairs: a literal and the column after it; None after the last one."""
        return _parse(self.template)

    @property
    def swapped_columns(self) -> dict[str, str]:
        """Text column -> the column whose cells replace its own in the swap."""
        return dict(zip(self.swap, self.swap[::-1], strict=True))

    @property
    def swapped_labels(self) -> list[int]:
        """For each label, the index of the label that means the same after the swap."""
        back = dict(zip(self.swap_labels, self.swap_labels[::-1], strict=True))
        return [self.label_columns.index(back.get(name, name)) for name in self.label_columns]

    def width(self, hidden_dim: int) -> int:
        """Return the number of values predicted per row."""
        return hidden_dim if self.head == "none" else len(self.label_columns)

    def as_toml(self) -> str:
        """Return the `[task]` table that makes this task."""
        lines = ["[task]"]
        for field in fields(self):
            value = getattr(self, field.name)
            # TOML writes strings and lists of strings as JSON does, except for DEL.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{field.name} = {text}")
        return "\n".join(lines) + "\n"


def make_task(table: Any) -> Task:
    """Return the task that a `[task]` table describes.

    Keys that are left out have the contest's values, but a table with other text columns must also
    name its labels. If only a template is given, its columns are used; if only columns are given, a
    template is made from them.

    Args:
        table: a `Task`, which is returned unchanged, or its keys with - or _, and `classes = N` for
            labels class_0 to class_N-1.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or parts that contradict each other.
    """
    if isinstance(table, Task):
        return table
    if not isinstance(table, Mapping):
        raise ConfigError(f"task must be a table, [task]. Received: task = {shown(table)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_")
        values[name] = _typed(name, value)
    if "classes" in values:
        if "label_columns" in values:
            raise ConfigError(
                "[task] takes either label_columns or classes. "
                f"Received: classes = {values['classes']}"
            )
        values["label_columns"] = tuple(f"class_{n}" for n in range(values.pop("classes")))
    return Task(**{**_defaults(values), **values})


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a table leaves out."""
    defaults = {field.name: getattr(CONTEST, field.name) for field in fields(Task)}
    columns = values.get("text_columns")
    if columns is None and "template" in values:
        named = (name for _, name in _parse(values["template"]) if name is not None)
        columns = defaults["text_columns"] = tuple(dict.fromkeys(named))
    elif columns is not None:
        defaults["template"] = BETWEEN.join(f"{{{name}}}" for name in columns)
    is_own = columns is not None and set(columns) != set(CONTEST.text_columns)
    is_own |= values.get("head") == "none"
    if is_own:
        defaults["label_columns"] = ()
    if is_own or "label_columns" in values:
        defaults |= {"swap": (), "swap_labels": ()}
    return defaults


def _typed(name: str, value: Any) -> Any:
    is_list = name in ("text_columns", "label_columns", "keep_columns", "swap", "swap_labels")
    if is_list:
        if isinstance(value, list | tuple) and all(type(entry) is str for entry in value):
            return tuple(value)
        expected = "a list of names"
    elif name == "classes":
        if type(value) is int and 1 <= value <= MOST_CLASSES:
            return value
        expected = f"a whole number from 1 to {MOST_CLASSES:,}"
    elif name in ("id_column", "template", "head"):
        if type(value) is str:
            return value
        expected = "text"
    else:
        known = [*(field.name for field in fields(Task)), "classes"]
        raise ConfigError(
            f"[task] names an unknown key; it takes {', '.join(known)}. "
            f"Received: {name} = {shown(value)}"
        )
    raise ConfigError(f"[task] {name} must be {expected}. Received: {name} = {shown(value)}")


def _check_template(task: Task) -> None:
    parsed = _parse(task.template)
    used = {name for _, name in parsed if name is not None}
    if not task.text_columns:
        raise ConfigError(
            "[task] needs a text column: set text_columns, or name one in template in braces. "
            f"Received: template = {shown(task.template)}"
        )
    if used != set(task.text_columns):
        unknown = sorted(used - set(task.text_columns))
        unused = [name for name in task.text_columns if name not in used]
        what = f"{{{unknown[0]}}} is none of them" if unknown else f"{{{unused[0]}}} is not in it"
        raise ConfigError(
            f"[task] template must name each of text_columns ({', '.join(task.text_columns)}): "
            f"{what}; write {{{{ and }}}} for literal braces. "
            f"Received: template = {shown(task.template)}"
        )


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of a literal and the name after it; braces may contain only plain names."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"[task] template has unmatched braces ({error}); write {{{{ and }}}} for literal "
            f"braces. Received: template = {shown(template)}"
        ) from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion):
            raise ConfigError(
                "[task] template takes only column names in braces, such as {prompt}. "
                f"Received: {{{name}{'!' + conversion if conversion else ''}"
                f"{':' + spec if spec else ''}}}"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _check_labels(task: Task) -> None:
    least = {"none": 0, "softmax": 2}.get(task.head, 1)
    count = len(task.label_columns)
    if task.head == "none" and count:
        raise ConfigError(
            f"[task] head none has no labels: it writes the pooled hidden states as {EMBEDDING!r}. "
            f"Received: label_columns = {shown(list(task.label_columns))}"
        )
    if count < least:
        raise ConfigError(
            f"[task] head {task.head} needs label_columns, at least {least}, or classes = N. "
            f"Received: {count}"
        )


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if not all(names):
        raise ConfigError(f"[task] {what} must be names. Received: {shown(list(names))}")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ConfigError(
            f"[task] {what} must name each column once. Received: {shown(twice)} twice"
        )


def _check_embedding(task: Task) -> None:
    for name in (task.id_column, *task.keep_columns):
        if task.head == "none" and re.fullmatch(rf"{EMBEDDING}_\d+", name):
            raise ConfigError(
                f"[task] head none may write columns {EMBEDDING}_0, {EMBEDDING}_1 and so on: do "
                f"not use such a name for another output column. Received: {name}"
            )


def _check_swap(task: Task) -> None:
    for name, among in (("swap", "text_columns"), ("swap_labels", "label_columns")):
        value, columns = getattr(task, name), getattr(task, among)
        if value and (len(set(value)) != 2 or len(value) != 2 or not set(value) <= set(columns)):
            raise ConfigError(
                f"[task] {name} must name two of {among} ({', '.join(columns)}). "
                f"Received: {name} = {shown(list(value))}"
            )
    if task.swap_labels and not task.swap:
        raise ConfigError(
            "[task] swap_labels needs swap, the two text columns to swap. "
            f"Received: swap_labels = {shown(list(task.swap_labels))} alone"
        )


# The LMSYS contest: which of two responses do people prefer? The template is its notebook's.
CONTEST = Task(
    text_columns=("prompt", "response_a", "response_b"),
    template="\n\nPROMPT\n\n{prompt}\n\nRESPONSE:\n\n{response_a}\n\nRESPONSE:\n\n{response_b}",
    label_columns=("winner_model_a", "winner_model_b", "winner_tie"),
    swap=("response_a", "response_b"),
    swap_labels=("winner_model_a", "winner_model_b"),
)
