"""Config -> the files of a run, the facts about them, and what workers need to load them.

Everything is checked before anything starts. Does not know rows, devices or workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from runner.common.errors import ConfigError
from runner.common.files import compilation_cache
from runner.common.records import ModelSpec
from runner.common.versions import versions
from runner.config.flags import DefaultLength, DefaultPooling
from runner.config.run_config import PrepareConfig, RunConfig
from runner.config.task import CONTEST, Task
from runner.preset.reader import Preset, check_lora, read_head, read_preset
from runner.results.fingerprint import Fingerprint, fingerprint

# Packages whose versions may change an answer.
ANSWERS_DEPEND_ON = ("jax", "keras", "keras-hub")

Config = TypeVar("Config", RunConfig, PrepareConfig)


@dataclass(frozen=True, slots=True)
class Job:
    """The files of a run, the demo's if the user named none, and the facts about the preset.

    head_kernel, head_bias: None if the task has no head or the preset's own is used.
    quantization: how workers quantize the preset's weights while they load them, None if not.
    """

    test_set: Path
    preset: Preset
    lora_weights: Path | None
    head_kernel: Path | None
    head_bias: Path | None
    quantization: str | None

    def width(self, task: Task) -> int:
        """Return the number of values that a row gets."""
        return task.width(self.preset.shape.hidden_dim)

    def spec(self, config: RunConfig, dtype: str) -> ModelSpec:
        """Return what workers need to load the model in a dtype."""
        lora, kernel, bias = (
            str(path.resolve()) if path is not None else None
            for path in (self.lora_weights, self.head_kernel, self.head_bias)
        )
        return ModelSpec(
            preset=str(self.preset.path.resolve()),
            lora_weights=lora,
            head_kernel=kernel,
            head_bias=bias,
            classes=self.width(config.task),
            pooling=config.pooling,
            dtype=dtype,
            quantization=self.quantization,
            compilation_cache=compilation_cache(),
            stored_bytes=self.preset.stored_bytes,
            head=config.task.head,
        )

    def head_files(self, task: Task) -> tuple[Path, ...]:
        """Return the files of the head, which turns pooled vectors into answers."""
        if task.head == "none":
            return ()
        if self.head_kernel is not None and self.head_bias is not None:
            return self.head_kernel, self.head_bias
        return self.preset.classifier.files if self.preset.classifier is not None else ()

    def fingerprint(
        self, config: RunConfig, dtype: str, ids: Sequence[str], texts: Sequence[str]
    ) -> Fingerprint:
        """Return what determines the answers of this run.

        Args:
            ids, texts: one of each per row; texts are rendered.
        """
        found = versions()
        return fingerprint(
            settings={
                "pooling": config.pooling,
                "sequence_length": config.sequence_length,
                "text_format": config.text_format,
                "dtype": dtype,
                "quantization": self.preset.quantization or config.quantization,
                "extra_passes": config.extra_passes,
                **_settings_of(config),
            },
            versions={name: found[name] for name in ANSWERS_DEPEND_ON if name in found},
            ids=ids,
            texts=texts,
            preset_files=self.preset.small_files,
            weight_files=self.preset.weight_files,
            head_files=self.head_files(config.task),
            lora_file=self.lora_weights,
        )


def named_files(config: RunConfig, others: Mapping[str, Path]) -> dict[str, Path]:
    """Return field name -> file: those of a config, overridden by `others`."""
    names = ("preset", "lora_weights", "head_kernel", "head_bias", "input")
    named = {name: getattr(config, name) for name in names} | dict(others)
    return {name: path for name, path in named.items() if path is not None}


def find_job(config: RunConfig, others: Mapping[str, Path]) -> Job:
    """Find and check the files of a run.

    Args:
        others: field name -> file, for fields that the config leaves out.

    Raises:
        ConfigError, DataError: a file is missing or cannot be used.
    """
    files = named_files(config, others)
    preset = read_preset(files["preset"])
    lora = files.get("lora_weights")
    if lora is not None:
        check_lora(lora, preset.shape)
    if config.task.head == "none":
        files = {name: files[name] for name in files if not name.startswith("head")}  # the demo's
    else:
        check_head(preset, files.get("head_kernel"), files.get("head_bias"), config.task)
    return Job(
        test_set=files["input"],
        preset=preset,
        lora_weights=lora,
        head_kernel=files.get("head_kernel"),
        head_bias=files.get("head_bias"),
        quantization=_quantization_to_do(config, preset),
    )


def check_head(preset: Preset, kernel: Path | None, bias: Path | None, task: Task) -> None:
    """Check the head in the two files, or else the preset's own.

    Raises:
        ConfigError: there is neither, or the preset's own does not match the task's activation.
        DataError: it is damaged, or does not fit.
    """
    hidden_dim, classes = preset.shape.hidden_dim, len(task.label_columns)
    if kernel is not None and bias is not None:
        read_head(kernel, bias, hidden_dim=hidden_dim, classes=classes)
    elif preset.classifier is not None:
        if preset.classifier.activation not in ("linear", task.head):
            raise ConfigError(
                f"{preset.path} has the activation {preset.classifier.activation}, so [task] must "
                f"set head to it. Received: head = {task.head!r}"
            )
        preset.classifier.head(hidden_dim=hidden_dim, classes=classes)
    else:
        raise ConfigError(
            "--preset needs a head: --head-kernel FILE.npy of shape (hidden, classes) and "
            "--head-bias FILE.npy of shape (classes,), or a preset that is a whole TextClassifier. "
            f"Missing: --head-kernel and --head-bias. Received: --preset {preset.path} alone"
        )


def settle(config: Config, preset: Preset) -> Config:
    """Return the config with the preset's own values where the user kept the defaults.

    These are a classifier's pooling and its preprocessor's sequence length. The backbone's number
    of positions limits the sequence length.

    Raises:
        ConfigError: the preset does not support what the user asked for.
    """
    pooling, length = config.pooling, config.sequence_length
    uses_own = config.head_kernel is None and config.task.head != "none"
    own = preset.classifier if uses_own else None
    if own is not None:
        if isinstance(pooling, DefaultPooling):
            pooling = own.pooling
        elif pooling != own.pooling:
            raise ConfigError(
                f"{preset.path} has the head of a {own.known.class_name}, which was trained "
                f"with --pooling {own.pooling}; omit the flag, or pass your own head. "
                f"Received: --pooling {pooling}"
            )
    if pooling not in preset.family.poolings:
        raise ConfigError(
            f"{preset.class_name} supports --pooling {', '.join(preset.family.poolings)}. "
            f"Received: --pooling {pooling}"
        )
    if isinstance(length, DefaultLength):
        length = (own and preset.tokenizer.sequence_length) or length
        length = min(length, preset.max_positions or length)
    elif preset.max_positions is not None and length > preset.max_positions:
        raise ConfigError(
            f"{preset.path} has embeddings for {preset.max_positions} positions. "
            f"Received: --sequence-length {length}"
        )
    if preset.tokenizer.is_segment and length < 2:
        raise ConfigError(
            f"{preset.class_name} needs a start and an end token in each row, so --sequence-length "
            f"must be at least 2. Received: --sequence-length {length}"
        )
    return replace(config, pooling=pooling, sequence_length=length)


def _settings_of(config: RunConfig) -> dict[str, object]:
    """Return the parts of a task that determine an answer. Label names do not.

    The contest's are left out: its journals were written before there were tasks.
    """
    task, settings = config.task, dict[str, object]()
    if (task.template, task.head) != (CONTEST.template, CONTEST.head):
        settings |= {"template": repr(task.template), "kind_of_head": task.head}
    swapped = task.swapped_columns, task.swapped_labels
    contest = CONTEST.swapped_columns, CONTEST.swapped_labels
    if config.extra_passes == "swap" and swapped != contest:
        settings["swapped"] = f"{' and '.join(task.swap)}, labels to {task.swapped_labels}"
    return settings


def _quantization_to_do(config: RunConfig, preset: Preset) -> str | None:
    asked = None if config.quantization == "none" else config.quantization
    if preset.quantization is None:
        return asked
    if asked not in (None, preset.quantization):
        raise ConfigError(
            f"{preset.path} holds {preset.quantization} weights; use the float preset for another "
            f"quantization. Received: --quantization {asked}"
        )
    if config.lora_weights is not None:
        raise ConfigError(
            f"A LoRA file cannot be merged into {preset.quantization} weights, which {preset.path} "
            "holds; merge it into the float preset with `run.py prepare`. "
            f"Received: --lora-weights {config.lora_weights}"
        )
    return None
