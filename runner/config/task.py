"""What a row is and what is asked about it: columns, template, labels and the kind of head.

The contest's is the default; a `[task]` table in the TOML names another. Pure data and checks:
knows no file, no model and no row.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from runner.common.errors import ConfigError, shown

# What becomes of the head's sums: probabilities of classes that exclude each other; a probability
# for each label by itself; the numbers as they are. none: no head, the pooled hidden states.
HEADS = ("softmax", "sigmoid", "regression", "none")
# Without a head: a column of lists, or in a CSV one column a number, embedding_0 and so on.
EMBEDDING = "embedding"
# Between the text columns where no template is named.
BETWEEN = "\n\n"
# More are a typing error: each is a column.
MOST_CLASSES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, checked when it is made.

    template: the text of a row, with each of `text_columns` in braces; {{ and }} are braces.
    label_columns: one an output of the head, in its order; none where there is no head.
    keep_columns: of the input, copied to the output as they stand.
    swap: two text columns that may be exchanged, for --extra-passes swap; swap_labels: the two
    labels that change places then, none where the labels stay.

    Raises:
        ConfigError: the parts do not make a whole.
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
        """The columns that a test set must have, each once, the id first."""
        return tuple(dict.fromkeys((self.id_column, *self.text_columns, *self.keep_columns)))

    @property
    def output_columns(self) -> tuple[str, ...]:
        answers = (EMBEDDING,) if self.head == "none" else self.label_columns
        return (self.id_column, *self.keep_columns, *answers)

    @property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template in parts: a literal, and the column after it, None after the last."""
        return _parse(self.template)

    @property
    def swapped_columns(self) -> dict[str, str]:
        """Text column -> the one whose cells it gets when the two are exchanged."""
        return dict(zip(self.swap, self.swap[::-1], strict=True))

    @property
    def swapped_labels(self) -> list[int]:
        """For each label the place of the one that means the same after the exchange."""
        back = dict(zip(self.swap_labels, self.swap_labels[::-1], strict=True))
        return [self.label_columns.index(back.get(name, name)) for name in self.label_columns]

    def width(self, hidden_dim: int) -> int:
        """Return how many numbers a row gets."""
        return hidden_dim if self.head == "none" else len(self.label_columns)

    def as_toml(self) -> str:
        """Return the `[task]` table that makes this task."""
        lines = ["[task]"]
        for field in fields(self):
            value = getattr(self, field.name)
            # TOML writes strings and lists of them as JSON does, but for one control character.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{field.name} = {text}")
        return "\n".join(lines) + "\n"


def make_task(table: Any) -> Task:
    """Return the task that a `[task]` table describes.

    What it does not name is the contest's; but a table that names other text columns must name its
    labels too. The columns may be left to the template, and the template to the columns.

    Args:
        table: the keys of `Task`, with - or _, and `classes = N` for labels class_0 to class_N-1.

    Raises:
        ConfigError: an unknown key, a value of another type, or what `Task` does not take.
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
                "[task] takes label_columns or classes, not both. "
                f"Received: classes = {values['classes']}"
            )
        values["label_columns"] = tuple(f"class_{n}" for n in range(values.pop("classes")))
    return Task(**{**_defaults(values), **values})


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table leaves out."""
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
            "[task] needs a text column: text_columns, or a template that names one in braces. "
            f"Received: template = {shown(task.template)}"
        )
    if used != set(task.text_columns):
        unknown = sorted(used - set(task.text_columns))
        unused = [name for name in task.text_columns if name not in used]
        what = f"{{{unknown[0]}}} is none of them" if unknown else f"{{{unused[0]}}} is not in it"
        raise ConfigError(
            f"[task] template must name each of text_columns ({', '.join(task.text_columns)}): "
            f"{what}; braces that are text are doubled. Received: template = {shown(task.template)}"
        )


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return literals and the names after them; only plain names may stand in braces."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"[task] template has braces that do not match ({error}); braces that are text are "
            f"doubled, {{{{ and }}}}. Received: template = {shown(template)}"
        ) from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion):
            raise ConfigError(
                "[task] template takes names of columns in braces, and nothing with them: "
                "{prompt}. "
                f"Received: {{{name}{'!' + conversion if conversion else ''}"
                f"{':' + spec if spec else ''}}}"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _check_labels(task: Task) -> None:
    least = {"none": 0, "softmax": 2}.get(task.head, 1)
    count = len(task.label_columns)
    if task.head == "none" and count:
        raise ConfigError(
            "[task] head none has no labels: the pooled hidden states come out, as "
            f"{EMBEDDING!r}. Received: label_columns = {shown(list(task.label_columns))}"
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
            f"[task] {what} must name each column once: {shown(twice)} is there twice."
        )


def _check_embedding(task: Task) -> None:
    for name in (task.id_column, *task.keep_columns):
        if task.head == "none" and re.fullmatch(rf"{EMBEDDING}_\d+", name):
            raise ConfigError(
                f"[task] head none may write columns {EMBEDDING}_0, {EMBEDDING}_1 and so on, which "
                f"no other column of the output may be called. Received: {name}"
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
            "[task] swap_labels goes with swap, the two text columns that are exchanged. "
            f"Received: swap_labels = {shown(list(task.swap_labels))} alone"
        )


# The LMSYS contest's: which of two responses do people prefer? The text is its notebook's.
CONTEST = Task(
    text_columns=("prompt", "response_a", "response_b"),
    template="\n\nPROMPT\n\n{prompt}\n\nRESPONSE:\n\n{response_a}\n\nRESPONSE:\n\n{response_b}",
    label_columns=("winner_model_a", "winner_model_b", "winner_tie"),
    swap=("response_a", "response_b"),
    swap_labels=("winner_model_a", "winner_model_b"),
)
