"""A command line -> RunConfig or PrepareConfig, and --help.

Does not know what a value means: `flags.py` reads them.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from runner import __version__
from runner.common.errors import ConfigError
from runner.config.flags import (
    CHOICES,
    COUNTS,
    GROUPS,
    HELP,
    METAVARS,
    PARSERS,
    PATHS,
    PREPARE_HELP,
    SWITCHES,
    flag,
    parse_count,
)
from runner.config.run_config import PrepareConfig, RunConfig, make_config, read_task

# Columns that --help fills at most, and where its texts begin.
HELP_WIDTH, HELP_INDENT = 96, 26


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Return the config that `argv` asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot be used.
    """
    name = program_name()
    parser = _Parser(
        prog=name,
        usage=f"{name} [FLAGS]\n       {name} prepare [FLAGS]",
        description="Predict every row of a test set with a Keras language-model classifier on "
        "all devices, and write a checked submission.",
        epilog="Without --preset and --input a small demo model and test set are made and used. "
        f"`{name} prepare --help`: merge and quantize a preset once, for faster starts.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=_Layout,
        add_help=False,
    )
    for heading, names in GROUPS.items():
        texts = {name: HELP[name] for name in names}
        _add_flags(parser.add_argument_group(heading), texts, folders=("preset", "log_dir"))
    others = parser.add_argument_group("others")
    others.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="a file of the same names, as TOML; flags win. Its [task] table names other columns, "
        "text, labels and kind of head than the contest's (default: none)",
    )
    others.add_argument("--version", action="version", version=f"arena-runner {__version__}")
    others.add_argument("-h", "--help", action="help", help="show this and end")
    flags = parser.read(argv)
    config_file = flags.pop("config", None)
    for name in COUNTS:
        if name in flags:
            flags[name] = parse_count(name, flags[name])
    for name, parse in PARSERS.items():
        if name in flags:
            flags[name] = parse(flags[name])
    return make_config(flags, config_file)


def parse_prepare_arguments(argv: Sequence[str]) -> PrepareConfig:
    """Return what the command line after `prepare` asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot be used.
    """
    parser = _Parser(
        prog=f"{program_name()} prepare",
        usage="%(prog)s --preset DIR --output DIR [FLAGS]",
        formatter_class=_Layout,
        description="Write a preset with LoRA merged and weights quantized, once: a run that loads "
        "it gives the same numbers as one that does both while it loads, and starts faster.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_flags(parser, PREPARE_HELP, folders=("preset", "output"))
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="of a run, for its [task] alone"
    )
    flags = parser.read(argv)
    config_file = flags.pop("config", None)
    if missing := [flag(name) for name in ("preset", "output") if name not in flags]:
        raise ConfigError(f"prepare needs {' and '.join(missing)}; --help lists the flags")
    if "sequence_length" in flags:
        flags["sequence_length"] = parse_count("sequence_length", flags["sequence_length"])
    if config_file is not None:
        flags["task"] = read_task(config_file)
    return PrepareConfig(**flags)


def program_name() -> str:
    """Return how the command was called, to be part of what is said."""
    name = Path(sys.argv[0]).name
    if name in ("__main__.py", "-m"):
        return "python -m runner"
    return name if name in ("run.py", "arena-runner") else "run.py"


def _add_flags(
    parser: argparse._ActionsContainer, texts: dict[str, str], *, folders: Sequence[str]
) -> None:
    for name, text in texts.items():
        options: dict[str, Any] = {"help": text, "dest": name}
        if name in SWITCHES:
            options["action"] = "store_true"
        elif name in CHOICES:
            options["metavar"] = "{" + ",".join(CHOICES[name]) + "}"
        elif name in PATHS:
            options |= {"type": Path, "metavar": "DIR" if name in folders else "FILE"}
        else:
            options["metavar"] = METAVARS.get(name, "N")
        parser.add_argument(flag(name), **options)


class _Layout(argparse.HelpFormatter):
    """Help in a column that can be read, on a wide screen too."""

    def __init__(self, prog: str) -> None:
        width = min(HELP_WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=HELP_INDENT, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names of flags and modes stay whole.
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of the whole usage."""

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the flags that were given, by their names.

        Raises:
            ConfigError: they cannot be parsed.
        """
        values = vars(self.parse_args(argv))
        for name, value in values.items():
            if isinstance(value, list):  # what argparse makes of --input=--
                raise ConfigError(f"{flag(name)} must have one value. Received: {flag(name)}=--")
        return values

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")
