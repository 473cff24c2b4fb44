"""A model, a way to hold it and a device -> whether it fits, and how long a plan would take.

Numbers alone: `runner/planner/ways.py` says in words how they come about.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sharding.batches import Plan
from sharding.costs import ModelShape
from sharding.kinds import KINDS
from sharding.memory import (
    DRIVER_BYTES,
    ITEM_BYTES,
    SHARE_IN_USE,
    Need,
    batch_budget,
    cut_layers,
    host_bytes,
    need,
    value_item_bytes,
    weight_item_bytes,
)
from sharding.strategies import tensor_bytes_per_token
from sharding.times import Seconds, predict_seconds

# What does not fit: a stage within the share for weights, the weights within a device, weights and
# batches within a device, all workers within the machine.
STAGE, WEIGHTS, DEVICE, HOST = "stage", "weights", "device", "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where a worker computes. memory_bytes: of its device, or of the machine if that is a CPU.
    host_bytes: of the machine, None if not known."""

    kind: str
    memory_bytes: float
    host_bytes: float | None

    @property
    def limit_bytes(self) -> float | None:
        """What one worker must stay within. On a CPU, none: the memory is the machine's."""
        return None if KINDS[self.kind].is_host else self.memory_bytes

    def per_worker_bytes(self, workers: int) -> float:
        """Return the memory that each of so many workers can use."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        left = (self.memory_bytes - DRIVER_BYTES) / workers
        return max(0.0, left - KINDS[self.kind].imported_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to run a model: in which mode, and how workers hold it.

    strategy: None if each worker holds a whole replica. quantizes: whether workers quantize float
    weights while they load them.
    """

    mode: str
    strategy: str | None
    dtype: str
    quantization: str
    workers: int
    members: int
    quantizes: bool

    @property
    def replicas(self) -> int:
        return max(1, self.workers // self.members)

    @property
    def name(self) -> tuple[str, str | None, str, str]:
        """Mode, strategy, dtype and quantization."""
        return self.mode, self.strategy, self.dtype, self.quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What the fullest device needs. The later fields are None if what comes before is too much.

    exceeds: what does not fit, one of the names above; None if all does.
    item_bytes, whole_bytes: of a weight, and of all. held_bytes, share: the fullest member's
    weights, and its part of a replica's FLOPs. budget: the most padded tokens of a batch.
    """

    exceeds: str | None
    item_bytes: float
    whole_bytes: float
    held_bytes: float = 0.0
    share: float = 1.0
    budget: int = 0
    plan: Plan | None = None
    need: Need | None = None
    host_bytes: float | None = None


def fit(
    shape: ModelShape,
    room: Room,
    way: Way,
    *,
    sequence_length: int,
    asked_budget: int | None,
    plan: Callable[[int], Plan],
) -> Fit:
    """Return whether a model fits where it is to be held in a way.

    Args:
        asked_budget: padded tokens of a batch, None to choose.
        plan: padded tokens of a batch -> the batches.
    """
    weights, limit = _fit_weights(shape, room, way), room.limit_bytes
    if weights.exceeds is not None:
        return weights
    held, value_bytes = weights.held_bytes, value_item_bytes(way.dtype, way.quantization)
    budget = asked_budget or KINDS[room.kind].tokens_per_batch
    if asked_budget is None and KINDS[room.kind].fits_batches:
        budget = batch_budget(
            shape,
            memory_bytes=room.memory_bytes,
            held_bytes=held,
            value_bytes=value_bytes,
            sequence_length=sequence_length,
            most=budget,
        )
    batches = plan(budget)
    largest = max(shape.vocabulary_size, shape.intermediate_dim) * shape.hidden_dim
    needs = max(
        (
            need(
                shape,
                held_bytes=held,
                tokens=batch.tokens,
                length=batch.length,
                value_bytes=value_bytes,
                loading_bytes=largest * ITEM_BYTES[way.dtype] if way.quantizes else 0.0,
            )
            for batch in batches.shapes
        ),
        key=lambda one: one.total_bytes,
        default=Need(held, 0.0, 0.0),
    )
    host = host_bytes(
        shape,
        kind=room.kind,
        workers=way.workers,
        members=way.members,
        strategy=way.strategy,
        item_bytes=ITEM_BYTES[way.dtype],
        device_bytes=needs.total_bytes * way.workers,
    )
    exceeds = None
    if limit is not None and needs.total_bytes > limit * SHARE_IN_USE:
        exceeds = DEVICE
    elif room.host_bytes is not None and host > room.host_bytes:
        exceeds = HOST
    return replace(
        weights, exceeds=exceeds, budget=budget, plan=batches, need=needs, host_bytes=host
    )


def _fit_weights(shape: ModelShape, room: Room, way: Way) -> Fit:
    """Return whether the weights alone fit."""
    item_bytes = weight_item_bytes(way.dtype, way.quantization)
    whole, limit = shape.weight_bytes(item_bytes), room.limit_bytes
    found = Fit(exceeds=None, item_bytes=item_bytes, whole_bytes=whole)
    held, share = whole / way.members, 1 / way.members
    if way.strategy == "pipeline":
        try:
            stages = cut_layers(shape, way.members, item_bytes, limit)
        except ValueError:
            return replace(found, exceeds=STAGE)
        held = max(stage.weight_bytes for stage in stages)
        share = max(stage.stop - stage.start for stage in stages) / shape.num_layers
    found = replace(found, held_bytes=held, share=share)
    if limit is not None and held > limit:
        return replace(found, exceeds=WEIGHTS, need=Need(held, 0.0, 0.0))
    return found


def bytes_per_token(shape: ModelShape, way: Way) -> float:
    """Return what one member sends for a token."""
    item_bytes = ITEM_BYTES[way.dtype]
    if way.strategy == "tensor":
        return float(tensor_bytes_per_token(shape, way.members, item_bytes))
    return float(shape.hidden_dim * item_bytes) if way.strategy == "pipeline" else 0.0


def plan_flops(shape: ModelShape, plan: Plan) -> float:
    """Return the FLOPs of a plan's padded batches."""
    return float(sum(shape.batch_flops(batch.shape) for batch in plan.batches))


def forecast(
    shape: ModelShape,
    plan: Plan,
    way: Way,
    before: Seconds,
    *,
    rate: float,
    share: float,
    link_bytes_per_s: float,
) -> Seconds:
    """Return the seconds of a run, stage by stage.

    Args:
        before: its stages but predicting; `tokenize` is all of tokenizing.
        rate: FLOP/s of one worker on the model.
        share: the part of a replica's FLOPs that its busiest member computes.
    """
    return replace(
        before,
        # Workers start and load meanwhile.
        tokenize=max(0.0, before.tokenize - before.start - before.load),
        predict=predict_seconds(
            flops=plan_flops(shape, plan),
            padded_tokens=plan.padded_tokens,
            batches=len(plan.batches),
            rate=rate,
            replicas=way.replicas,
            members=way.members,
            strategy=way.strategy,
            slowest_share=share,
            bytes_per_token=bytes_per_token(shape, way),
            link_bytes_per_s=link_bytes_per_s,
        ),
    )
