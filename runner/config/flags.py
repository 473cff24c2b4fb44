"""The flags of a run: their names, choices, defaults and help, and how each value is read.

Does not know how flags go together (`run_config.py`), nor a command line (`parser.py`).
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.poolings import POOLINGS
from runner.config.task import make_task

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("data-parallel", "model-parallel", "single"),
    "strategy": ("auto", "tensor", "pipeline"),
    "pooling": tuple(POOLINGS),
    "text_format": ("raw", "turns"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "quantization": ("none", "int8", "int4"),
    "on_deadline": ("shorten", "fill", "fail"),
    "extra_passes": ("none", "swap"),
    "resume": ("auto", "never", "require"),
    "log_format": ("text", "json"),
}
PATHS = (
    *("input", "output", "preset", "lora_weights", "head_kernel", "head_bias"),
    *("journal", "report", "log_dir"),
)
COUNTS = (
    *("sequence_length", "num_workers", "group_size", "max_tokens_per_batch"),
    "min_sequence_length",
)
SWITCHES = ("plan", "calibrate", "verbose")
# Of int32, in which lengths go to the model.
MOST_COUNT = 2**31 - 1
LAST_PORT = 65535
AUTO_COUNTS = ("num_workers", "max_tokens_per_batch")


class DefaultLength(int):
    """A sequence length that nobody asked for: a preset may bring its own (`resolve.settle`)."""


class DefaultPooling(str):
    """A pooling that nobody asked for, as `DefaultLength`."""

    __slots__ = ()


DEFAULT_LENGTH, DEFAULT_POOLING = DefaultLength(512), DefaultPooling("padded-mean")


def converted(field: "Field[Any]", value: Any) -> Any:
    name = field.name
    if name in COUNTS:
        return value if isinstance(value, DefaultLength) else parse_count(name, value)
    if name in PARSERS:
        return PARSERS[name](value)
    if name in PATHS:
        if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
            raise ConfigError(f"{flag(name)} must be a path. Received: {name}={value!r}")
        return Path(value)
    expected = bool if name in SWITCHES else str
    if not isinstance(value, expected):
        kind = "true or false" if name in SWITCHES else "text"
        raise ConfigError(f"{flag(name)} must be {kind}. Received: {name}={value!r}")
    return value


def flag(name: str) -> str:
    """Return the flag of a field: head_kernel -> --head-kernel."""
    return "--" + name.replace("_", "-")


def parse_count(name: str, value: Any) -> int | None:
    """Return a whole number, or None for `auto` where the field allows it.

    Raises:
        ConfigError: anything else.
    """
    automatic = name in AUTO_COUNTS
    if automatic and value == "auto":
        return None
    try:
        if type(value) not in (int, str):
            raise ValueError
        return int(value)
    except ValueError:
        raise ConfigError(
            f"{flag(name)} must be a whole number of at least 1{' or auto' if automatic else ''}. "
            f"Received: {flag(name)} {value}"
        ) from None


def parse_time_limit(value: Any) -> float:
    """Return seconds: 8h45m, 90m, 1h, 30s, 2h15m30s, or a finite number of seconds.

    Raises:
        ConfigError: anything else.
    """
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(value).strip())
    if isinstance(value, bool) or parts is None or not any(parts.groups()):
        raise ConfigError(
            "--time-limit must be hours, minutes and seconds such as 8h45m, 90m or 30s. "
            f"Received: --time-limit {value}"
        )
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_fallback(value: Any) -> tuple[float, ...]:
    """Return probabilities: 0.4,0.3,0.3, or a list of numbers.

    Raises:
        ConfigError: anything else.
    """
    try:
        return tuple(float(part) for part in (value.split(",") if type(value) is str else value))
    except (TypeError, ValueError):
        raise ConfigError(
            "--fallback-probabilities must be numbers with commas between them, such as "
            f"0.35,0.35,0.3. Received: --fallback-probabilities {value}"
        ) from None


def parse_port(value: Any) -> int:
    """Return a port of this machine, 0 for any that is free.

    Raises:
        ConfigError: anything else.
    """
    port = int(value) if type(value) is str and value.isascii() and value.isdigit() else value
    if type(port) is not int or not 0 <= port <= LAST_PORT:
        raise ConfigError(
            f"--metrics-port must be a whole number from 0, any free port, to {LAST_PORT}. "
            f"Received: --metrics-port {value}"
        )
    return port


# Fields that are read from more than text, a count or a path.
PARSERS: dict[str, Callable[[Any], Any]] = {
    "time_limit": parse_time_limit,
    "fallback_probabilities": parse_fallback,
    "metrics_port": parse_port,
    "task": make_task,
}


def typed(path: Path, name: str, value: Any) -> Any:
    if name in COUNTS:
        return parse_count(name, value)
    if name in PARSERS:
        return PARSERS[name](value)
    expected = bool if name in SWITCHES else str
    if type(value) is not expected:
        raise ConfigError(
            f"{path} gives {name} a value of another type than {expected.__name__}. "
            f"Received: {name} = {value!r}"
        )
    if name in PATHS and "\0" in str(value):
        raise ConfigError(f"{path} must name files without NUL. Received: {name} = {value!r}")
    return Path(str(value)) if name in PATHS else value


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
