"""A RunConfig -> the flags that start the same run."""

from typing import Any

from runner.config.flags import FLAGS, RUN, flag
from runner.config.run_config import RunConfig


def command_flags(config: RunConfig, *, calibrates: bool = False, **changes: Any) -> list[str]:
    """Return the flags that start a config's run, the mode first.

    Args:
        calibrates: leave out the flags that --calibrate's run does not take.
        changes: setting -> a value that replaces the config's; None leaves the flag out.
    """
    flags: list[str] = []
    for row in sorted(FLAGS, key=lambda row: row.group != "devices"):
        value = changes.get(row.name, getattr(config, row.name))
        # A default value that the user passed is not a `DefaultLength`: keep it, since a preset may
        # bring another.
        is_default = value == row.default and type(value) is type(row.default)
        if value is None or (is_default and row.name != "mode"):
            continue
        if RUN not in row.commands or (calibrates and not row.calibrates):
            continue
        flags += [flag(row.name), *([] if value is True else [_as_typed(value)])]
    return flags


def _as_typed(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_as_typed, value))
    return f"{value:.15g}" if isinstance(value, float) else str(value)
