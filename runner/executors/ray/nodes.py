"""A joined cluster -> places for workers on its nodes, with the model's files there, at the start
and while nodes come and go.

A separate thread waits for nodes, so that no batch has to. Does not know batches, actors that
predict, or what becomes of a dead worker's rows: `replicas.py` takes the replicas that are ready,
and `failures.py` asks which nodes are lost.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import ray
import ray.exceptions

from runner.common.errors import ConfigError, WorkerError
from runner.common.records import ModelSpec
from runner.common.units import seconds_text
from runner.executors.ray.actors import Ready
from runner.executors.ray.calls import ray_errors
from runner.executors.ray.keepers import WAIT_S, Keepers
from runner.executors.ray.session import find_devices
from runner.executors.ray.shipping import Parcel, parcels
from sharding.kinds import KINDS, auto_dtype
from sharding.strategies import Strategy
from sharding.topology import Node, WorkerSlot, place_on_nodes

# Seconds between checks which nodes there are.
LOOK_EVERY_S = 2.0
# Seconds in which the head must list its nodes; after 60 s without a head Ray ends the driver.
HEAD_ANSWERS_WITHIN_S = 40.0
# Seconds in which the devices of an earlier run must become free.
ROOM_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Model:
    """What workers load: paths on this machine, how a replica's members share it, its files."""

    spec: ModelSpec
    strategy: Strategy | None
    parcels: tuple[Parcel, ...]


class Cluster:
    """The nodes that are alive, and their free resources."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        # Since when the head has been asked for its nodes, None if it has answered.
        self._asking_since: float | None = None

    def alive(self, kind: str) -> dict[str, Node]:
        """Return each node with its free CPUs and devices of a kind, ordered by name."""
        self._asking_since = time.monotonic()
        free = ray._private.state.available_resources_per_node()
        alive = [one for one in ray.nodes() if one["Alive"]]
        self._asking_since = None
        names = Counter(one["NodeName"] for one in alive)
        for one in alive:
            name, number = one["NodeName"], one["NodeID"]
            # Nodes on one machine share its address as their name.
            self._names[number] = name if names[name] < 2 else f"{name} ({number[:8]})"
        ids = sorted((one["NodeID"] for one in alive), key=lambda node: (self.name(node), node))
        return {node: _free_of(node, free.get(node, {}), kind) for node in ids}

    def name(self, node: str) -> str:
        """Return what a user calls a node."""
        return self._names.get(node, node)

    def check_head(self) -> None:
        """Raise WorkerError if the head has not answered for too long."""
        since = self._asking_since
        if since is not None and time.monotonic() - since > HEAD_ANSWERS_WITHIN_S:
            raise WorkerError(
                "The cluster's head has not answered for "
                f"{seconds_text(HEAD_ANSWERS_WITHIN_S)}: was it stopped, or is the network down? "
                "`ray status` asks it too."
            )


class Nodes:
    """The nodes of a joined cluster that this run may use.

    Args:
        num_workers: the most workers to start, None for as many as the nodes suggest.
        is_tensor: whether groups are tensor-parallel, and so should be on one node.
        note: shows a sentence to the user.

    Raises (from `open` and `take_ready`):
        ConfigError: no node has room, or the nodes' versions differ from this process'.
        WorkerError: no node could be prepared.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        group_size: int,
        is_tensor: bool,
        note: Callable[[str], None],
    ) -> None:
        self._num_workers = num_workers
        self._group_size = group_size
        self._is_tensor = is_tensor
        self._note = note
        self._stop = threading.Event()
        self._cluster = Cluster()
        self.name = self._cluster.name
        self._keepers = Keepers(self.name, note, self._stop)
        # Nodes that have had workers.
        self._used: set[str] = set()
        # Replica -> its places, for as long as it lives or may be restarted.
        self._placed: dict[int, tuple[WorkerSlot, ...]] = {}
        self._next_replica = 0
        self._ready: SimpleQueue[Ready] = SimpleQueue()
        self._failure: Exception | None = None
        self._first: tuple[WorkerSlot, ...] = ()
        self._at_close = ExitStack()
        self.kind = "cpu"
        self.may_grow = True
        # Ids of nodes that have had workers and are gone.
        self.lost: frozenset[str] = frozenset()

    def open(self, dtype: str) -> tuple[int, str]:
        """Find places for the first workers; see `Places.open`."""
        with ray_errors():
            self.kind, _ = find_devices()
            self._first = self._place(self._wait_for_room(), self._num_workers, is_first=True)
            if dtype == "auto":
                dtype = self._dtype()
        return len(self._first) // self._group_size, dtype

    def memory_bytes(self) -> int | None:
        facts = (self._keepers.facts[slot.node] for slot in self._first)
        return min((one.gpu_memory_bytes for one in facts if one.gpu_memory_bytes), default=None)

    def start(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        """Begin to bring the model's files to the nodes, and to look for new nodes."""
        thread = threading.Thread(
            target=self._work, args=(spec, strategy), daemon=True, name="nodes"
        )
        self._at_close.callback(thread.join, timeout=5)
        thread.start()

    def take_ready(self) -> list[Ready]:
        if self._failure is not None:
            raise self._failure
        self._cluster.check_head()
        found = []
        with suppress(Empty):
            while True:
                found.append(self._ready.get_nowait())
        return found

    def has_lost(self, nodes: Iterable[str]) -> bool:
        alive = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
        return not alive.issuperset(nodes)

    def forget(self, replica: int) -> None:
        self._placed.pop(replica, None)

    def close(self) -> None:
        self._stop.set()
        self._at_close.close()
        with suppress(ray.exceptions.RayError):
            self._keepers.dismiss()

    def _work(self, spec: ModelSpec, strategy: Strategy | None) -> None:
        try:
            model = Model(spec, strategy, parcels(spec))
            if not self._make_ready(self._first, model):
                raise WorkerError("No node could be prepared; the lines above say why.")
            self._used |= {slot.node for slot in self._first}
            while not self._stop.wait(LOOK_EVERY_S):
                # A lasting failure shows in the calls to workers too.
                with suppress(ray.exceptions.RayError):
                    self._look(model)
        except Exception as failure:
            if not self._stop.is_set():
                self._failure = failure

    def _look(self, model: Model) -> None:
        """Find out which nodes are gone, and put workers on new ones."""
        alive = self._cluster.alive(self.kind)
        self.lost = frozenset(self._used - alive.keys())
        if self._num_workers is None:
            # Nodes in use have as many workers as they should.
            candidates, wanted = alive.keys() - self._used, None
        else:
            placed = sum(map(len, list(self._placed.values())))
            candidates, wanted = set(alive), self._num_workers - placed
        candidates -= self._keepers.refused
        if not candidates or wanted == 0:
            return
        # Ordered by name, as in `alive`.
        nodes = {name: node for name, node in alive.items() if name in candidates}
        ready = self._make_ready(self._place(nodes, wanted, is_first=False), model)
        self._used |= {slot.node for slot in ready}
        for node, count in Counter(slot.node for slot in ready).items():
            self._note(f"node {self.name(node)} joins with {count} workers")

    def _wait_for_room(self) -> dict[str, Node]:
        """Return the nodes once they have room, or as they are after a while: Ray still counts the
        workers of a run that has just ended."""
        end = time.monotonic() + ROOM_WITHIN_S
        while True:
            nodes = self._cluster.alive(self.kind)
            found = len(self._choose(nodes, self._num_workers))
            if found >= (self._num_workers or 1) or time.monotonic() > end:
                return nodes
            time.sleep(WAIT_S)

    def _place(
        self, nodes: dict[str, Node], num_workers: int | None, *, is_first: bool
    ) -> tuple[WorkerSlot, ...]:
        """Choose places; leave out nodes whose versions differ."""
        keepers = self._keepers
        while True:
            slots = self._choose(nodes, num_workers)
            if is_first:
                self._check_room(nodes, num_workers, slots)
            chosen = dict.fromkeys(slot.node for slot in slots)
            keepers.hire(node for node in chosen if node not in keepers.facts)
            keepers.check_versions(chosen, is_first=is_first)
            if keepers.refused.isdisjoint(chosen):
                break
            nodes = {name: node for name, node in nodes.items() if name not in keepers.refused}
        nodes = {name: self._with_cores(node) for name, node in nodes.items()}
        slots = self._choose(nodes, num_workers)
        for slot in slots:
            self._placed[slot.replica] = (*self._placed.get(slot.replica, ()), slot)
            self._next_replica = slot.replica + 1
        return slots

    def _choose(self, nodes: dict[str, Node], num_workers: int | None) -> tuple[WorkerSlot, ...]:
        return place_on_nodes(
            kind=self.kind,
            nodes=tuple(nodes.values()),
            num_workers=num_workers,
            group_size=self._group_size,
            prefers_one_node=self._is_tensor,
            first_replica=self._next_replica,
        )

    def _check_room(
        self, nodes: dict[str, Node], num_workers: int | None, slots: Sequence[WorkerSlot]
    ) -> None:
        if len(slots) == num_workers or (slots and num_workers is None):
            return
        places = sum(node.places(self.kind) for node in nodes.values())
        groups = f" and groups of {self._group_size}" if self._group_size > 1 else ""
        raise ConfigError(
            f"Each worker needs a {KINDS[self.kind].place} of its own{groups}: {places} are free "
            f"on the {len(nodes)} nodes that can take part. Received: --num-workers "
            f"{num_workers or 'auto'}"
        )

    def _with_cores(self, node: Node) -> Node:
        """Name the node's cores if all are free: the run has it alone, so workers can be pinned."""
        facts = self._keepers.facts.get(node.id)
        is_whole = facts is not None and len(facts.cores) == node.cpus
        return replace(node, cores=facts.cores) if facts is not None and is_whole else node

    def _dtype(self) -> str:
        if known := auto_dtype(self.kind):
            return known
        facts = self._keepers.facts
        found = {self.name(slot.node): facts[slot.node].gpu_dtype for slot in self._first}
        if len(set(found.values())) > 1:
            raise ConfigError(
                "The nodes differ in what --dtype auto means; name one dtype. Received: "
                + ", ".join(f"{name}: {dtype}" for name, dtype in found.items())
            )
        return next(iter(found.values())) or "auto"

    def _make_ready(self, slots: Sequence[WorkerSlot], model: Model) -> tuple[WorkerSlot, ...]:
        """Bring the files to the nodes of these workers; queue the groups that have them as ready,
        and return their places."""
        nodes = list(dict.fromkeys(slot.node for slot in slots))
        specs = self._keepers.ship(nodes, model.spec, model.parcels)
        self._keepers.dismiss()
        ready: list[WorkerSlot] = []
        for first in range(0, len(slots), self._group_size):
            group = tuple(slots[first : first + self._group_size])
            if all(slot.node in specs for slot in group):
                paths = tuple(specs[slot.node] for slot in group)
                self._ready.put(Ready(group, paths, model.strategy))
                ready += group
            else:
                self.forget(group[0].replica)
        return tuple(ready)


def _free_of(node: str, free: dict[str, float], kind: str) -> Node:
    known = KINDS[kind]
    devices = 0 if known.is_host else int(free.get(known.resource, 0))
    return Node(node, cpus=int(free.get("CPU", 0)), devices=devices)
