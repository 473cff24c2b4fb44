"""A value from the command line, TOML or Python -> the value of a setting.

A reader takes a setting's name and the given value, and raises ConfigError if the value cannot be
used. Does not know the settings: `flags.py` does.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError

# The largest int32: the model takes lengths as int32.
MOST_COUNT = 2**31 - 1
LAST_PORT = 65535


def flag(name: str) -> str:
    """Return the flag of a setting: head_kernel -> --head-kernel."""
    return "--" + name.replace("_", "-")


def refused(name: str, expected: str, value: Any) -> ConfigError:
    """Return the error for a value that is not what a setting expects."""
    is_as_typed = isinstance(value, str) and value.isprintable()
    received = f"{flag(name)} {value}" if is_as_typed else f"{name}={value!r}"
    return ConfigError(f"{flag(name)} must be {expected}. Received: {received}")


def read_text(name: str, value: Any) -> str:
    """Return the text."""
    if not isinstance(value, str):
        raise refused(name, "text", value)
    return value


def read_switch(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise refused(name, "true or false", value)
    return value


def read_path(name: str, value: Any) -> Path:
    """Return the path."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise refused(name, "a path", value)
    return Path(value)


def read_count(name: str, value: Any, otherwise: str = "") -> int:
    """Return a whole number from 1 to `MOST_COUNT`."""
    try:
        count = int(value) if isinstance(value, str) else value
    except ValueError:
        count = None
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_COUNT:
        expected = f"a whole number, at least 1 and at most {MOST_COUNT}{otherwise}"
        raise refused(name, expected, value)
    return count


def read_count_or_auto(name: str, value: Any) -> int | None:
    """Return a whole number as `read_count`, None for `auto`."""
    return None if value == "auto" else read_count(name, value, ", or auto")


def read_duration(name: str, value: Any) -> float:
    """Return seconds, from 8h45m, 90m, 1h, 30s, 2h15m30s or a finite number of seconds."""
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(value).strip())
    if isinstance(value, bool) or parts is None or not any(parts.groups()):
        raise refused(name, "hours, minutes and seconds such as 8h45m, 90m or 30s", value)
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds


def read_numbers(name: str, value: Any) -> tuple[float, ...]:
    """Return numbers, from 0.4,0.3,0.3 or a list of numbers."""
    try:
        return tuple(float(part) for part in (value.split(",") if type(value) is str else value))
    except (TypeError, ValueError):
        expected = "numbers separated by commas, such as 0.35,0.35,0.3"
        raise refused(name, expected, value) from None


def read_port(name: str, value: Any) -> int:
    """Return a port of this machine; 0 means any free port."""
    port = int(value) if type(value) is str and re.fullmatch(r"[0-9]{1,5}", value) else value
    if type(port) is not int or not 0 <= port <= LAST_PORT:
        raise refused(name, f"a whole number from 0, any free port, to {LAST_PORT}", value)
    return port
