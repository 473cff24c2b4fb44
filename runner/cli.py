"""The command line: flags -> RunConfig -> a run -> an exit code.

Exit codes: 0, a complete and checked submission stands at --output; 2, bad usage or input, said
in a line or two with nothing written; 130, interrupted; 1, anything else.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from runner.config import CHOICES, COUNTS, PATHS, RunConfig, flag, make_config, parse_count
from runner.errors import ArenaRunnerError, ConfigError, DataError, first_line

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

HELP = {
    "mode": "data-parallel: Ray workers, one replica each; model-parallel: groups of Ray workers, "
    "one replica a group; single: this process, no Ray (default: data-parallel)",
    "input": "CSV or Parquet with id, prompt, response_a, response_b (default: the demo set)",
    "output": "where the submission is written (default: submission.csv)",
    "preset": "KerasHub preset directory (default: the demo preset, random weights)",
    "lora_weights": "*.lora.h5 saved from that backbone; merged into its kernels",
    "head_kernel": ".npy of shape (hidden, classes)",
    "head_bias": ".npy of shape (classes,)",
    "pooling": "hidden states -> one vector; padded-mean is the notebook's mean over all "
    "positions, padding included (default: padded-mean)",
    "sequence_length": "tokens a row is cut to; use the length of training (default: 512)",
    "text_format": "raw: cells as they stand; turns: JSON lists decoded, turns joined by a newline "
    "(default: raw)",
    "num_workers": "one replica and one device each (default: auto, every GPU or TPU, on a CPU two "
    "workers or one for every eight cores)",
    "group_size": "model-parallel: workers that hold one replica together (default: 2)",
    "strategy": "model-parallel: pipeline, layers cut into stages; tensor, every large weight cut "
    "into slices; auto says which it takes and why (default: auto)",
    "dtype": "auto: float32 on CPU, bfloat16 where the device has it, else float16 (default: auto)",
    "quantization": "weights as int8 (activations too, as they come) or int4, made layer by layer "
    "while loading, LoRA merged before; needs no flag with a prepared preset (default: none)",
    "max_tokens_per_batch": "rows x padded length of a batch (default: auto, by device)",
    "report": "where the JSON report is written (default: OUTPUT.report.json)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    started = time.monotonic()
    interrupts = _Interrupts()
    verbose = False
    try:
        config = parse_arguments(sys.argv[1:] if argv is None else argv)
        verbose = config.verbose
        from runner.pipeline import run  # pandas takes half a second; --help and typos need not

        interrupts.install()
        run(config, started=started, on_signals_taken=interrupts.install)
        return 0
    except (ConfigError, DataError) as error:
        return _fail(f"error: {error}", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except ArenaRunnerError as error:
        if verbose:
            raise
        return _fail(f"error: {error}", EXIT_FAILED)
    except Exception as error:
        if verbose:
            raise
        return _fail(
            f"error: {type(error).__name__}: {first_line(error)}\n"
            "This is a bug, or a machine in trouble: --verbose shows where.",
            EXIT_FAILED,
        )


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Return the config that `argv` asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot be used.
    """
    parser = _Parser(
        prog="run.py",
        description="Predict every row of a test set with a Keras language-model classifier on "
        "all devices, and write a checked submission.",
        epilog="Without --preset and --input a small demo model and test set are made and used.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, text in HELP.items():
        options: dict[str, Any] = {"help": text, "dest": name}
        if name in CHOICES:
            options["metavar"] = "{" + ",".join(CHOICES[name]) + "}"
        elif name in PATHS:
            options |= {"type": Path, "metavar": "DIR" if name == "preset" else "FILE"}
        else:
            options["metavar"] = "N"
        parser.add_argument(flag(name), **options)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="the same names; flags win"
    )
    parser.add_argument("--verbose", action="store_true", help="library logs and tracebacks too")
    flags = vars(parser.parse_args(argv))
    config_file = flags.pop("config", None)
    for name in COUNTS:
        if name in flags:
            flags[name] = parse_count(name, flags[name])
    return make_config(flags, config_file)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


class _Interrupts:
    """SIGINT and SIGTERM: the first unwinds the run, a second ends the process at once.

    Ray and others replace handlers when they start, so `install` is called again after that.
    """

    def __init__(self) -> None:
        self._interrupted = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(EXIT_INTERRUPTED)
        self._interrupted = True
        raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
