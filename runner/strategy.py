"""Config and preset -> how a group of workers holds one replica, and why.

Arithmetic on the preset's dimensions; does not know devices' processes.
"""

from dataclasses import dataclass

from runner.config import RunConfig
from runner.errors import ConfigError
from runner.presets import Preset
from sharding.batches import BatchShape
from sharding.costs import ModelShape
from sharding.stages import Stage, cut_stages

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
        ConfigError: more members than layers.
    """
    if config.mode != "model-parallel":
        return None
    shape, members = preset.shape, config.members
    # What auto will be on the devices is not known yet; the comparison does not depend on it.
    item_bytes = ITEM_BYTES.get(config.dtype, 4)
    traffic = {
        "tensor": tensor_bytes_per_token(shape, members, item_bytes),
        "pipeline": shape.hidden_dim * item_bytes * (members - 1),
    }
    name, asked = config.strategy or "auto", "as asked for"
    if name == "auto":
        name = "pipeline" if members <= shape.num_layers else "tensor"
        asked = (
            "it moves less and a large test set keeps every stage busy"
            if name == "pipeline"
            else f"{shape.num_layers} layers cannot be cut into {members} stages"
        )
    why = (
        f"strategy {name}: {asked} (a token moves {traffic['pipeline'] / 1e3:,.1f} kB between "
        f"members in a pipeline, {traffic['tensor'] / 1e3:,.1f} kB with tensor)"
    )
    stages = _stages(shape, members, item_bytes) if name == "pipeline" else ()
    return Strategy(name, why, traffic[name], stages)


def tensor_bytes_per_token(shape: ModelShape, members: int, item_bytes: int) -> int:
    """Bytes each member sends for one token: two ring all-reduces of a hidden state a layer.

    A ring all-reduce sends 2 (n - 1) / n times the array (Patarasuk and Yuan, 2009).
    """
    hidden = shape.hidden_dim * item_bytes
    return 2 * shape.num_layers * hidden * 2 * (members - 1) // members


def _stages(shape: ModelShape, members: int, item_bytes: int) -> tuple[Stage, ...]:
    layer_flops = shape.batch_flops(BatchShape(1, 512)) / shape.num_layers
    layer_bytes = shape.layer_parameters * item_bytes
    try:
        return cut_stages(
            [layer_flops] * shape.num_layers,
            [layer_bytes] * shape.num_layers,
            members,
            first_bytes=shape.vocabulary_size * shape.hidden_dim * item_bytes,
        )
    except ValueError as error:
        raise ConfigError(f"--strategy pipeline: {error}") from None
