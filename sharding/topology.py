"""Devices found and workers asked for -> one slot a worker, on a machine or nodes of a cluster.

Does not know how devices are found or how a process is tied to one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sharding.kinds import KINDS


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The place of one worker: its replica, its number in that replica's group, and its device.

    `kind` is cpu, gpu or tpu, or auto: whatever JAX finds. `cores` are its own, on a CPU. `node` is
    the id of its machine in a cluster, empty on this machine; there `cpus` are reserved for it.
    """

    replica: int
    kind: str
    cores: tuple[int, ...] = ()
    member: int = 0
    node: str = ""
    cpus: int = 1


@dataclass(frozen=True, slots=True)
class Node:
    """What a machine of a cluster has free.

    cpus: as the cluster counts them. devices: GPUs or TPU chips, of which each needs a CPU too.
    cores: the machine's own, if nobody else has a part in them; empty if others may.
    """

    id: str
    cpus: int
    devices: int = 0
    cores: tuple[int, ...] = ()

    def places(self, kind: str) -> int:
        """The most workers that this node can hold."""
        return self.cpus if KINDS[kind].is_host else min(self.devices, self.cpus)


def place_workers(
    *,
    kind: str,
    num_devices: int,
    num_workers: int | None,
    cores: Sequence[int],
    group_size: int = 1,
) -> tuple[WorkerSlot, ...]:
    """Return one slot a worker; every `group_size` neighbours make one replica.

    On GPU and TPU each worker has a device of its own; `num_workers=None` takes as many as make
    whole groups. On a CPU the cores are dealt out evenly (more workers than cores share them),
    and `None` means one group, or for whole replicas one worker for every eight cores but two
    if there are two cores: each holds a copy of the weights.

    Raises:
        ValueError: more workers than devices on GPU or TPU; workers that do not make whole groups.
    """
    is_host = KINDS[kind].is_host
    if num_workers is None:
        if not is_host:
            num_workers = max(group_size, num_devices // group_size * group_size)
        else:
            num_workers = _workers_on_cpus(len(cores), group_size)
    if not is_host and num_workers > num_devices:
        raise ValueError(
            f"Each worker needs a {kind} of its own and {num_devices} were found. "
            f"Received: --num-workers {num_workers}"
        )
    if num_workers % group_size:
        raise ValueError(
            f"Workers must make whole groups of {group_size}. "
            f"Received: --num-workers {num_workers} --group-size {group_size}"
        )
    return tuple(
        WorkerSlot(
            replica=number // group_size,
            kind=kind,
            cores=_share_of_cores(cores, number, num_workers) if is_host else (),
            member=number % group_size,
        )
        for number in range(num_workers)
    )


def place_on_nodes(
    *,
    kind: str,
    nodes: Sequence[Node],
    num_workers: int | None,
    group_size: int = 1,
    prefers_one_node: bool = False,
    first_replica: int = 0,
) -> tuple[WorkerSlot, ...]:
    """Return one slot a worker; every `group_size` neighbours make one replica.

    A group lies on one node as long as some node has room for it: first on the one that is
    emptiest, of nodes alike on the first. What is left over makes groups across nodes, unless
    `prefers_one_node` and there was room for a whole one somewhere: what a tensor group sends for
    each token wants no network.

    On CPUs, `num_workers=None` gives each node what `place_workers` gives one machine, and a
    node's CPUs are dealt out evenly to its workers.

    Args:
        num_workers: the most to place, None for as many as the nodes suggest.
        first_replica: the number of the first replica.

    Returns:
        Fewer slots than `num_workers` if the nodes have no room for more.
    """
    room = {node.id: node.places(kind) for node in nodes}
    if KINDS[kind].is_host and num_workers is None:
        # A node too small for a group gives its CPUs to groups across nodes.
        room = {
            name: min(count, _workers_on_cpus(count, group_size)) if count >= group_size else count
            for name, count in room.items()
        }
    groups_left = sum(room.values()) if num_workers is None else num_workers // group_size
    groups: list[tuple[str, ...]] = []
    while len(groups) < groups_left and room:
        emptiest = max(room, key=lambda name: room[name])
        if room[emptiest] < group_size:
            break
        room[emptiest] -= group_size
        groups.append((emptiest,) * group_size)
    if not (prefers_one_node and groups):
        left = [name for name, count in room.items() for _ in range(count)]
        while len(groups) < groups_left and len(left) >= group_size:
            groups.append(tuple(left[:group_size]))
            del left[:group_size]
    slots = [
        WorkerSlot(first_replica + number, kind, member=member, node=name)
        for number, members in enumerate(groups)
        for member, name in enumerate(members)
    ]
    if not KINDS[kind].is_host:
        return tuple(slots)
    return tuple(_with_cpus(slots, {node.id: node for node in nodes}))


def _workers_on_cpus(count: int, group_size: int) -> int:
    """Workers on so many CPUs of a machine if the user names no number."""
    return group_size if group_size > 1 else max(min(2, count), count // 8)


def _with_cpus(slots: Sequence[WorkerSlot], nodes: dict[str, Node]) -> Iterator[WorkerSlot]:
    """Deal each node's CPUs, and its cores if they are its own, to the workers on it."""
    counts = Counter(slot.node for slot in slots)
    placed: Counter[str] = Counter()
    for slot in slots:
        node, number = nodes[slot.node], placed[slot.node]
        placed[slot.node] += 1
        share = _share_of_cores(node.cores, number, counts[slot.node]) if node.cores else ()
        cpus = len(share) or node.cpus // counts[slot.node]
        yield replace(slot, cores=share, cpus=cpus)


def _share_of_cores(cores: Sequence[int], number: int, count: int) -> tuple[int, ...]:
    if count >= len(cores):
        return (cores[number % len(cores)],)
    start, stop = (len(cores) * edge // count for edge in (number, number + 1))
    return tuple(cores[start:stop])
