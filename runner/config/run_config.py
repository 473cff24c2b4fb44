"""Flags, a TOML file of the same names, or Python values -> one frozen, checked RunConfig.

Does not open the files it names: the phase that reads a file checks it. Knows no devices.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.config.flags import (
    BY_NAME,
    CONFIG,
    DEFAULT_GROUP_SIZE,
    DEFAULTS,
    FLAGS,
    MODEL_PARALLEL,
    PLAN,
    PREPARE_DEFAULTS,
    PREPARE_FLAGS,
    RUN,
    SINGLE,
    Flag,
    flag,
)
from runner.config.suffixes import FORMATS, USUAL_SUFFIXES, either
from runner.config.task import CONTEST, Task, make_task

# Without --min-sequence-length a row keeps at least this part of the sequence length.
FLOOR_DIVISOR = 4
# Classes of the demo model's head.
DEMO_CLASSES = 3
# The largest float32: the head computes in float32.
MOST_VALUE = 3.4e38
SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What the user asked for: a field for each row of `flags.FLAGS`, and the task.

    `None` means the demo's file, or decided later. Values may also be given as on the command line:
    a path, a time limit or a count as a string.

    Raises:
        ConfigError: a value is outside its choices, or values contradict each other.
    """

    mode: str = DEFAULTS["mode"]
    input: Path | None = DEFAULTS["input"]
    output: Path = DEFAULTS["output"]
    preset: Path | None = DEFAULTS["preset"]
    lora_weights: Path | None = DEFAULTS["lora_weights"]
    head_kernel: Path | None = DEFAULTS["head_kernel"]
    head_bias: Path | None = DEFAULTS["head_bias"]
    pooling: str = DEFAULTS["pooling"]
    sequence_length: int = DEFAULTS["sequence_length"]
    text_format: str = DEFAULTS["text_format"]
    num_workers: int | None = DEFAULTS["num_workers"]
    group_size: int | None = DEFAULTS["group_size"]
    strategy: str | None = DEFAULTS["strategy"]
    dtype: str = DEFAULTS["dtype"]
    quantization: str = DEFAULTS["quantization"]
    max_tokens_per_batch: int | None = DEFAULTS["max_tokens_per_batch"]
    time_limit: float | None = DEFAULTS["time_limit"]
    on_deadline: str = DEFAULTS["on_deadline"]
    min_sequence_length: int | None = DEFAULTS["min_sequence_length"]
    fallback_probabilities: tuple[float, ...] | None = DEFAULTS["fallback_probabilities"]
    extra_passes: str = DEFAULTS["extra_passes"]
    resume: str = DEFAULTS["resume"]
    journal: Path | None = DEFAULTS["journal"]
    report: Path | None = DEFAULTS["report"]
    plan: bool = DEFAULTS["plan"]
    device: str | None = DEFAULTS["device"]
    calibrate: bool = DEFAULTS["calibrate"]
    compile: str | None = DEFAULTS["compile"]
    log_dir: Path | None = DEFAULTS["log_dir"]
    log_format: str = DEFAULTS["log_format"]
    metrics_port: int | None = DEFAULTS["metrics_port"]
    address: str | None = DEFAULTS["address"]
    verbose: bool = DEFAULTS["verbose"]
    task: Task = CONTEST

    def __post_init__(self) -> None:
        _read_values(self, FLAGS)
        _check_applies(self)
        _check_workers(self)
        _check_model_files(self)
        _check_task(self)
        if self.device is not None and self.calibrate:
            raise ConfigError(
                "--calibrate measures the devices here, and --device names one elsewhere: pass "
                f"only one of them. Received: --device {self.device} --calibrate"
            )
        if self.time_limit is not None and not self.time_limit > 0:
            raise ConfigError(
                "--time-limit must be longer than zero, such as 8h45m. Received: --time-limit "
                f"{self.time_limit:g}"
            )
        _check_fallback(self)
        _check_paths(self)

    @property
    def report_path(self) -> Path:
        return self.report or self._beside_output(".report.json")

    @property
    def plan_path(self) -> Path:
        return self._beside_output(".plan.json")

    @property
    def rows_path(self) -> Path:
        """The table of how each row was predicted, beside the report."""
        return self._beside_report(".rows.csv")

    @property
    def page_path(self) -> Path:
        """The report as an HTML page, beside the JSON."""
        return self.report_path.with_name(self.report_path.name.removesuffix(".json") + ".html")

    @property
    def trace_path(self) -> Path:
        """The timeline of each worker, for Perfetto, beside the report."""
        return self._beside_report(".trace.json")

    @property
    def journal_path(self) -> Path:
        return self.journal or self._beside_output(".journal")

    @property
    def log_folder(self) -> Path:
        return self.log_dir or self._beside_output(".logs")

    @property
    def floor_length(self) -> int:
        """The length below which no row is truncated for lack of time."""
        return self.min_sequence_length or max(1, self.sequence_length // FLOOR_DIVISOR)

    @property
    def members(self) -> int:
        """Number of workers that hold one replica together."""
        return (self.group_size or DEFAULT_GROUP_SIZE) if self.mode == MODEL_PARALLEL else 1

    def as_json(self) -> dict[str, Any]:
        """Return the settings as reports and plans show them."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self).items()
        }

    def _beside_output(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)

    def _beside_report(self, ending: str) -> Path:
        stem = self.report_path.name.removesuffix(".json").removesuffix(".report")
        return self.report_path.with_name(stem + ending)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """What the user asked `prepare` for: a field for each row of `flags.PREPARE_FLAGS`, and the
    task. Head and input serve to measure the accuracy that quantization costs; without a head, it
    is not measured.

    Raises:
        ConfigError: a value is outside its choices, or values contradict each other.
    """

    preset: Path
    output: Path
    quantization: str = PREPARE_DEFAULTS["quantization"]
    lora_weights: Path | None = PREPARE_DEFAULTS["lora_weights"]
    dtype: str = PREPARE_DEFAULTS["dtype"]
    head_kernel: Path | None = PREPARE_DEFAULTS["head_kernel"]
    head_bias: Path | None = PREPARE_DEFAULTS["head_bias"]
    input: Path | None = PREPARE_DEFAULTS["input"]
    pooling: str = PREPARE_DEFAULTS["pooling"]
    sequence_length: int = PREPARE_DEFAULTS["sequence_length"]
    text_format: str = PREPARE_DEFAULTS["text_format"]
    task: Task = CONTEST

    def __post_init__(self) -> None:
        _read_values(self, PREPARE_FLAGS)
        _check_head(self)


def make_config(flags: Mapping[str, Any], config_file: Path | None = None) -> RunConfig:
    """Return the config that a TOML file and flags make together; flags win.

    Args:
        flags: setting -> value, only for flags that the user passed.
        config_file: a TOML table with the flags' names, with - or _, and `[task]` (see
            `task.make_task`). Paths in it are relative to the working directory, as on the command
            line.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    values = _read_toml(config_file) if config_file is not None else {}
    return RunConfig(**{**values, **flags})


def read_task(config_file: Path) -> Task:
    """Return the task in a run's TOML file.

    Raises:
        ConfigError: as `make_config`.
    """
    task: Task = _read_toml(config_file).get("task", CONTEST)
    return task


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{flag(CONFIG.name)} must be a TOML file. Received: {path} ({error})"
        ) from None
    values = {}
    for key, given in table.items():
        name = key.replace("-", "_")
        if name == "task":
            values[name] = make_task(given)
            continue
        if name not in BY_NAME:
            raise ConfigError(
                f"{path} has an unknown key; it takes the names of flags, and [task]. "
                f"Received: {key} = {given!r}"
            )
        try:
            values[name] = BY_NAME[name].value(given)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return values


def _read_values(config: RunConfig | PrepareConfig, flags: Iterable[Flag]) -> None:
    """Convert the values that a new config was given."""
    values = {row.name: row.value(getattr(config, row.name)) for row in flags}
    for name, value in {**values, "task": make_task(config.task)}.items():
        object.__setattr__(config, name, value)  # frozen from here on


def _check_applies(config: RunConfig) -> None:
    """Refuse a flag that its row does not allow in this mode, or with or without --plan."""
    command = PLAN if config.plan else RUN
    for row in FLAGS:
        value = getattr(config, row.name)
        if value == row.default:
            continue
        said = flag(row.name) if value is True else f"{flag(row.name)} {value}"
        if config.mode not in row.modes:
            raise ConfigError(
                f"{flag(row.name)} is for --mode {' or '.join(row.modes)}. "
                f"Received: --mode {config.mode} {said}"
            )
        if command not in row.commands and config.plan:
            raise ConfigError(
                f"{flag(row.name)} cannot be used with --plan, which plans for this machine, or "
                f"for others with --device NAME --num-workers N. Received: --plan {said}"
            )
        if command not in row.commands:
            raise ConfigError(f"{flag(row.name)} needs --plan. Received: {said} alone")


def _check_workers(config: RunConfig) -> None:
    workers, members = config.num_workers, config.members
    if config.mode == SINGLE and workers not in (None, 1):
        raise ConfigError(
            "--mode single is one process; use --mode data-parallel for several workers. "
            f"Received: --num-workers {workers}"
        )
    if config.mode != MODEL_PARALLEL:
        return
    if members == 1:
        raise ConfigError(
            "A group has at least two members; in --mode data-parallel one device holds a replica. "
            f"Received: --group-size {members}"
        )
    if workers is not None and workers % members:
        raise ConfigError(
            f"Workers must form whole groups of {members}. Received: --num-workers {workers}"
        )


def _check_model_files(config: RunConfig) -> None:
    if config.preset is not None:
        # Whether the preset has its own head is known only when it is read.
        _check_head(config)
    elif stray := _given(config, "head_kernel", "head_bias", "lora_weights"):
        verb = "needs" if len(stray) == 1 else "need"
        raise ConfigError(
            f"{' and '.join(stray)} {verb} --preset DIR: without it, the demo model runs."
        )


def _check_head(config: RunConfig | PrepareConfig) -> None:
    given = _given(config, "head_kernel", "head_bias")
    if given and config.task.head == "none":
        raise ConfigError(
            "[task] head none writes the pooled hidden states and takes no head. "
            f"Received: {' and '.join(given)}"
        )
    if len(given) == 1:
        raise ConfigError(
            "--head-kernel FILE.npy of shape (hidden, classes) and --head-bias FILE.npy of shape "
            f"(classes,) go together. Received: {given[0]} alone"
        )


def _given(config: RunConfig | PrepareConfig, *names: str) -> list[str]:
    return [flag(name) for name in names if getattr(config, name) is not None]


def _check_task(config: RunConfig) -> None:
    """Check the task against the demo's files and the flags."""
    task = config.task
    if config.preset is None and task.head != "none" and len(task.label_columns) != DEMO_CLASSES:
        raise ConfigError(
            "[task] needs --preset and its own head: the demo model's has "
            f"{DEMO_CLASSES} classes. Received: {len(task.label_columns)} labels"
        )
    missing = [name for name in task.input_columns if name not in CONTEST.input_columns]
    if config.input is None and missing:
        raise ConfigError(
            f"[task] needs --input FILE: the demo set has no column {missing[0]}. "
            f"It has {', '.join(CONTEST.input_columns)}"
        )
    if config.extra_passes == "swap" and not task.swap:
        raise ConfigError(
            "--extra-passes swap needs two text columns that may be swapped: set swap in [task] to "
            "them, and swap_labels to the labels that swap with them. "
            "Received: --extra-passes swap and a task without swap"
        )


def _check_fallback(config: RunConfig) -> None:
    values, head = config.fallback_probabilities, config.task.head
    if values is None:
        return
    if head == "none":
        raise ConfigError(
            "--fallback-probabilities needs a head; without one, rows without an answer get the "
            "mean of the others. Received: [task] head none"
        )
    count = len(config.task.label_columns)
    least, most = (-MOST_VALUE, MOST_VALUE) if head == "regression" else (0, 1)
    is_wrong = len(values) != count or not all(least <= value <= most for value in values)
    if is_wrong or (head == "softmax" and abs(sum(values) - 1) > SUM_TOLERANCE):
        expected = {
            "softmax": "numbers from 0 to 1 that sum to one",
            "sigmoid": "numbers from 0 to 1",
        }.get(head, "finite numbers")
        raise ConfigError(
            f"--fallback-probabilities must be {count} {expected}. "
            f"Received: --fallback-probabilities {','.join(f'{value:g}' for value in values)}"
        )


def _check_paths(config: RunConfig) -> None:
    """Refuse outputs without a file name, in an unknown format, or with the same path."""
    for name in ("output", "report", "journal", "log_dir"):
        path = getattr(config, name)
        if path is not None and not path.name:
            raise ConfigError(f"{flag(name)} must name a file. Received: {flag(name)} {path}")
    if config.output.suffix.lower() == ".json":
        raise ConfigError(
            f"--output is written as {either([*FORMATS])}: use the suffix "
            f"{either(USUAL_SUFFIXES)}. "
            f"Received: --output {config.output}"
        )
    beside_report = (config.rows_path, config.page_path, config.trace_path)
    written = (config.output, config.report_path, *beside_report, config.journal_path)
    named = [path for path in (config.input, *written, config.log_folder) if path is not None]
    if len({path.resolve() for path in named}) != len(named):
        raise ConfigError(
            "--input, --output, --journal, --report and --log-dir must be different files. "
            "Received: " + ", ".join(str(path) for path in named)
        )
