"""A command line -> RunConfig or PrepareConfig, and --help.

Does not know the flags or what their values mean: `flags.py` does.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from runner import __version__
from runner.common.errors import ConfigError
from runner.config.flags import CONFIG, FLAGS, PREPARE_FLAGS, Flag, flag
from runner.config.run_config import PrepareConfig, RunConfig, make_config, read_task

# The maximum width of --help, and the column where its texts begin.
HELP_WIDTH, HELP_INDENT = 96, 26


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Return the config that `argv` asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot be used.
    """
    name = program_name()
    parser = _Parser(
        (*FLAGS, CONFIG),
        prog=name,
        usage=f"{name} [FLAGS]\n       {name} prepare [FLAGS]",
        description="Predict every row of a test set with a Keras language-model classifier on "
        "all devices, and write a validated submission.",
        epilog="Without --preset and --input, a small demo model and test set are made and used. "
        f"`{name} prepare --help`: merge and quantize a preset once, so that runs start faster.",
    )
    flags, config_file = parser.read(argv)
    return make_config(flags, config_file)


def parse_prepare_arguments(argv: Sequence[str]) -> PrepareConfig:
    """Return what the command line after `prepare` asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot be used.
    """
    parser = _Parser(
        (*PREPARE_FLAGS, replace(CONFIG, **CONFIG.prepare or {})),
        prog=f"{program_name()} prepare",
        usage="%(prog)s --preset DIR --output DIR [FLAGS]",
        description="Merge LoRA, quantize weights and write the result as a preset, once. A run "
        "that loads it gives the same numbers as one that does both while loading, and starts "
        "faster.",
    )
    flags, config_file = parser.read(argv)
    if missing := [
        # Inputs before outputs.
        flag(row.name)
        for row in reversed(PREPARE_FLAGS)
        if row.required and row.name not in flags
    ]:
        raise ConfigError(f"prepare needs {' and '.join(missing)}; --help lists the flags")
    if config_file is not None:
        flags["task"] = read_task(config_file)
    return PrepareConfig(**flags)


def program_name() -> str:
    """Return how the command was called, to quote in messages."""
    name = Path(sys.argv[0]).name
    if name in ("__main__.py", "-m"):
        return "python -m runner"
    return name if name in ("run.py", "arena-runner") else "run.py"


class _Layout(argparse.HelpFormatter):
    """Help that is no wider than is easy to read."""

    def __init__(self, prog: str) -> None:
        width = min(HELP_WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=HELP_INDENT, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Do not split names of flags and modes.
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Reads flags from their rows; reports an error in one line, without the usage."""

    def __init__(self, rows: Iterable[Flag], **texts: str) -> None:
        super().__init__(
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=_Layout,
            add_help=False,
            **texts,  # type: ignore[arg-type]
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for row in rows:
            if row.group not in groups:
                groups[row.group] = self.add_argument_group(row.group)
            row.add_to(groups[row.group])
        other = groups[CONFIG.group]
        other.add_argument("--version", action="version", version=f"arena-runner {__version__}")
        other.add_argument("-h", "--help", action="help", help="show this help and exit")

    def read(self, argv: Sequence[str]) -> tuple[dict[str, Any], Path | None]:
        """Return the given flags by name, and the file of --config.

        Raises:
            ConfigError: they cannot be parsed.
        """
        values = vars(self.parse_args(argv))
        for name, value in values.items():
            if isinstance(value, list):  # what argparse makes of --input=--
                raise ConfigError(f"{flag(name)} must have one value. Received: {flag(name)}=--")
        return values, CONFIG.value(values.pop(CONFIG.name, None))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")
