"""The Ray actors of one replica: one worker, pipeline stages, or slices of every weight.

Knows how each kind starts, which member to call, and how a batch passes through them. Does not know
what was asked before, nor what answers mean: `group.py` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runner.common.records import ModelSpec
from runner.model.slice_worker import TensorMember
from runner.model.stage_worker import PipelineStage
from runner.model.worker import Replica
from sharding.batches import Batch, BatchShape
from sharding.kinds import GPU, KINDS
from sharding.strategies import Strategy
from sharding.topology import WorkerSlot

# Seconds within which all processes hear that one has ended.
DEATH_IS_KNOWN_WITHIN_S = 3.0
# One batch computes while the next is copied to the device. The members of a tensor group must
# start batches in the same order.
PREDICTING_THREADS = {None: 2, "pipeline": 2, "tensor": 1}
ACTORS = {None: Replica, "pipeline": PipelineStage, "tensor": TensorMember}


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica that can be started.

    slots: its places. specs: for each, the model with its paths on that node. strategy: how its
    members share the weights, None if one worker holds all of them.
    """

    slots: tuple[WorkerSlot, ...]
    specs: tuple[ModelSpec, ...]
    strategy: Strategy | None

    @property
    def strategy_name(self) -> str | None:
        return self.strategy.name if self.strategy else None

    def first_alone(self) -> "Ready":
        """Return a replica of one worker, in the place of the first member."""
        return replace(self, slots=self.slots[:1], specs=self.specs[:1], strategy=None)


class Actors:
    """One set of actors, from start to end. Methods return the references of their calls.

    Args:
        placement: what `reserve` returned for the places.
        family: the backbone's class, which names the layout rules of tensor parallelism.
        log_folder: for the output of workers, None for Ray's own logs.
    """

    def __init__(
        self, ready: Ready, *, placement: Any, family: str, verbose: bool, log_folder: str | None
    ) -> None:
        self._ready = ready
        self._placement = placement
        self._family = family
        plain = ACTORS[ready.strategy_name]
        self._actors = [
            self._actor_class(plain, slot).remote(slot, verbose=verbose, log_folder=log_folder)
            for slot in ready.slots
        ]

    def ping(self) -> list[Any]:
        return [actor.ping.remote() for actor in self._actors]

    def reserve_address(self, host: str) -> list[Any]:
        """Ask the first member where all of a tensor group will meet."""
        return [self._actors[0].reserve_address.remote(host)]

    def load(self, address: str = "") -> list[Any]:
        """Ask each member to load its part.

        Args:
            address: where the members of a tensor group meet.
        """
        strategy, specs = self._ready.strategy, self._ready.specs
        parts: list[tuple[Any, ...]] = [()]
        if strategy is not None and strategy.name == "pipeline":
            parts = [(stage,) for stage in strategy.stages]
        elif strategy is not None:
            parts = [(address, len(specs), self._family)] * len(specs)
        return [
            actor.load.remote(spec, *part)
            for actor, spec, part in zip(self._actors, specs, parts, strict=True)
        ]

    def hold_tokens(self, tokens: Any) -> list[Any]:
        """Give the reference of the token table to the members that read it."""
        # In a pipeline, only the first stage sees tokens.
        readers = self._actors[:1] if self._ready.strategy_name == "pipeline" else self._actors
        return [actor.hold_tokens.remote(tokens) for actor in readers]

    def compile(self, shape: BatchShape) -> list[Any]:
        return [
            actor.compile.options(concurrency_group="compile").remote(shape)
            for actor in self._actors
        ]

    def predict(self, batch: Batch) -> list[Any]:
        """Send a batch on its way; a pipeline's last stage answers for all."""

        def call(method: Any, *arguments: Any) -> Any:
            return method.options(concurrency_group="predict").remote(*arguments)

        if self._ready.strategy_name != "pipeline":
            return [call(actor.predict, batch) for actor in self._actors]
        first, *between, last = self._actors
        activations = call(first.begin, batch)
        for actor in between:
            activations = call(actor.carry_on, activations)
        return [call(last.finish, batch, activations)]

    def predict_in_float(self, batch: Batch) -> Any:
        """Ask a replica of one worker, which need not hold a model; see `Replica`."""
        return self._actors[0].predict_in_float.remote(self._ready.specs[0], batch)

    def has_lost_one(self) -> bool:
        """Return whether one of several processes has ended: then the errors of the others say
        nothing about the batch."""
        if len(self._actors) < 2:
            return False
        pings = self.ping()
        # Members that still wait for the dead one do not answer.
        ready, _ = ray.wait(pings, num_returns=len(pings), timeout=DEATH_IS_KNOWN_WITHIN_S)
        for ping in ready:
            try:
                ray.get(ping)
            except ray.exceptions.RayActorError:
                return True
            except ray.exceptions.RayError:
                continue
        return False

    def kill(self) -> None:
        """End all of them: they may hang, and none can go on alone."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _actor_class(self, plain: type, slot: WorkerSlot) -> Any:
        """Return the Ray actor class of a plain class, for the device of a member."""
        threads = {"compile": 1, "predict": PREDICTING_THREADS[self._ready.strategy_name]}
        devices = _devices(slot)
        return ray.remote(concurrency_groups=threads)(plain).options(
            num_cpus=slot.cpus,
            num_gpus=devices.pop(GPU.resource, 0),  # Ray accepts GPUs by this name only
            resources=devices or None,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=slot.member
            ),
        )


def reserve(slots: Sequence[WorkerSlot]) -> Any:
    """Reserve what a group's members need: in a cluster on the chosen nodes, else on one node if it
    has room for all."""
    bundles = [{"CPU": float(slot.cpus), **_devices(slot)} for slot in slots]
    nodes = [slot.node for slot in slots]
    if not all(nodes):
        return placement_group(bundles, strategy="PACK")
    return placement_group(
        bundles,
        strategy="STRICT_PACK" if len(set(nodes)) == 1 else "PACK",
        bundle_label_selector=[{"ray.io/node-id": node} for node in nodes],
    )


def _devices(slot: WorkerSlot) -> dict[str, int]:
    """Return what a worker needs besides CPUs, by Ray's name."""
    kind = KINDS[slot.kind]
    return {} if kind.is_host else {kind.resource: 1}
