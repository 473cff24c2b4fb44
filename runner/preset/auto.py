"""Config and preset -> what `auto` resolves to: the strategy, the tokens per batch, the plan.

`sharding/` decides from plain arguments; its ValueError becomes a ConfigError here. A GPU's memory
comes from nvidia-smi. `sharding/kinds.py` says what --dtype auto means.
"""

from collections.abc import Callable, Sequence

import numpy as np

from runner.common.errors import ConfigError
from runner.common.machine import device_memory_bytes
from runner.common.poolings import POOLINGS
from runner.config.run_config import RunConfig
from runner.preset.families import strategies as strategies_of
from runner.preset.reader import Preset
from sharding import strategies
from sharding.batches import BatchShape, Plan
from sharding.kinds import KINDS
from sharding.plan import plan_rows
from sharding.strategies import Strategy


def choose_strategy(
    config: RunConfig, preset: Preset, memory_bytes: Callable[[], int | None] = device_memory_bytes
) -> Strategy | None:
    """Return the strategy of a model-parallel run, None for the other modes.

    Args:
        memory_bytes: returns the memory of the smallest GPU, None if unknown.

    Raises:
        ConfigError: the model cannot be split as requested.
    """
    if config.mode != "model-parallel":
        return None
    try:
        return strategies.choose(
            preset.shape,
            class_name=preset.class_name,
            known=strategies_of(preset.class_name),
            asked=config.strategy or "auto",
            members=config.members,
            dtype=config.dtype,
            quantization=preset.quantization or config.quantization,
            memory_bytes=memory_bytes(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def tokens_per_batch(
    config: RunConfig,
    preset: Preset,
    kind: str,
    memory_bytes: Callable[[], int | None] = device_memory_bytes,
) -> int:
    """Return the maximum number of padded tokens per batch on a kind of device.

    Args:
        memory_bytes: returns the memory of the smallest GPU, None if unknown.

    Raises:
        ConfigError: a stage does not fit any device.
    """
    if config.max_tokens_per_batch is not None:
        return config.max_tokens_per_batch
    try:
        return strategies.batch_tokens(
            preset.shape,
            kind=kind,
            members=config.members,
            strategy=config.strategy or "auto",
            dtype=config.dtype,
            quantization=preset.quantization or config.quantization,
            memory_bytes=memory_bytes() if KINDS[kind].fits_batches else None,
            sequence_length=config.sequence_length,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def plan_run(
    lengths: np.ndarray,
    config: RunConfig,
    preset: Preset,
    *,
    kind: str,
    replicas: int,
    budget: int | None = None,
    rows: Sequence[int] | None = None,
    cap: int | None = None,
    known: Sequence[BatchShape] = (),
) -> Plan:
    """Return the batches of these rows for this many replicas on this kind of device.

    Args:
        lengths: token counts, (rows,).
        budget: the maximum number of padded tokens per batch, None for `tokens_per_batch`.
        rows, cap, known: as in `sharding.plan.plan_rows`.

    Raises:
        ConfigError: as `tokens_per_batch`.
    """
    return plan_rows(
        lengths,
        preset.shape,
        kind=kind,
        replicas=replicas,
        sequence_length=config.sequence_length,
        sees_padding=POOLINGS[config.pooling].sees_padding,
        budget=tokens_per_batch(config, preset, kind) if budget is None else budget,
        rows=rows,
        cap=cap,
        known=known,
    )
