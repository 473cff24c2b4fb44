"""Config and preset -> how a group of workers holds one replica, and why.

Arithmetic on the preset's dimensions; does not know devices' processes.
"""

from dataclasses import dataclass

from runner.common.errors import ConfigError
from runner.common.machine import device_memory_bytes
from runner.config.run_config import RunConfig
from runner.preset.families import strategies
from runner.preset.reader import Preset
from sharding.costs import ModelShape
from sharding.kinds import KINDS
from sharding.memory import ITEM_BYTES, QUANTIZED_BYTES, batch_budget, cut_layers, fullest_bytes
from sharding.stages import Stage


@dataclass(frozen=True, slots=True)
class Strategy:
    """tensor or pipeline, a sentence that says why, and what travels between two members."""

    name: str
    why: str
    bytes_per_token: int
    stages: tuple[Stage, ...] = ()


def choose_strategy(config: RunConfig, preset: Preset) -> Strategy | None:
    """Return the strategy of a model-parallel run, None for the other modes.

    `auto` takes the pipeline where there is a layer for each member: it moves one hidden state a
    token over each cut, where tensor parallelism moves two all-reduced ones a layer. That wins on
    any link as long as there are more batches than members, and a large test set has those.

    Raises:
        ConfigError: more members than layers, a stage that no device can hold, or a family that
            is not held in this way.
    """
    if config.mode != "model-parallel":
        return None
    shape, members = preset.shape, config.members
    known = strategies(preset.class_name)
    memory = device_memory_bytes()
    # What auto will be is the devices' to say: 16 bits on GPUs.
    item_bytes = ITEM_BYTES.get(config.dtype, 2 if memory else 4)
    quantization = preset.quantization or config.quantization
    weight_bytes = QUANTIZED_BYTES.get(quantization, float(item_bytes))
    traffic = {
        "tensor": tensor_bytes_per_token(shape, members, item_bytes),
        "pipeline": shape.hidden_dim * item_bytes * (members - 1),
    }
    name, asked = config.strategy or "auto", "as asked for"
    if name == "auto":
        name = "pipeline" if members <= shape.num_layers or "tensor" not in known else "tensor"
        asked = (
            "it moves less and a large test set keeps every stage busy"
            if name == "pipeline"
            else f"{shape.num_layers} layers cannot be cut into {members} stages"
        )
    if name not in known:
        raise ConfigError(
            f"{preset.class_name} goes with "
            + (f"--strategy {' or '.join(known)} or " if known else "")
            + "--mode data-parallel or single, a whole replica a device. "
            f"Received: --mode model-parallel --strategy {config.strategy or 'auto'}"
        )
    if name == "tensor" and quantization != "none":
        raise ConfigError(
            f"--quantization {quantization} goes with --strategy pipeline: {asked}, and a scale "
            "that belongs to a whole kernel is not cut into slices. Received: --strategy "
            f"{config.strategy or 'auto'} --group-size {members}"
        )
    why = (
        f"strategy {name}: {asked} (a token moves {traffic['pipeline'] / 1e3:,.1f} kB between "
        f"members in a pipeline, {traffic['tensor'] / 1e3:,.1f} kB with tensor)"
    )
    stages: tuple[Stage, ...] = ()
    if name == "pipeline":
        stages = _stages(shape, members, weight_bytes, memory)
        held = (f"{s.start}-{s.stop - 1}: {s.weight_bytes / 1e6:,.0f} MB" for s in stages)
        why += f"; layers {', '.join(held)}"
    return Strategy(name, why, traffic[name], stages)


def tokens_per_batch(config: RunConfig, preset: Preset, kind: str) -> int:
    """Return the budget of a batch: what keeps the device busy, less where memory is short.

    More than the default is not faster: its matmuls have long been large enough.
    """
    if config.max_tokens_per_batch is not None:
        return config.max_tokens_per_batch
    default = KINDS[kind].tokens_per_batch
    memory = device_memory_bytes() if KINDS[kind].fits_batches else None
    if memory is None:
        return default
    item_bytes = ITEM_BYTES.get(config.dtype, 2)
    quantization = preset.quantization or config.quantization
    cut = config.members > 1 and config.strategy != "tensor"
    try:
        held = fullest_bytes(
            preset.shape,
            members=config.members,
            strategy="pipeline" if cut and config.members <= preset.shape.num_layers else None,
            item_bytes=QUANTIZED_BYTES.get(quantization, float(item_bytes)),
            memory_bytes=memory,
        )
    except ValueError as error:
        raise ConfigError(f"--strategy pipeline: {error}") from None
    return batch_budget(
        preset.shape,
        memory_bytes=memory,
        held_bytes=held,
        # What is quantized comes out of a product in 32 bits.
        value_bytes=4 if quantization != "none" else item_bytes,
        sequence_length=config.sequence_length,
        most=default,
    )


def tensor_bytes_per_token(shape: ModelShape, members: int, item_bytes: int) -> int:
    """Bytes each member sends for one token: two ring all-reduces of a hidden state a layer.

    A ring all-reduce sends 2 (n - 1) / n times the array (Patarasuk and Yuan, 2009).
    """
    hidden = shape.hidden_dim * item_bytes
    return 2 * shape.num_layers * hidden * 2 * (members - 1) // members


def _stages(
    shape: ModelShape, members: int, weight_bytes: float, memory: int | None
) -> tuple[Stage, ...]:
    try:
        return cut_layers(shape, members, weight_bytes, memory)
    except ValueError as error:
        raise ConfigError(f"--strategy pipeline: {error}") from None
