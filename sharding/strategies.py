"""A model's dimensions and a group's size -> how the group holds one replica, and tokens per batch.

Does not know devices or processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sharding.costs import ModelShape
from sharding.kinds import KINDS
from sharding.memory import (
    ITEM_BYTES,
    QUANTIZED_BYTES,
    batch_budget,
    cut_layers,
    fullest_bytes,
    values_of,
)
from sharding.stages import StageLayers


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy (tensor or pipeline), the reason for it, and what a member sends per token."""

    name: str
    why: str
    bytes_per_token: int
    stages: tuple[StageLayers, ...] = ()


def auto_strategy(known: Sequence[str], members: int, num_layers: int) -> str:
    """Return what --strategy auto means.

    A pipeline, if there is a layer for each member. Per token it sends one hidden state over each
    cut; tensor parallelism all-reduces two in every layer. So a pipeline is faster on any link if
    there are more batches than members, as in any large test set.

    Args:
        known: the strategies that the family supports.
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
        class_name, known: the family, and the strategies that it supports.
        asked: one of them, or auto.
        memory_bytes: of a device, None if unknown.

    Raises:
        ValueError: more members than layers, a stage that is too large for any device, or a
            family that does not support the strategy. The message names the flags.
    """
    name, reason = asked, "as requested"
    if asked == "auto":
        name = auto_strategy(known, members, shape.num_layers)
        reason = (
            "it moves less and a large test set keeps every stage busy"
            if name == "pipeline"
            else f"{shape.num_layers} layers cannot be cut into {members} stages"
        )
    received = f"Received: --mode model-parallel --strategy {asked} --group-size {members}"
    if name not in known:
        others = f"--strategy {' or '.join(known)} or " if known else ""
        raise ValueError(
            f"{class_name} goes with {others}--mode data-parallel or single, which hold a whole "
            f"replica on each device. {received}"
        )
    if name == "tensor" and quantization != "none":
        raise ValueError(
            f"--quantization {quantization} goes with --strategy pipeline: {reason}, and a scale "
            f"that belongs to a whole kernel cannot be cut into slices. {received}"
        )
    # The devices decide what --dtype auto means; on GPUs it has 16 bits.
    item_bytes = ITEM_BYTES.get(dtype, 2 if memory_bytes else 4)
    traffic = {
        "tensor": tensor_bytes_per_token(shape, members, item_bytes),
        "pipeline": shape.hidden_dim * item_bytes * (members - 1),
    }
    why = (
        f"strategy {name}: {reason} (a token moves {traffic['pipeline'] / 1e3:,.1f} kB between "
        f"members in a pipeline, {traffic['tensor'] / 1e3:,.1f} kB with tensor)"
    )
    if name != "pipeline":
        return Strategy(name, why, traffic[name])
    weight_bytes = QUANTIZED_BYTES.get(quantization, float(item_bytes))
    stages = cut_layers(shape, members, weight_bytes, memory_bytes)
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
    """Return the padded tokens per batch: the kind's default, less if memory is short.

    More would not be faster, since the matmuls are already large enough.

    Args:
        strategy: as requested; matters only if `members` is more than one.
        memory_bytes: of a device, None if unknown.

    Raises:
        ValueError: a stage that is too large for any device.
    """
    default = KINDS[kind].tokens_per_batch
    if memory_bytes is None or not KINDS[kind].fits_batches:
        return default
    item_bytes = ITEM_BYTES.get(dtype, 2)
    is_cut = 1 < members <= shape.num_layers and strategy != "tensor"
    held = fullest_bytes(
        shape,
        members=members,
        strategy="pipeline" if is_cut else None,
        item_bytes=QUANTIZED_BYTES.get(quantization, float(item_bytes)),
        memory_bytes=memory_bytes,
    )
    return batch_budget(
        shape,
        memory_bytes=memory_bytes,
        held_bytes=held,
        values=values_of(dtype if dtype in ITEM_BYTES else "float16", quantization),
        slices=1 if is_cut else members,
        sequence_length=sequence_length,
        most=default,
    )


def tensor_bytes_per_token(shape: ModelShape, members: int, item_bytes: int) -> int:
    """Return the bytes that each member sends per token.

    Each layer has two ring all-reduces of a hidden state. A ring all-reduce sends 2 (n - 1) / n
    times the array (Patarasuk and Yuan, 2009).
    """
    hidden = shape.hidden_dim * item_bytes
    return 2 * shape.num_layers * hidden * 2 * (members - 1) // members
