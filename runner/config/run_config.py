"""Flags, a TOML file of the same names, or Python values -> one frozen, checked RunConfig.

Does not open the files it names (the stage that reads a file checks it), nor know devices.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.config.flags import (
    CHOICES,
    COUNTS,
    DEFAULT_LENGTH,
    DEFAULT_POOLING,
    MOST_COUNT,
    converted,
    flag,
    typed,
)
from runner.config.task import CONTEST, Task
from sharding.dtypes import dtype_beside

DEFAULT_GROUP_SIZE = 2
# Of the sequence length, what is always left of a row where no --min-sequence-length is named.
FLOOR_DIVISOR = 4
# Of the demo model's head.
DEMO_CLASSES = 3
# Of float32, in which the head's numbers are kept.
MOST_VALUE = 3.4e38


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What a person asked for. `None` means: the demo's file, or decided from the devices.

    Values may be as on the command line too: a path, a time limit or a count as a string.

    Raises:
        ConfigError: a value is outside its choices, or the files named do not make a whole.
    """

    mode: str = "data-parallel"
    input: Path | None = None
    output: Path = Path("submission.csv")
    preset: Path | None = None
    lora_weights: Path | None = None
    head_kernel: Path | None = None
    head_bias: Path | None = None
    pooling: str = DEFAULT_POOLING
    sequence_length: int = DEFAULT_LENGTH
    text_format: str = "raw"
    num_workers: int | None = None
    group_size: int | None = None
    strategy: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    max_tokens_per_batch: int | None = None
    time_limit: float | None = None
    on_deadline: str = "shorten"
    min_sequence_length: int | None = None
    fallback_probabilities: tuple[float, ...] | None = None
    extra_passes: str = "none"
    resume: str = "auto"
    journal: Path | None = None
    report: Path | None = None
    plan: bool = False
    device: str | None = None
    calibrate: bool = False
    log_dir: Path | None = None
    log_format: str = "text"
    metrics_port: int | None = None
    address: str | None = None
    verbose: bool = False
    task: Task = CONTEST

    def __post_init__(self) -> None:
        _convert_values(self)
        _check_values(self)
        for name in ("output", "report", "journal", "log_dir"):
            path = getattr(self, name)
            if path is not None and not path.name:
                raise ConfigError(f"{flag(name)} must name a file. Received: {flag(name)} {path}")
        if self.mode == "single" and self.num_workers not in (None, 1):
            raise ConfigError(
                "--mode single is one process; use --mode data-parallel for several workers. "
                f"Received: --num-workers {self.num_workers}"
            )
        self._check_address()
        self._check_groups()
        self._check_model_files()
        self._check_task()
        check_dtype(self.dtype, self.quantization)
        self._check_plan()
        if self.output.suffix.lower() == ".json":
            raise ConfigError(
                "--output is written as CSV, Parquet or JSON lines: name it .csv, .parquet or "
                f".jsonl. Received: --output {self.output}"
            )
        if self.time_limit is not None and not self.time_limit > 0:
            raise ConfigError(
                "--time-limit must be longer than nothing, such as 8h45m. Received: --time-limit "
                f"{self.time_limit:g}"
            )
        self._check_fallback()
        beside = (self.rows_path, self.page_path, self.trace_path)
        written = (self.output, self.report_path, *beside, self.journal_path, self.log_folder)
        named = [path for path in (self.input, *written) if path is not None]
        if len({path.resolve() for path in named}) != len(named):
            raise ConfigError(
                "--input, --output, --journal, --report and --log-dir must be different files. "
                "Received: " + ", ".join(str(path) for path in named)
            )

    @property
    def report_path(self) -> Path:
        return self.report or self.output.with_name(self.output.name + ".report.json")

    @property
    def plan_path(self) -> Path:
        return self.output.with_name(self.output.name + ".plan.json")

    @property
    def rows_path(self) -> Path:
        """The table of how each row was made, beside the report."""
        return self._beside_report(".rows.csv")

    @property
    def page_path(self) -> Path:
        """The report as a page, beside it."""
        return self.report_path.with_name(self.report_path.name.removesuffix(".json") + ".html")

    @property
    def trace_path(self) -> Path:
        """What each worker did when, for Perfetto, beside the report."""
        return self._beside_report(".trace.json")

    @property
    def journal_path(self) -> Path:
        return self.journal or self.output.with_name(self.output.name + ".journal")

    @property
    def log_folder(self) -> Path:
        return self.log_dir or self.output.with_name(self.output.name + ".logs")

    @property
    def floor_length(self) -> int:
        """The fewest tokens that a row is cut to where time is short."""
        return self.min_sequence_length or max(1, self.sequence_length // FLOOR_DIVISOR)

    @property
    def members(self) -> int:
        """Workers that hold one replica together."""
        return (self.group_size or DEFAULT_GROUP_SIZE) if self.mode == "model-parallel" else 1

    @property
    def uses_demo_model(self) -> bool:
        return self.preset is None

    def _beside_report(self, ending: str) -> Path:
        stem = self.report_path.name.removesuffix(".json").removesuffix(".report")
        return self.report_path.with_name(stem + ending)

    def _check_fallback(self) -> None:
        values = self.fallback_probabilities
        if values is None:
            return
        head, count = self.task.head, len(self.task.label_columns)
        least, most = (-MOST_VALUE, MOST_VALUE) if head == "regression" else (0, 1)
        if head == "none":
            raise ConfigError(
                "--fallback-probabilities is for a head; without one, rows that have no answer of "
                "the model get the mean of those that have. Received: [task] head none"
            )
        if (
            len(values) != count
            or not all(least <= value <= most for value in values)
            or (head == "softmax" and abs(sum(values) - 1) > 1e-6)
        ):
            expected = {
                "softmax": "numbers from 0 to 1 that sum to one",
                "sigmoid": "numbers from 0 to 1",
            }.get(head, "finite numbers")
            raise ConfigError(
                f"--fallback-probabilities must be {count} {expected}. "
                f"Received: --fallback-probabilities {','.join(f'{value:g}' for value in values)}"
            )

    def _check_address(self) -> None:
        for name, value, why in (
            ("mode", "single", "is this process alone; the other modes use a cluster"),
            ("plan", True, "looks at this machine; --device NAME --num-workers N asks of others"),
        ):
            if self.address is not None and getattr(self, name) == value:
                said = "" if value is True else f" {value}"
                raise ConfigError(
                    f"{flag(name)}{said} {why}. Received: {flag(name)}{said} --address "
                    f"{self.address}"
                )

    def _check_groups(self) -> None:
        if self.mode != "model-parallel":
            for name in ("group_size", "strategy"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{flag(name)} is for --mode model-parallel. Received: --mode {self.mode} "
                        f"{flag(name)} {getattr(self, name)}"
                    )
            return
        if self.members < 2:
            raise ConfigError(
                "A group has at least two members; one device holds a replica in --mode "
                f"data-parallel. Received: --group-size {self.members}"
            )
        if self.num_workers is not None and self.num_workers % self.members:
            raise ConfigError(
                f"Workers must make whole groups of {self.members}. "
                f"Received: --num-workers {self.num_workers}"
            )

    def _check_model_files(self) -> None:
        head = {"head_kernel": self.head_kernel, "head_bias": self.head_bias}
        if self.preset is None:
            given = {**head, "lora_weights": self.lora_weights}
            if stray := [flag(name) for name, path in given.items() if path is not None]:
                raise ConfigError(
                    f"{' and '.join(stray)} needs --preset DIR: without it the demo model runs."
                )
            return
        if self.task.head == "none":
            if stray := [flag(name) for name, path in head.items() if path is not None]:
                raise ConfigError(
                    "[task] head none writes the pooled hidden states and takes no head. "
                    f"Received: {' and '.join(stray)}"
                )
            return
        # Whether the preset brings a head of its own is found where it is read.
        missing = [flag(name) for name, path in head.items() if path is None]
        if len(missing) == 1:
            raise ConfigError(
                f"--head-kernel FILE.npy of shape (hidden, classes) and --head-bias FILE.npy of "
                f"shape (classes,) go together. Missing: {missing[0]}"
            )

    def _check_task(self) -> None:
        """What the demo's files and the flags ask of a task."""
        task = self.task
        if self.preset is None and task.head != "none" and len(task.label_columns) != DEMO_CLASSES:
            raise ConfigError(
                f"[task] needs --preset and a head of its own: that of the demo model has "
                f"{DEMO_CLASSES} classes. Received: {len(task.label_columns)} labels"
            )
        if self.input is None and (missing := _not_in_the_demo(task)):
            raise ConfigError(
                f"[task] needs --input FILE: the demo set has no column {missing[0]}. "
                f"It has {', '.join(CONTEST.input_columns)}"
            )
        if self.extra_passes == "swap" and not task.swap:
            raise ConfigError(
                "--extra-passes swap needs two text columns that may be exchanged: swap, and "
                "swap_labels where labels change places with them, in [task]. "
                "Received: --extra-passes swap and a task without"
            )

    def _check_plan(self) -> None:
        for name in ("device", "calibrate"):
            if getattr(self, name) and not self.plan:
                raise ConfigError(f"{flag(name)} goes with --plan. Received: {flag(name)} alone")
        if self.device is not None and self.calibrate:
            raise ConfigError(
                "--calibrate measures the devices here, --device names one that is elsewhere. "
                f"Received: --device {self.device} --calibrate"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """What a person asked `prepare` for. The head and the input serve to measure what
    quantization costs in accuracy; without a head that is left out.

    Raises:
        ConfigError: a value is outside its choices, or a file is missing.
    """

    preset: Path
    output: Path
    quantization: str = "int8"
    lora_weights: Path | None = None
    dtype: str = "auto"
    head_kernel: Path | None = None
    head_bias: Path | None = None
    input: Path | None = None
    pooling: str = DEFAULT_POOLING
    sequence_length: int = DEFAULT_LENGTH
    text_format: str = "raw"
    task: Task = CONTEST

    def __post_init__(self) -> None:
        _check_values(self)
        check_dtype(self.dtype, self.quantization)
        if (self.head_kernel is None) != (self.head_bias is None):
            raise ConfigError(
                "--head-kernel and --head-bias go together. Received: "
                f"{'--head-kernel' if self.head_kernel else '--head-bias'} alone"
            )
        if self.head_kernel is not None and self.task.head == "none":
            raise ConfigError(
                "[task] head none writes the pooled hidden states and takes no head. "
                f"Received: --head-kernel {self.head_kernel}"
            )


def _convert_values(config: "RunConfig | PrepareConfig") -> None:
    """Turn what a field may be given as into what it is, while the config is made.

    Raises:
        ConfigError: a value is of another type than its field.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None and field.default is None:
            continue
        # Frozen from here on.
        object.__setattr__(config, field.name, converted(field, value))


def check_dtype(dtype: str, quantization: str | None) -> None:
    """Raise ConfigError where layers of such weights cannot compute in a dtype."""
    if dtype_beside(quantization, dtype) != dtype:
        raise ConfigError(
            f"{quantization} weights do not go with --dtype {dtype}, which is too small for the "
            "sums of their products: name auto, float32 or bfloat16. "
            f"Received: --dtype {dtype}"
        )


def _check_values(config: "RunConfig | PrepareConfig") -> None:
    """Raise ConfigError where a field is outside its choices or a count is not positive."""
    named = {field.name for field in fields(config)}
    for name in CHOICES.keys() & named:
        value = getattr(config, name)
        if value not in (*CHOICES[name], None):
            raise ConfigError(
                f"{flag(name)} must be one of {', '.join(CHOICES[name])}. "
                f"Received: {flag(name)} {value}"
            )
    for name in {*COUNTS} & named:
        value = getattr(config, name)
        if value is not None and not 1 <= value <= MOST_COUNT:
            raise ConfigError(
                f"{flag(name)} must be a whole number of at least 1 and at most {MOST_COUNT}. "
                f"Received: {flag(name)} {value}"
            )


def _not_in_the_demo(task: Task) -> list[str]:
    return [name for name in task.input_columns if name not in CONTEST.input_columns]


def make_config(flags: Mapping[str, Any], config_file: Path | None = None) -> RunConfig:
    """Return the config that a TOML file and flags make together; flags win.

    Args:
        flags: field name -> value, only those that were given.
        config_file: a TOML table of the flags' names, with - or _, and `[task]`, for which see
            `task.make_task`. Paths in it are relative to the working directory, as on the command
            line.

    Raises:
        ConfigError: the file cannot be read, names an unknown key or a value of another type.
    """
    values = _read_toml(config_file) if config_file is not None else {}
    return RunConfig(**{**values, **flags})


def read_task(config_file: Path) -> Task:
    """Return the task of a run's TOML file, whatever else is in it.

    Raises:
        ConfigError: as `make_config`.
    """
    task: Task = _read_toml(config_file).get("task", CONTEST)
    return task


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config must be a TOML file. Received: {path} ({error})") from None
    known = {field.name for field in fields(RunConfig)}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path} names an unknown key. Received: {key} = {value!r}")
        values[name] = typed(path, name, value)
    return values
