"""A JSON file of a preset -> an object and its parts, or a DataError that names the file."""

import json
from pathlib import Path
from typing import Any

from runner.common.errors import DataError, first_line, shown


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        DataError: no such file, no JSON, or no object.
    """
    if not path.is_file():
        raise DataError(f"The preset lacks a file. Expected: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object. Received: {type(content).__name__}")
    return content


def settings_of(path: Path, content: dict[str, Any], key: str = "config") -> dict[str, Any]:
    """Return the object under a key of a JSON file's object; missing or null is empty."""
    settings = content.get(key)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise DataError(f"{path} must hold an object as {key}. Received: {shown(settings)}")
    return settings
