"""A RunConfig -> the flags that make its run."""

from typing import Any

from runner.config.flags import FLAGS, PRINTED, flag
from runner.config.run_config import RunConfig


def command_flags(config: RunConfig, passed_on_to: str = PRINTED, /, **changes: Any) -> list[str]:
    """Return the flags that make a config's run.

    Args:
        passed_on_to: PRINTED or CALIBRATION, which take different flags.
        changes: setting -> another value than the config's; None leaves the flag out.
    """
    flags: list[str] = []
    # The mode is always named, and first.
    for row in sorted(FLAGS, key=lambda row: row.group != "devices"):
        value = changes.get(row.name, getattr(config, row.name))
        is_default = value is None or (row.name != "mode" and value == row.default)
        if is_default or passed_on_to not in row.passed_on:
            continue
        if isinstance(value, tuple):
            value = ",".join(f"{part:g}" for part in value)
        flags += [flag(row.name), f"{value:g}" if isinstance(value, float) else str(value)]
    return flags
