"""A preset's JSON file -> an object and its parts, or a DataError that names the file."""

import json
from pathlib import Path
from typing import Any

from runner.common.errors import DataError, first_line, shown


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        DataError: the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        raise DataError(f"The preset is missing a file. Expected: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object. Received: {type(content).__name__}")
    return content


def settings_of(path: Path, content: dict[str, Any], key: str = "config") -> dict[str, Any]:
    """Return the object under a key of a JSON file's content; empty if it is missing or null.

    Raises:
        DataError: the value is not an object.
    """
    settings = content.get(key)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise DataError(f"{path} must set {key} to an object. Received: {shown(settings)}")
    return settings
