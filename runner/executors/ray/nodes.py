"""A cluster that was joined -> places for workers on its nodes, with the model's files there, at
the start and while nodes come and go.

Chores that wait for nodes are done in a thread of their own, so that no batch waits for them. Does
not know batches, actors that predict, or what a dead worker's rows become: `replicas.py` takes the
groups that are ready, and asks which nodes are lost.
"""

import importlib.metadata
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runner.common.errors import ArenaRunnerError, ConfigError, WorkerError, first_line
from runner.common.files import cache_folder, compilation_cache
from runner.common.records import ModelSpec
from runner.executors.ray.calls import ray_errors
from runner.executors.ray.session import find_devices
from runner.executors.ray.shipping import Parcel, Receiver, at, parcels, pieces
from runner.preset.resolve import ANSWERS_DEPEND_ON
from sharding.kinds import KINDS, auto_dtype
from sharding.topology import Node, WorkerSlot, place_on_nodes

# Seconds between looks at which nodes there are.
LOOK_EVERY_S = 2.0
# Seconds in which a node must have started a process with the run's code, and in which it must
# have looked for files or written a piece of one.
ANSWERS_WITHIN_S, WRITES_WITHIN_S = 120.0, 300.0
# Seconds in which the head must say which nodes there are; Ray ends a driver without one in 60.
HEAD_ANSWERS_WITHIN_S = 40.0
# Seconds in which what an earlier run held must be free again.
ROOM_WITHIN_S = 10.0
# Seconds between looks whether the run has ended meanwhile.
WAIT_S = 0.5
# Pieces of a file on their way: so much of Ray's object store they take.
PIECES_IN_FLIGHT = 3
# A parcel of so much is named when it is sent.
WORTH_SAYING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a node says of itself. gpu_dtype: the 16-bit dtype of its GPUs, None where it has none.

    cache: its own folder for compiled programs.
    """

    versions: dict[str, str]
    cores: tuple[int, ...]
    gpu_dtype: str | None
    cache: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A replica that can be started: its places, and for each the model's paths on that node."""

    slots: tuple[WorkerSlot, ...]
    specs: tuple[ModelSpec, ...]


class Keeper(Receiver):
    """The actor that receives a run's files on one node, and knows the node."""

    def __init__(self) -> None:
        super().__init__(cache_folder() / "files")

    def facts(self) -> Facts:
        """Return what this node is."""
        from runner.common.machine import cores_here, gpu_dtype

        return Facts(versions_here(), cores_here(), gpu_dtype(), compilation_cache())


class Nodes:
    """The nodes of a joined cluster that this run may use.

    Args:
        num_workers: the most workers there are to be, None for as many as the nodes suggest.
        is_tensor: groups are of the kind that wants to lie on one node.
        even_here: whether to send files that nodes could read at their own paths.
        note: says a sentence to the person.

    Raises (from `open` and `take_ready`):
        ConfigError: no node has room, or their versions are not those of this process.
        WorkerError: no node could be made ready.
    """

    def __init__(
        self,
        *,
        num_workers: int | None,
        group_size: int,
        is_tensor: bool,
        even_here: bool,
        note: Callable[[str], None],
    ) -> None:
        self._num_workers = num_workers
        self._group_size = group_size
        self._is_tensor = is_tensor
        self._even_here = even_here
        self._note = note
        self._keepers: dict[str, Any] = {}
        self._facts: dict[str, Facts] = {}
        self._names: dict[str, str] = {}
        # Nodes that have had workers, and those that cannot.
        self._used: set[str] = set()
        self._refused: set[str] = set()
        # Replica -> its places, for as long as it lives or may be started again.
        self._placed: dict[int, tuple[WorkerSlot, ...]] = {}
        self._next_replica = 0
        self._ready: SimpleQueue[Ready] = SimpleQueue()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        # Since when the head is asked which nodes there are, None where it has answered.
        self._asking_since: float | None = None
        self._parcels: tuple[Parcel, ...] = ()
        self._first: tuple[WorkerSlot, ...] = ()
        self._thread: threading.Thread | None = None
        self.kind = "cpu"
        self.may_grow = True
        # Ids of nodes that have had workers and are gone.
        self.lost: frozenset[str] = frozenset()

    def open(self, dtype: str) -> tuple[int, str]:
        """Find places for the first workers; return how many replicas they make, and what `dtype`
        means on them, `auto` where only a worker can tell."""
        with ray_errors():
            self.kind, _ = find_devices()
            self._first = self._place(self._wait_for_room(), self._num_workers, is_first=True)
            if dtype == "auto":
                dtype = self._dtype()
        return len(self._first) // self._group_size, dtype

    def start(self, spec: ModelSpec) -> None:
        """Begin to bring the model's files to the nodes, and to look for new ones."""
        self._thread = threading.Thread(target=self._work, args=(spec,), daemon=True, name="nodes")
        self._thread.start()

    def take_ready(self) -> list[Ready]:
        """Return the replicas that became ready to be started since the last call."""
        if self._failure is not None:
            raise self._failure
        since = self._asking_since
        if since is not None and time.monotonic() - since > HEAD_ANSWERS_WITHIN_S:
            raise WorkerError(
                f"The cluster's head has not answered for {HEAD_ANSWERS_WITHIN_S:.0f} s: was it "
                "stopped, or is the network down? `ray status` asks it too."
            )
        found = []
        with suppress(Empty):
            while True:
                found.append(self._ready.get_nowait())
        return found

    def has_lost(self, nodes: Iterable[str]) -> bool:
        """Ask now whether one of these nodes is gone: a worker there has died."""
        alive = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
        return not alive.issuperset(nodes)

    def forget(self, replica: int) -> None:
        """A replica lost its node: its workers may be placed elsewhere."""
        self._placed.pop(replica, None)

    def name(self, node: str) -> str:
        """Return what a person calls a node."""
        return self._names.get(node, node)

    def close(self) -> None:
        """Do no more; the files stay where they are."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        with suppress(ray.exceptions.RayError):
            self._dismiss()

    def _work(self, spec: ModelSpec) -> None:
        try:
            self._parcels = parcels(spec)
            if not self._make_ready(self._first, spec):
                raise WorkerError("No node could be made ready; the lines above say why.")
            self._used |= {slot.node for slot in self._first}
            while not self._stop.wait(LOOK_EVERY_S):
                # What fails here for good fails in the calls to workers too, which say so.
                with suppress(ray.exceptions.RayError):
                    self._look(spec)
        except Exception as failure:
            if not self._stop.is_set():
                self._failure = failure

    def _look(self, spec: ModelSpec) -> None:
        """See which nodes are gone, and put workers on those that came."""
        alive = self._alive()
        self.lost = frozenset(self._used - alive.keys())
        if self._num_workers is None:
            # Those that are in use have as many as they should.
            candidates, wanted = alive.keys() - self._used, None
        else:
            placed = sum(map(len, list(self._placed.values())))
            candidates, wanted = set(alive), self._num_workers - placed
        candidates -= self._refused
        if not candidates or wanted == 0:
            return
        # In the order of their names, as `_alive` has them.
        nodes = {name: node for name, node in alive.items() if name in candidates}
        slots = self._place(nodes, wanted, is_first=False)
        ready = self._make_ready(slots, spec)
        self._used |= {slot.node for slot in ready}
        for node, count in Counter(slot.node for slot in ready).items():
            self._note(f"node {self.name(node)} joins with {count} workers")

    def _wait_for_room(self) -> dict[str, Node]:
        """Return the nodes once they have room, or after a while as they are: those who have just
        left are still counted for some seconds."""
        end = time.monotonic() + ROOM_WITHIN_S
        while True:
            nodes = self._alive()
            found = len(self._choose(nodes, self._num_workers))
            if found >= (self._num_workers or 1) or time.monotonic() > end:
                return nodes
            time.sleep(WAIT_S)

    def _alive(self) -> dict[str, Node]:
        """Return what each node of the cluster has free."""
        self._asking_since = time.monotonic()
        free = ray._private.state.available_resources_per_node()
        alive = [one for one in ray.nodes() if one["Alive"]]
        self._asking_since = None
        found, kind = {}, KINDS[self.kind]
        names = Counter(one["NodeName"] for one in alive)
        for one in alive:
            name, number = one["NodeName"], one["NodeID"]
            # Several on one machine share its address, which is their name.
            self._names[number] = name if names[name] < 2 else f"{name} ({number[:8]})"
            resources = free.get(number, {})
            found[number] = Node(
                number,
                cpus=int(resources.get("CPU", 0)),
                devices=0 if kind.is_host else int(resources.get(kind.resource, 0)),
            )
        return dict(sorted(found.items(), key=lambda pair: (self._names[pair[0]], pair[0])))

    def _place(
        self, nodes: dict[str, Node], num_workers: int | None, *, is_first: bool
    ) -> tuple[WorkerSlot, ...]:
        """Choose places, ask those nodes what they are, and leave out those that cannot do it."""
        while True:
            slots = self._choose(nodes, num_workers)
            if is_first:
                self._check_room(nodes, num_workers, slots)
            chosen = dict.fromkeys(slot.node for slot in slots)
            self._hire(node for node in chosen if node not in self._facts)
            self._check_versions(chosen, is_first=is_first)
            if not any(node in self._refused for node in chosen):
                break
            nodes = {name: node for name, node in nodes.items() if name not in self._refused}
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
        """A node is this run's alone where all of its cores are free: then workers keep to some."""
        facts = self._facts.get(node.id)
        is_whole = facts is not None and len(facts.cores) == node.cpus
        return replace(node, cores=facts.cores) if facts is not None and is_whole else node

    def _check_versions(self, nodes: Sequence[str] | dict[str, None], *, is_first: bool) -> None:
        ours = versions_here()
        for node in nodes:
            facts = self._facts.get(node)
            if facts is None or facts.versions == ours:
                continue
            message = (
                f"Node {self.name(node)} must have the versions that this process has, for the "
                f"same answers: expected {_listed(ours)}. Received: {_listed(facts.versions)}"
            )
            if is_first:
                raise ConfigError(message)
            self._refuse(node, message)

    def _dtype(self) -> str:
        if known := auto_dtype(self.kind):
            return known
        found = {self.name(slot.node): self._facts[slot.node].gpu_dtype for slot in self._first}
        if len(set(found.values())) > 1:
            raise ConfigError(
                "The nodes differ in what --dtype auto means; name one dtype. Received: "
                + ", ".join(f"{name}: {dtype}" for name, dtype in found.items())
            )
        return next(iter(found.values())) or "auto"

    def _make_ready(self, slots: Sequence[WorkerSlot], spec: ModelSpec) -> tuple[WorkerSlot, ...]:
        """Bring the files to the nodes of these workers, and hand on the groups that have them;
        return the places of those."""
        specs = self._ship(list(dict.fromkeys(slot.node for slot in slots)), spec)
        self._dismiss()
        ready: list[WorkerSlot] = []
        for first in range(0, len(slots), self._group_size):
            group = tuple(slots[first : first + self._group_size])
            if all(slot.node in specs for slot in group):
                self._ready.put(Ready(group, tuple(specs[slot.node] for slot in group)))
                ready += group
            else:
                self.forget(group[0].replica)
        return tuple(ready)

    def _ship(self, nodes: list[str], spec: ModelSpec) -> dict[str, ModelSpec]:
        """See to it that each node has the files; return the spec with the paths there."""
        self._hire(node for node in nodes if node not in self._keepers)
        paths: dict[str, dict[str, str]] = {node: {} for node in nodes}
        for parcel in self._parcels:
            found = self._ask(nodes, "find", parcel, even_here=self._even_here)
            missing = [node for node, path in found.items() if path is None]
            found |= self._send(missing, parcel) if missing else {}
            nodes = [node for node in found if node in self._keepers]
            for node in nodes:
                paths[node][parcel.field] = found[node]
        return {node: at(spec, paths[node], self._facts[node].cache) for node in nodes}

    def _send(self, nodes: list[str], parcel: Parcel) -> dict[str, Any]:
        """Send a parcel to nodes, each piece once into Ray's object store for all of them."""
        if parcel.field == "preset" or parcel.bytes > WORTH_SAYING_BYTES:
            names = ", ".join(map(self.name, nodes))
            self._note(f"sending {parcel.field} ({parcel.bytes / 1e6:,.1f} MB) to {names}")
        begun = list(self._ask(nodes, "begin", parcel))
        under_way: deque[dict[str, Any]] = deque()
        for piece in pieces(parcel):
            under_way.append(self._call(begun, "write", parcel.digest, ray.put(piece)))
            if len(under_way) >= PIECES_IN_FLIGHT:
                self._answers(under_way.popleft(), WRITES_WITHIN_S)
            if self._stop.is_set():
                return {}
        while under_way:
            self._answers(under_way.popleft(), WRITES_WITHIN_S)
        return self._ask(begun, "finish", parcel)

    def _hire(self, nodes: Iterable[str]) -> None:
        """Start a keeper on each node and learn what the node is."""
        nodes = list(nodes)
        for node in nodes:
            self._keepers[node] = (
                ray.remote(Keeper)
                .options(
                    num_cpus=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                )
                .remote()
            )
        self._facts |= self._answers(self._call(nodes, "facts"), ANSWERS_WITHIN_S)

    def _dismiss(self) -> None:
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers.clear()

    def _ask(
        self, nodes: Sequence[str], method: str, *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        return self._answers(self._call(nodes, method, *arguments, **named), WRITES_WITHIN_S)

    def _call(
        self, nodes: Sequence[str], method: str, *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        """Call each node's keeper: node -> reference."""
        return {
            node: getattr(self._keepers[node], method).remote(*arguments, **named)
            for node in nodes
            if node in self._keepers
        }

    def _answers(self, calls: dict[str, Any], within_s: float) -> dict[str, Any]:
        """Wait for keepers; those that fail or do not answer are left out from now on."""
        self._wait(list(calls.values()), within_s)
        answers = {}
        for node, reference in calls.items():
            try:
                answers[node] = ray.get(reference, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self._refuse(node, f"no answer within {within_s:.0f} s")
            except (ray.exceptions.RayError, ArenaRunnerError) as error:
                cause = getattr(error, "cause", None)
                self._refuse(node, first_line(cause if isinstance(cause, Exception) else error))
        return answers

    def _wait(self, references: list[Any], within_s: float) -> None:
        """Wait for answers, no longer than until the run ends."""
        end = time.monotonic() + within_s
        while references and not self._stop.is_set() and time.monotonic() < end:
            _, references = ray.wait(references, num_returns=len(references), timeout=WAIT_S)

    def _refuse(self, node: str, why: str) -> None:
        if node not in self._refused and not self._stop.is_set():
            self._note(f"warning: node {self.name(node)} is left out: {why}")
        self._refused.add(node)
        keeper = self._keepers.pop(node, None)
        if keeper is not None:
            ray.kill(keeper)


def versions_here() -> dict[str, str]:
    """Return the versions that must be alike on all machines of a run."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in ANSWERS_DEPEND_ON:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
