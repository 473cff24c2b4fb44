"""Config -> the files of a run, what is known of them, and what workers are told.

Everything here is found before anything starts. Does not know rows, devices or workers.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.config import RunConfig
from runner.errors import ConfigError
from runner.fingerprint import Fingerprint, fingerprint
from runner.presets import Preset, check_lora, read_head, read_preset
from runner.progress import Progress
from runner.records import ModelSpec
from runner.report import versions
from runner.task import CONTEST, Task

# Packages whose versions may change an answer.
ANSWERS_DEPEND_ON = ("jax", "keras", "keras-hub")


@dataclass(frozen=True, slots=True)
class Job:
    """The files of a run, the demo's where the person named none, and the preset's facts.

    head_kernel, head_bias: None where the task has no head. quantization: what workers have to
    make of the preset's weights while they load them.
    """

    test_set: Path
    preset: Preset
    lora_weights: Path | None
    head_kernel: Path | None
    head_bias: Path | None
    quantization: str | None

    def width(self, task: Task) -> int:
        """Return how many numbers a row gets."""
        return task.width(self.preset.shape.hidden_dim)

    def spec(self, config: RunConfig, dtype: str) -> ModelSpec:
        """Return what workers need, in a dtype."""
        lora, kernel, bias = self.lora_weights, self.head_kernel, self.head_bias
        return ModelSpec(
            preset=str(self.preset.path.resolve()),
            lora_weights=str(lora.resolve()) if lora is not None else None,
            head_kernel=str(kernel.resolve()) if kernel is not None else None,
            head_bias=str(bias.resolve()) if bias is not None else None,
            classes=self.width(config.task),
            pooling=config.pooling,
            dtype=dtype,
            quantization=self.quantization,
            compilation_cache=compilation_cache(),
            stored_bytes=sum(path.stat().st_size for path in self.preset.weight_files),
            head=config.task.head,
        )

    def fingerprint(
        self, config: RunConfig, dtype: str, ids: Sequence[str], texts: Sequence[str]
    ) -> Fingerprint:
        """Return what decides the answers of this run."""
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
            head_files=[path for path in (self.head_kernel, self.head_bias) if path is not None],
            lora_file=self.lora_weights,
        )


def find_job(config: RunConfig, progress: Progress) -> Job:
    """Find and check the files that a config names, making the demo's where it names none.

    Raises:
        ConfigError, DataError: a file is missing or cannot be used.
    """
    named = {
        "preset": config.preset,
        "lora_weights": config.lora_weights,
        "head_kernel": config.head_kernel,
        "head_bias": config.head_bias,
        "input": config.input,
    }
    if config.preset is None or config.input is None:
        from runner.demo import ensure_demo

        demo = ensure_demo(cache_folder(), progress)
        if config.preset is None:
            named |= demo.model_files
        if config.input is None:
            named["input"] = demo.test_set
    files = {name: path for name, path in named.items() if path is not None}
    preset = read_preset(files["preset"])
    lora = files.get("lora_weights")
    if lora is not None:
        check_lora(lora, preset.shape)
    if config.task.head == "none":
        files = {name: files[name] for name in files if not name.startswith("head")}  # the demo's
    else:
        read_head(
            files["head_kernel"],
            files["head_bias"],
            hidden_dim=preset.shape.hidden_dim,
            classes=len(config.task.label_columns),
        )
    return Job(
        test_set=files["input"],
        preset=preset,
        lora_weights=lora,
        head_kernel=files.get("head_kernel"),
        head_bias=files.get("head_bias"),
        quantization=_quantization_to_do(config, preset),
    )


def _settings_of(config: RunConfig) -> dict[str, object]:
    """What of a task decides an answer; nothing where it is as the contest's, whose journals are
    older than tasks. What labels are called does not: how many there are, the head says."""
    task, settings = config.task, dict[str, object]()
    if (task.template, task.head) != (CONTEST.template, CONTEST.head):
        settings |= {"template": repr(task.template), "kind_of_head": task.head}
    exchanged = task.swapped_columns, task.swapped_labels
    if config.extra_passes == "swap" and exchanged != (
        CONTEST.swapped_columns,
        CONTEST.swapped_labels,
    ):
        settings["swapped"] = f"{' and '.join(task.swap)}, labels to {task.swapped_labels}"
    return settings


def cache_folder() -> Path:
    """Return the folder for the demo and for compiled programs, kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arena-runner"


def compilation_cache() -> str:
    """Return the folder for compiled programs."""
    return str(cache_folder() / "xla")


def _quantization_to_do(config: RunConfig, preset: Preset) -> str | None:
    asked = None if config.quantization == "none" else config.quantization
    if preset.quantization is None:
        return asked
    if asked not in (None, preset.quantization):
        raise ConfigError(
            f"{preset.path} holds {preset.quantization} weights; take the float preset for another "
            f"quantization. Received: --quantization {asked}"
        )
    if config.lora_weights is not None:
        raise ConfigError(
            f"{preset.path} holds {preset.quantization} weights, into which no LoRA file can be "
            "merged; `run.py prepare` merges it before. Received: --lora-weights "
            f"{config.lora_weights}"
        )
    return None
