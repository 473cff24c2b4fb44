"""Where replicas may start: the interface `Places`, and this machine's places.

The places on the nodes of a cluster are in `nodes.py`.
"""

from collections.abc import Iterable
from typing import Protocol

from runner.common.errors import ConfigError
from runner.common.machine import cores_here, device_memory_bytes, gpu_dtype
from runner.common.records import ModelSpec
from runner.executors.ray.actors import Ready
from runner.executors.ray.calls import ray_errors
from runner.executors.ray.session import find_devices, start_ray
from sharding.kinds import auto_dtype
from sharding.strategies import Strategy
from sharding.topology import WorkerSlot, place_workers


class Places(Protocol):
    """Places for workers, from the start of a run to its end.

    Attributes:
        kind: of the devices, known once it is open.
        may_grow: whether places may be added, so that a run without replicas waits for them.
        lost: ids of nodes that had workers and are gone.
    """

    kind: str
    may_grow: bool
    lost: frozenset[str]

    def open(self, dtype: str) -> tuple[int, str]:
        """Find the devices; return how many replicas fit, and what `dtype` means on the devices:
        still `auto` if only a worker can tell."""

    def memory_bytes(self) -> int | None:
        """Return the memory of the smallest GPU of these places, None if unknown."""

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        """Begin to prepare the places for a model whose weights are shared in this way."""

    def take_ready(self) -> list[Ready]:
        """Return the replicas that have become ready to start since the last call."""

    def has_lost(self, nodes: Iterable[str]) -> bool:
        """Check whether one of these nodes is gone."""

    def forget(self, replica: int) -> None:
        """Free the places of a replica that is gone for good."""

    def name(self, node: str) -> str:
        """Return what a user calls a node."""

    def close(self) -> None:
        """Stop; files that were sent stay on their nodes."""


class Here:
    """The places of this machine, in a Ray that starts with the run."""

    def __init__(self, *, num_workers: int | None, group_size: int, verbose: bool) -> None:
        self._num_workers = num_workers
        self._group_size = group_size
        self._verbose = verbose
        self._slots: tuple[WorkerSlot, ...] = ()
        self._ready: list[Ready] = []
        self.kind = "cpu"
        self.may_grow = False
        self.lost: frozenset[str] = frozenset()

    def open(self, dtype: str) -> tuple[int, str]:
        cores = cores_here()
        num_cpus = max(len(cores), self._num_workers or 1, self._group_size)
        start_ray(num_cpus, verbose=self._verbose)
        with ray_errors():
            self.kind, num_devices = find_devices()
        try:
            self._slots = place_workers(
                kind=self.kind,
                num_devices=num_devices,
                num_workers=self._num_workers,
                cores=cores,
                group_size=self._group_size,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if dtype == "auto":
            dtype = auto_dtype(self.kind) or gpu_dtype() or "auto"
        return len(self._slots) // self._group_size, dtype

    def memory_bytes(self) -> int | None:
        return device_memory_bytes()

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        for first in range(0, len(self._slots), self._group_size):
            slots = self._slots[first : first + self._group_size]
            self._ready.append(Ready(slots, (spec,) * len(slots), strategy))

    def take_ready(self) -> list[Ready]:
        ready, self._ready = self._ready, []
        return ready

    def has_lost(self, nodes: Iterable[str]) -> bool:  # noqa: ARG002 - Ray ends with its only node
        return False

    def forget(self, replica: int) -> None:
        """No other replica needs its places."""

    def name(self, node: str) -> str:
        return node

    def close(self) -> None:
        """Ray ends with the run."""
