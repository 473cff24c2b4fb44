"""The command line: flags -> RunConfig -> a run -> an exit code.

Exit codes: 0, a complete and checked submission stands at --output; 2, bad usage or input, said
in a line or two with nothing written; 3, --on-deadline fail and the deadline came; 130,
interrupted, journal kept; 1, anything else.
"""

import _thread
import argparse
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from runner import __version__
from runner.common.errors import (
    BUSY_THREAD,
    EXIT_BAD_INPUT,
    EXIT_DEADLINE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ArenaRunnerError,
    ConfigError,
    DataError,
    DeadlineError,
    first_line,
    on_one_line,
)
from runner.config.run_config import (
    CHOICES,
    COUNTS,
    PARSERS,
    PATHS,
    SWITCHES,
    PrepareConfig,
    RunConfig,
    flag,
    make_config,
    parse_count,
    read_task,
)
from runner.telemetry.logs import DRIVER_LOG, LogEvent

# Seconds until a signal that was lost is given again.
AGAIN_AFTER_S = 0.1

HELP = {
    "mode": "data-parallel: Ray workers, one replica each; model-parallel: groups of Ray workers, "
    "one replica a group; single: this process, no Ray (default: data-parallel)",
    "input": "CSV, Parquet or JSON lines (.jsonl) with id, prompt, response_a, response_b, or the "
    "columns that [task] in --config names (default: the demo set)",
    "output": "where the submission is written: .csv, .parquet or .jsonl (default: submission.csv)",
    "preset": "KerasHub preset directory, of a backbone or of a whole TextClassifier with its own "
    "head (default: the demo preset, random weights)",
    "lora_weights": "*.lora.h5 saved from that backbone; merged into its kernels (default: none)",
    "head_kernel": ".npy of shape (hidden, classes) (needed with --preset, if [task] has a head "
    "and the preset none)",
    "head_bias": ".npy of shape (classes,) (needed with --head-kernel)",
    "pooling": "hidden states -> one vector; padded-mean is the notebook's mean over all "
    "positions, padding included; first and pooler are for encoders (default: padded-mean, or "
    "that of a TextClassifier's own head)",
    "sequence_length": "tokens a row is cut to; use the length of training (default: 512 tokens, "
    "or that of a TextClassifier's own preprocessor)",
    "text_format": "raw: cells as they stand; turns: JSON lists decoded, turns joined by a newline "
    "(default: raw)",
    "num_workers": "one replica and one device each (default: auto, every GPU or TPU, on a CPU two "
    "workers or one for every eight cores)",
    "group_size": "model-parallel: workers that hold one replica together (default: 2)",
    "strategy": "model-parallel: pipeline, layers cut into stages; tensor, every large weight cut "
    "into slices; auto says which it takes and why (default: auto)",
    "dtype": "auto: float32 on CPU, bfloat16 where the device has it, else float16, beside int8 "
    "float32 (default: auto)",
    "quantization": "weights as int8 (activations too, as they come) or int4, made layer by layer "
    "while loading, LoRA merged before; needs no flag with a prepared preset (default: none)",
    "max_tokens_per_batch": "rows x padded length of a batch (default: auto, by device)",
    "address": "HOST:PORT of a running Ray cluster to join, or auto for the one that this machine "
    "is a node of; nodes that have not got the model's files are sent them (default: Ray is "
    "started here for this run)",
    "time_limit": "8h45m, 90m, 30s: a submission stands by then, counted from the start of the "
    "process, loading and writing included (default: none)",
    "on_deadline": "where the time does not suffice: shorten, cut the rows that are left to the "
    "longest length at which all fit; fill, whole rows as long as there is time and the fallback "
    "for the others; fail, exit code 3 with the journal kept (default: shorten)",
    "min_sequence_length": "tokens below which no row is cut (default: a quarter of "
    "--sequence-length)",
    "fallback_probabilities": "a,b,c, one a label, for rows that have no answer of the model "
    "(default: the mean of those that have)",
    "extra_passes": "swap: where time is left, rows are predicted again with their two responses "
    "exchanged, the most uncertain first, and averaged (default: none)",
    "resume": "auto: go on from the journal where it is of the same test set, model and settings, "
    "else start afresh; require: go on or end with exit code 2; never: start afresh "
    "(default: auto)",
    "journal": "where rows are kept as they are done (default: OUTPUT.journal)",
    "report": "where the JSON report is written, and beside it a page and a trace (default: "
    "OUTPUT.report.json)",
    "plan": "print what fits these devices, how long it should take and why, write it as JSON to "
    "OUTPUT.plan.json, and stop; needs no weights and no head (default: off)",
    "device": "with --plan: forecast for another device, --num-workers of them (t4, l4, a100, "
    "a100-80gb, h100, h200, v5e, v3-8; default: those that are here)",
    "calibrate": "with --plan: run a few batches on the devices here and forecast from them; needs "
    "weights and head (default: off)",
    "log_dir": "folder for the log of the run and all that its workers write, at most 8 MB a "
    "process (default: OUTPUT.logs)",
    "log_format": "of standard error; json: one object a line, with time, level, event, message; "
    "and one object on standard output at the end (default: text)",
    "metrics_port": "serve figures of the run for Prometheus on 127.0.0.1 while it lasts; 0 takes "
    "any free port and says which (default: none)",
    "verbose": "show what libraries and workers log, and tracebacks (default: off)",
}

# Heading -> what it groups: every flag of a run, once.
GROUPS: dict[str, tuple[str, ...]] = {
    "data": ("input", "output", "text_format", "sequence_length"),
    "model": ("preset", "lora_weights", "head_kernel", "head_bias", "pooling"),
    "devices": (
        *("mode", "address", "num_workers", "group_size", "strategy", "max_tokens_per_batch"),
    ),
    "precision": ("dtype", "quantization"),
    "deadline": (
        *("time_limit", "on_deadline", "min_sequence_length", "fallback_probabilities"),
        "extra_passes",
    ),
    "resuming": ("resume", "journal"),
    "plan": ("plan", "device", "calibrate"),
    "what is said and kept": ("report", "log_dir", "log_format", "metrics_port", "verbose"),
}


METAVARS = {
    "address": "ADDRESS",
    "time_limit": "8h45m",
    "device": "NAME",
    "fallback_probabilities": "A,B,C",
    "metrics_port": "PORT",
    "num_workers": "N|auto",
    "group_size": "N",
    "sequence_length": "TOKENS",
    "min_sequence_length": "TOKENS",
    "max_tokens_per_batch": "TOKENS|auto",
}
# Columns that --help fills at most, and where its texts begin.
HELP_WIDTH, HELP_INDENT = 96, 26

PREPARE_HELP = {
    "preset": "KerasHub preset directory with float weights, or a checkpoint of Hugging Face "
    "transformers, which is converted",
    "output": "the directory to make: a KerasHub preset, for --preset of a run",
    "quantization": "int8, int4, or none to merge LoRA only (default: int8)",
    "lora_weights": HELP["lora_weights"],
    "dtype": "of all that is not quantized, and of the weights before; name the one of the run "
    "for the very numbers of --quantization there (default: auto, float32)",
    "head_kernel": "with --head-bias: measures how far the answers lie from float32's",
    "head_bias": ".npy of shape (classes,)",
    "input": "its first rows are measured (default: made-up rows)",
    "pooling": "for that measurement (default: padded-mean)",
    "sequence_length": "for that measurement (default: 512)",
    "text_format": "for that measurement (default: raw)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: None for the process' own, which then ends here where it would not end by itself.
    """
    code = _main(argv)
    if argv is None and any(thread.name == BUSY_THREAD for thread in threading.enumerate()):
        # Inside native code that nothing interrupts: the process would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    started = time.monotonic() - (process_age_s() if argv is None else 0.0)
    interrupts = _Interrupts()
    interrupts.install()
    verbose = False
    arguments = list(sys.argv[1:] if argv is None else argv)
    fail = _Failure(arguments)
    try:
        if arguments[:1] == ["prepare"]:
            from runner.prepare import prepare

            prepare(parse_prepare_arguments(arguments[1:]), started=started)
            return 0
        config = parse_arguments(arguments)
        verbose = config.verbose and config.log_format != "json"
        fail.is_json = config.log_format == "json"
        if config.plan:
            from runner.planner.command import plan

            plan(config, started=started)
            return 0
        from runner.driver.run import run  # pandas takes half a second; --help and typos need not

        fail.log = config.log_folder / DRIVER_LOG
        run(config, started=started, on_signals_taken=interrupts.install, owns_process=True)
        return 0
    except (ConfigError, DataError) as error:
        return fail(f"error: {on_one_line(error)}", EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        return fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except DeadlineError as error:
        return fail(f"error: {error}", EXIT_DEADLINE)
    except ArenaRunnerError as error:
        if verbose:
            raise
        return fail(f"error: {error}", EXIT_FAILED)
    except Exception as error:
        if verbose:
            raise
        where = f"{fail.log} says" if fail.log and fail.log.is_file() else "--verbose shows"
        return fail(
            f"error: {type(error).__name__}: {first_line(error)}\n"
            f"This is a bug, or a machine in trouble: {where} where.",
            EXIT_FAILED,
        )
    finally:
        interrupts.stop_watching()


def process_age_s() -> float:
    """Return for how long this process has been running, 0 where the system does not say."""
    try:
        # Field 22 of proc(5), in ticks since the machine started; the name before may hold spaces.
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(stat[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


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


class _Interrupts:
    """SIGINT and SIGTERM: the first unwinds the run, a second ends the process at once.

    Ray and others replace handlers when they start, so `install` is called again after that. The
    handlers wait until the main thread is out of native code, in which Ray may stay for long while
    it ends; a thread that is told by the kernel's own handler need not.
    """

    def __init__(self) -> None:
        self._interrupted = False
        # Signals that came, and of those the ones that were given again.
        self._signals = self._again = 0
        self._told: int | None = None

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # of another program, whose signals are its own
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if self._told is None:
            self._others_hook = sys.unraisablehook
            sys.unraisablehook = self._take_ignored
            reader, self._told = os.pipe()
            os.set_blocking(self._told, False)
            signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def stop_watching(self) -> None:
        """Give back what is one a process; the handlers stay."""
        if self._told is not None:
            sys.unraisablehook = self._others_hook
            signal.set_wakeup_fd(-1)
            os.close(self._told)
            self._told = None

    def _watch(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                self._signals += number[0] in (signal.SIGINT, signal.SIGTERM)
                if self._signals - self._again > 1:
                    os._exit(EXIT_INTERRUPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            os._exit(EXIT_INTERRUPTED)
        self._interrupted = True
        raise KeyboardInterrupt

    def _take_ignored(self, ignored: "sys.UnraisableHookArgs") -> None:
        """A signal that came inside a destructor or JAX's callback of the garbage collector, which
        drop what is raised there, comes again a moment later."""
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            self._others_hook(ignored)
            return
        self._interrupted = False
        self._again += 1
        again = threading.Timer(AGAIN_AFTER_S, _thread.interrupt_main)
        again.daemon = True
        again.start()


class _Failure:
    """Says why the command ends, in the form that was asked for, and returns its exit code.

    Attributes:
        is_json: known from the arguments alone until there is a config.
        log: what a run writes that got as far as that.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        named = ("--log-format", "json") in pairwise(arguments)
        self.is_json = named or "--log-format=json" in arguments
        self.log: Path | None = None

    def __call__(self, message: str, code: int) -> int:
        if self.is_json:
            error = sys.exception()
            told = {} if error is None else {"traceback": traceback.format_exception(error)}
            facts = {"exit_code": code, "error": type(error).__name__} | (
                told if code == EXIT_FAILED else {}
            )
            event = LogEvent("end", message.removeprefix("error: "), "error", facts)
            message = event.as_json()
        print(message, file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
