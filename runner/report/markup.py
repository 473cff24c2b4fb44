"""Named templates and values -> HTML. Every value is escaped unless it is `Html` already.

The templates are files in `templates/`: `page.html`, `style.css` and the pieces in `parts.html`.
"""

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def fill(name: str, **values: str | Sequence[str]) -> Html:
    """Return a template with its placeholders filled; parts of a sequence are joined.

    Raises:
        KeyError: there is no such template, or a placeholder has no value.
    """
    return Html(_templates()[name].substitute({key: _html(one) for key, one in values.items()}))


def _html(value: str | Sequence[str]) -> str:
    if isinstance(value, Html):
        return value
    return escape(value) if isinstance(value, str) else "".join(map(_html, value))


@cache
def _templates() -> dict[str, Template]:
    folder = files(__package__) / "templates"
    page, style, parts = (
        (folder / name).read_text("utf-8") for name in ("page.html", "style.css", "parts.html")
    )
    pieces = re.split(r"<!-- ([\w ]+) -->\n", parts)
    texts = {"page": page, "style": style, **dict(zip(pieces[1::2], pieces[2::2], strict=True))}
    return {name: Template(text) for name, text in texts.items()}
