"""The flags: one table, with everything about a flag in its row.

The parser, `--help`, TOML keys, conversions, defaults, checks of where a flag applies, and the
command that a plan prints all come from these rows. To add a flag, add a row here and a field to
`RunConfig`. Longer than other files, to keep the table in one piece.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.common.poolings import POOLINGS
from runner.config.readers import (
    flag,
    read_count,
    read_count_or_auto,
    read_duration,
    read_numbers,
    read_path,
    read_port,
    read_switch,
    read_text,
    refused,
)
from runner.config.suffixes import USUAL_SUFFIXES, either

DATA_PARALLEL, MODEL_PARALLEL, SINGLE = MODES = ("data-parallel", "model-parallel", "single")
# Where a flag may apply.
RUN, PLAN = "a run", "--plan"
DEFAULT_GROUP_SIZE = 2


class DefaultLength(int):
    """A sequence length that the user did not set: a preset may bring its own (`settle`)."""


class DefaultPooling(str):
    """A pooling that the user did not set: a preset may bring its own (`settle`)."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag and the setting of the same name.

    name: the field of `RunConfig`; the flag has - for _.
    group: its heading in `--help`.
    default: None: decided later, or the demo's file.
    default_note: what `--help` adds after the default.
    choices: the allowed values; empty for any.
    read: converts a given value, or raises ConfigError.
    modes, commands: where it applies; elsewhere only the default is accepted.
    bare: the value if the flag is passed without one; None if it needs a value.
    calibrates: whether --calibrate's run takes it too. The command that --plan prints takes every
    flag of a run.
    prepare: the fields that differ in `run.py prepare`; None if it does not take the flag.
    """

    name: str
    group: str
    help: str
    default: Any = None
    default_note: str = ""
    choices: tuple[str, ...] = ()
    read: Callable[[str, Any], Any] = read_text
    metavar: str = "FILE"
    required: bool = False
    modes: tuple[str, ...] = MODES
    commands: tuple[str, ...] = (RUN, PLAN)
    bare: str | None = None
    calibrates: bool = True
    prepare: Mapping[str, Any] | None = None

    def value(self, given: Any) -> Any:
        """Return the setting's value.

        Raises:
            ConfigError: `given` has the wrong type, is out of range or is not a choice.
        """
        if given is None and self.default is None and not self.required:
            return None
        value = self.read(self.name, given)
        if self.choices and value not in self.choices:
            raise refused(self.name, f"one of {', '.join(self.choices)}", value)
        return value

    def help_text(self) -> str:
        """Return what `--help` says about the flag."""
        default = "" if self.default is None else str(self.default)
        default = ("off" if self.default is False else default) + self.default_note
        return f"{self.help} (default: {default})" if default else self.help

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add the flag to a parser; its value is text, or True."""
        options: dict[str, Any] = {"metavar": self.metavar}
        if self.read is read_switch:
            options = {"action": "store_true"}
        elif self.choices:
            options = {"metavar": "{" + ",".join(self.choices) + "}"}
        if self.bare is not None:
            options |= {"nargs": "?", "const": self.bare}
        parser.add_argument(flag(self.name), dest=self.name, help=self.help_text(), **options)


FLAGS: tuple[Flag, ...] = (
    Flag(
        name="input",
        group="data",
        read=read_path,
        help="CSV, Parquet or JSON lines (.jsonl) with columns id, prompt, response_a and "
        "response_b, or those that [task] in --config names",
        default_note="the demo set",
        prepare={
            "help": "test set whose first rows are used to measure accuracy",
            "default_note": "made-up rows",
        },
    ),
    Flag(
        name="output",
        group="data",
        read=read_path,
        help=f"the submission to write: {either(USUAL_SUFFIXES)}",
        default=Path("submission.csv"),
        prepare={
            "help": "directory to create: a KerasHub preset, for --preset of a run",
            "default": None,
            "required": True,
            "metavar": "DIR",
        },
    ),
    Flag(
        name="text_format",
        group="data",
        choices=("raw", "turns"),
        help="raw: use cells as they are; turns: decode JSON lists and join the turns with a "
        "newline",
        default="raw",
        prepare={"help": "for measuring accuracy, as in a run"},
    ),
    Flag(
        name="sequence_length",
        group="data",
        read=read_count,
        metavar="TOKENS",
        help="truncate rows to this many tokens; use the length of training",
        default=DefaultLength(512),
        default_note=" tokens, or that of a TextClassifier's own preprocessor",
        prepare={"help": "for measuring accuracy, as in a run"},
    ),
    Flag(
        name="preset",
        group="model",
        read=read_path,
        metavar="DIR",
        help="KerasHub preset directory: a backbone, or a whole TextClassifier with its own head",
        default_note="the demo preset, with random weights",
        prepare={
            "help": "KerasHub preset directory with float weights, or a Hugging Face transformers "
            "checkpoint, which is converted",
            "default_note": "",
            "required": True,
        },
    ),
    Flag(
        name="lora_weights",
        group="model",
        read=read_path,
        help="*.lora.h5 saved from that backbone; merged into its kernels",
        default_note="none",
        prepare={},
    ),
    Flag(
        name="head_kernel",
        group="model",
        read=read_path,
        help=".npy of shape (hidden, classes) (needed with --preset if [task] has a head and the "
        "preset has none)",
        prepare={"help": "with --head-bias: measure how far the answers are from float32"},
    ),
    Flag(
        name="head_bias",
        group="model",
        read=read_path,
        help=".npy of shape (classes,) (needed with --head-kernel)",
        prepare={},
    ),
    Flag(
        name="pooling",
        group="model",
        choices=tuple(POOLINGS),
        help="how hidden states become one vector; padded-mean is the notebook's mean over all "
        "positions, padding included; first and pooler are for encoders",
        default=DefaultPooling("padded-mean"),
        default_note=", or that of a TextClassifier's own head",
        prepare={"help": "for measuring accuracy, as in a run"},
    ),
    Flag(
        name="mode",
        group="devices",
        choices=MODES,
        help="data-parallel: Ray workers, one replica each; model-parallel: groups of Ray workers, "
        "one replica per group; single: this process, no Ray",
        default=DATA_PARALLEL,
    ),
    Flag(
        name="address",
        group="devices",
        metavar="ADDRESS",
        help="HOST:PORT of a running Ray cluster to join, or auto for the cluster that this "
        "machine is a node of; nodes that lack the model's files receive them",
        default_note="start Ray here for this run",
        modes=(DATA_PARALLEL, MODEL_PARALLEL),
        commands=(RUN,),
    ),
    Flag(
        name="num_workers",
        group="devices",
        read=read_count_or_auto,
        metavar="N|auto",
        help="number of workers, one device each",
        default_note="auto, every GPU or TPU; on a CPU two workers, or one for every eight cores",
    ),
    Flag(
        name="group_size",
        group="devices",
        read=read_count,
        metavar="N",
        help="number of workers that hold one replica together",
        default_note=str(DEFAULT_GROUP_SIZE),
        modes=(MODEL_PARALLEL,),
    ),
    Flag(
        name="strategy",
        group="devices",
        choices=("auto", "tensor", "pipeline"),
        help="pipeline: split the layers into stages; tensor: split every large weight into "
        "slices; auto: choose one and say why",
        default_note="auto",
        modes=(MODEL_PARALLEL,),
    ),
    Flag(
        name="max_tokens_per_batch",
        group="devices",
        read=read_count_or_auto,
        metavar="TOKENS|auto",
        help="largest rows x padded length in a batch",
        default_note="auto, by device",
    ),
    Flag(
        name="dtype",
        group="precision",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="auto: float32 on a CPU; elsewhere bfloat16 if the device has it, else float16",
        default="auto",
        prepare={
            "help": "dtype to load weights in, and to store those that are not quantized; pass the "
            "run's dtype to get exactly the numbers of its --quantization",
            "default_note": ", float32",
        },
    ),
    Flag(
        name="quantization",
        group="precision",
        choices=("none", "int8", "int4"),
        help="quantize weights to int8 (and activations on the fly) or int4, layer by layer while "
        "loading, after merging LoRA; not needed with a prepared preset",
        default="none",
        prepare={"help": "int8, int4, or none to merge LoRA only", "default": "int8"},
    ),
    Flag(
        name="time_limit",
        group="deadline",
        read=read_duration,
        metavar="8h45m",
        help="8h45m, 90m, 30s: write a submission within this time, counted from the start of the "
        "process, loading and writing included",
        default_note="none",
        calibrates=False,
    ),
    Flag(
        name="on_deadline",
        group="deadline",
        choices=("shorten", "fill", "fail"),
        help="if time is short: shorten truncates the remaining rows to the greatest length at "
        "which all fit; fill predicts whole rows while there is time and uses the fallback for "
        "the others; fail ends with exit code 3 and keeps the journal",
        default="shorten",
        calibrates=False,
    ),
    Flag(
        name="min_sequence_length",
        group="deadline",
        read=read_count,
        metavar="TOKENS",
        help="never truncate a row below this many tokens for lack of time",
        default_note="a quarter of --sequence-length",
        calibrates=False,
    ),
    Flag(
        name="fallback_probabilities",
        group="deadline",
        read=read_numbers,
        metavar="A,B,C",
        help="one number per label, for rows without an answer from the model",
        default_note="the mean of the predicted rows",
        calibrates=False,
    ),
    Flag(
        name="extra_passes",
        group="deadline",
        choices=("none", "swap"),
        help="swap: if time is left, predict rows again with their two responses swapped, most "
        "uncertain rows first, and average the answers",
        default="none",
        calibrates=False,
    ),
    Flag(
        name="resume",
        group="resuming",
        choices=("auto", "never", "require"),
        help="auto: resume if the journal belongs to the same test set, model and settings, else "
        "start afresh; require: resume or end with exit code 2; never: start afresh",
        default="auto",
        calibrates=False,
    ),
    Flag(
        name="journal",
        group="resuming",
        read=read_path,
        help="where finished rows are kept during the run",
        default_note="OUTPUT.journal",
        calibrates=False,
    ),
    Flag(
        name="plan",
        group="plan",
        read=read_switch,
        help="print what fits these devices, how long it should take and why, write it as JSON to "
        "OUTPUT.plan.json, and stop; needs no weights and no head",
        default=False,
        calibrates=False,
    ),
    Flag(
        name="device",
        group="plan",
        metavar="NAME",
        help="with --plan: forecast for --num-workers devices of another kind (t4, l4, a100, "
        "a100-80gb, h100, h200, v5e, v6e, v3-8)",
        default_note="the devices here",
        commands=(PLAN,),
    ),
    Flag(
        name="calibrate",
        group="plan",
        read=read_switch,
        help="with --plan: run a few batches on the devices here and forecast from them; needs "
        "weights and head",
        default=False,
        commands=(PLAN,),
    ),
    Flag(
        name="compile",
        group="plan",
        choices=("largest", "all"),
        bare="largest",
        help="with --plan: compile the programs of the recommended way and its alternatives for "
        "the device, which need not be here, for the largest shape or for all shapes, and show "
        "XLA's own account of memory; needs the extra compile-cuda or compile-tpu",
        default_note="nothing; largest if no value is given",
        commands=(PLAN,),
    ),
    Flag(
        name="report",
        group="reports and logs",
        read=read_path,
        help="where to write the JSON report, with a page and a trace beside it",
        default_note="OUTPUT.report.json",
        calibrates=False,
    ),
    Flag(
        name="log_dir",
        group="reports and logs",
        read=read_path,
        metavar="DIR",
        help="folder for the logs of the run and its workers, at most 8 MB per process",
        default_note="OUTPUT.logs",
        calibrates=False,
    ),
    Flag(
        name="log_format",
        group="reports and logs",
        choices=("text", "json"),
        help="format of standard error; json: one object per line with time, level, event and "
        "message, and one object on standard output at the end",
        default="text",
        calibrates=False,
    ),
    Flag(
        name="metrics_port",
        group="reports and logs",
        read=read_port,
        metavar="PORT",
        help="serve the run's metrics to Prometheus on 127.0.0.1; 0 takes any free port and prints "
        "it",
        default_note="none",
        calibrates=False,
    ),
    Flag(
        name="verbose",
        group="reports and logs",
        read=read_switch,
        help="show tracebacks, and the log output of libraries and workers",
        default=False,
        calibrates=False,
    ),
)
# Names a file of settings, and is not a setting itself.
CONFIG = Flag(
    name="config",
    group="other",
    read=read_path,
    metavar="FILE.toml",
    help="read flags from a TOML file, by the same names; flags win. Its [task] table sets "
    "columns, text, labels and head if they are not the contest's",
    default_note="none",
    prepare={"help": "the TOML file of a run; only its [task] is used", "default_note": ""},
)
PREPARE_FLAGS = tuple(replace(row, **row.prepare) for row in FLAGS if row.prepare is not None)
BY_NAME = {row.name: row for row in FLAGS}
DEFAULTS: dict[str, Any] = {row.name: row.default for row in FLAGS}
PREPARE_DEFAULTS: dict[str, Any] = {row.name: row.default for row in PREPARE_FLAGS}
