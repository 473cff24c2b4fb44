"""A model, a way to run it and a device -> whether it fits, and how long a plan would take.

Returns numbers only. `runner/planner/ways.py` explains them in words.
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
    product_dtype,
    values_of,
    weight_item_bytes,
)
from sharding.strategies import tensor_bytes_per_token
from sharding.times import Seconds, predict_seconds

# What may not fit: a pipeline stage into a device's share for weights, the weights into a device,
# weights and batches into a device, or all workers into the machine's memory.
STAGE, WEIGHTS, DEVICE, HOST = "stage", "weights", "device", "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that a worker may use.

    memory_bytes: its device's; on a CPU, the machine's. host_bytes: the machine's, None if unknown.
    """

    kind: str
    memory_bytes: float
    host_bytes: float | None

    @property
    def limit_bytes(self) -> float | None:
        """The limit for one worker; None on a CPU, where all workers share the machine's memory."""
        return None if KINDS[self.kind].is_host else self.memory_bytes

    def per_worker_bytes(self, workers: int) -> float:
        """Return the memory that each of `workers` workers can use."""
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
    def slices(self) -> int:
        """Return over how many members each weight is sliced."""
        return self.members if self.strategy == "tensor" else 1

    @property
    def name(self) -> tuple[str, str | None, str, str]:
        """Mode, strategy, dtype and quantization."""
        return self.mode, self.strategy, self.dtype, self.quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What the fullest device needs. If the weights do not fit, there is no plan.

    exceeds: what does not fit, one of the names above; None if everything fits.
    item_bytes, whole_bytes: the size of one weight, and of all of them. held_bytes, share: the
    weights of the fullest member, and its share of a replica's FLOPs. budget: the maximum number of
    padded tokens per batch.
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
    """Return whether a model fits, with the batches that it would run.

    Args:
        asked_budget: padded tokens per batch, None to choose.
        plan: padded tokens per batch -> the batches.
    """
    weights = _fit_weights(shape, room, way)
    if weights.exceeds is not None:
        return weights
    budget = asked_budget or KINDS[room.kind].tokens_per_batch
    if asked_budget is None and KINDS[room.kind].fits_batches:
        budget = batch_budget(
            shape,
            memory_bytes=room.memory_bytes,
            held_bytes=weights.held_bytes,
            values=values_of(way.dtype, way.quantization),
            slices=way.slices,
            sequence_length=sequence_length,
            most=budget,
        )
    batches = plan(budget)
    largest = _largest_need(shape, way, batches, weights, KINDS[room.kind].kept_values)
    host = host_bytes(
        shape,
        kind=room.kind,
        workers=way.workers,
        members=way.members,
        strategy=way.strategy,
        item_bytes=ITEM_BYTES[way.dtype],
        device_bytes=largest.total_bytes * way.workers,
    )
    exceeds = None
    if room.limit_bytes is not None and largest.total_bytes > room.limit_bytes * SHARE_IN_USE:
        exceeds = DEVICE
    elif room.host_bytes is not None and host > room.host_bytes:
        exceeds = HOST
    return replace(
        weights, exceeds=exceeds, budget=budget, plan=batches, need=largest, host_bytes=host
    )


def _largest_need(
    shape: ModelShape, way: Way, batches: Plan, weights: Fit, kept_values: float
) -> Need:
    """Return what the fullest device needs for the batches that need the most."""
    layers = shape.num_layers * (weights.share if way.strategy == "pipeline" else 1)
    kept_bytes = kept_values * layers * shape.hidden_dim * ITEM_BYTES[way.dtype]
    largest_weight = max(shape.vocabulary_size, shape.intermediate_dim) * shape.hidden_dim
    loaded = ITEM_BYTES[product_dtype(way.quantization, way.dtype)]
    return max(
        (
            need(
                shape,
                held_bytes=weights.held_bytes,
                tokens=batch.tokens,
                length=batch.length,
                values=values_of(way.dtype, way.quantization),
                slices=way.slices,
                kept_bytes=kept_bytes,
                loading_bytes=largest_weight * loaded if way.quantizes else 0.0,
            )
            for batch in batches.shapes
        ),
        key=lambda one: one.total_bytes,
        default=Need(weights.held_bytes, 0.0, 0.0),
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
    """Return what one member sends per token."""
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
    """Return the seconds of a run, phase by phase.

    Args:
        before: its phases other than predicting; `tokenize` is all of tokenizing.
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
