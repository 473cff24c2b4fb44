"""A model's dimensions and a group's size -> how the group holds one replica, and why; and how many
tokens a batch may have beside it.

Arithmetic on dimensions. Knows neither devices nor processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sharding.costs import ModelShape
from sharding.kinds import KINDS
from sharding.memory import ITEM_BYTES, QUANTIZED_BYTES, batch_budget, cut_layers, fullest_bytes
from sharding.stages import StageLayers


@dataclass(frozen=True, slots=True)
class Strategy:
    """tensor or pipeline, a sentence that says why, and what travels between two members."""

    name: str
    why: str
    bytes_per_token: int
    stages: tuple[StageLayers, ...] = ()


def auto_strategy(known: Sequence[str], members: int, num_layers: int) -> str:
    """Return what --strategy auto means.

    A pipeline if there is a layer for each member: it moves one hidden state a token over each cut,
    where tensor parallelism moves two all-reduced ones a layer. That wins on any link as long as
    there are more batches than members, and a large test set has those.

    Args:
        known: the strategies that the family has.
    """
    return "pipeline" if members <= num_layers or "tensor" not in known else "tensor"


def choose(
    shape: ModelShape,
    *,
    class_name: str,
    known: Sequence[str],
    asked: str,
    members: int,
    dtype: str,
    quantization: str,
    memory_bytes: int | None,
) -> Strategy:
    """Return how a group of `members` holds one replica.

    Args:
        class_name, known: the family, and the strategies that it has.
        asked: one of them, or auto.
        memory_bytes: of a device, None if not known.

    Raises:
        ValueError: more members than layers, a stage that no device can hold, or a family that
            is not held in this way; says so in the words of the flags.
    """
    # What auto will be is the devices' to say: 16 bits on GPUs.
    item_bytes = ITEM_BYTES.get(dtype, 2 if memory_bytes else 4)
    traffic = {
        "tensor": tensor_bytes_per_token(shape, members, item_bytes),
        "pipeline": shape.hidden_dim * item_bytes * (members - 1),
    }
    name, reason = asked, "as asked for"
    if asked == "auto":
        name = auto_strategy(known, members, shape.num_layers)
        reason = (
            "it moves less and a large test set keeps every stage busy"
            if name == "pipeline"
            else f"{shape.num_layers} layers cannot be cut into {members} stages"
        )
    if name not in known:
        raise ValueError(
            f"{class_name} goes with "
            + (f"--strategy {' or '.join(known)} or " if known else "")
            + "--mode data-parallel or single, a whole replica a device. "
            f"Received: --mode model-parallel --strategy {asked}"
        )
    if name == "tensor" and quantization != "none":
        raise ValueError(
            f"--quantization {quantization} goes with --strategy pipeline: {reason}, and a scale "
            "that belongs to a whole kernel is not cut into slices. Received: --strategy "
            f"{asked} --group-size {members}"
        )
    why = (
        f"strategy {name}: {reason} (a token moves {traffic['pipeline'] / 1e3:,.1f} kB between "
        f"members in a pipeline, {traffic['tensor'] / 1e3:,.1f} kB with tensor)"
    )
    if name != "pipeline":
        return Strategy(name, why, traffic[name])
    weight_bytes = QUANTIZED_BYTES.get(quantization, float(item_bytes))
    try:
        stages = cut_layers(shape, members, weight_bytes, memory_bytes)
    except ValueError as error:
        raise ValueError(f"--strategy pipeline: {error}") from None
    held = (f"{s.start}-{s.stop - 1}: {s.weight_bytes / 1e6:,.0f} MB" for s in stages)
    return Strategy(name, f"{why}; layers {', '.join(held)}", traffic[name], stages)


def batch_tokens(
    shape: ModelShape,
    *,
    kind: str,
    members: int,
    strategy: str,
    dtype: str,
    quantization: str,
    memory_bytes: int | None,
    sequence_length: int,
) -> int:
    """Return the padded tokens of a batch: what keeps the device busy, less if memory is short.

    More than the default is not faster: its matmuls have long been large enough.

    Args:
        strategy: as asked for, of a group of more than one.
        memory_bytes: of a device, None if not known.

    Raises:
        ValueError: a stage that no device can hold.
    """
    default = KINDS[kind].tokens_per_batch
    if memory_bytes is None or not KINDS[kind].fits_batches:
        return default
    item_bytes = ITEM_BYTES.get(dtype, 2)
    is_cut = 1 < members <= shape.num_layers and strategy != "tensor"
    try:
        held = fullest_bytes(
            shape,
            members=members,
            strategy="pipeline" if is_cut else None,
            item_bytes=QUANTIZED_BYTES.get(quantization, float(item_bytes)),
            memory_bytes=memory_bytes,
        )
    except ValueError as error:
        raise ValueError(f"--strategy pipeline: {error}") from None
    return batch_budget(
        shape,
        memory_bytes=memory_bytes,
        held_bytes=held,
        # What is quantized comes out of a product in 32 bits.
        value_bytes=4 if quantization != "none" else item_bytes,
        sequence_length=sequence_length,
        most=default,
    )


def tensor_bytes_per_token(shape: ModelShape, members: int, item_bytes: int) -> int:
    """Bytes each member sends for one token: two ring all-reduces of a hidden state a layer.

    A ring all-reduce sends 2 (n - 1) / n times the array (Patarasuk and Yuan, 2009).
    """
    hidden = shape.hidden_dim * item_bytes
    return 2 * shape.num_layers * hidden * 2 * (members - 1) // members
