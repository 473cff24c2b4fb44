"""Devices and a number of workers -> a slot for each worker, on a machine or a cluster's nodes.

Does not know how devices are found, or how a process is bound to one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sharding.kinds import KINDS


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The place of one worker: its replica, its number in that replica's group, and its device.

    kind: cpu, gpu or tpu, or auto for whatever JAX finds. cores: on a CPU, those of this worker.
    node: the id of its machine in a cluster; empty for this machine. cpus: reserved for it there.
    """

    replica: int
    kind: str
    cores: tuple[int, ...] = ()
    member: int = 0
    node: str = ""
    cpus: int = 1


@dataclass(frozen=True, slots=True)
class Node:
    """What is free on a machine of a cluster.

    cpus: as the cluster counts them. devices: GPUs or TPU chips; a worker on one also needs a CPU.
    cores: the machine's, if no other job may use them, else empty.
    """

    id: str
    cpus: int
    devices: int = 0
    cores: tuple[int, ...] = ()

    def places(self, kind: str) -> int:
        """Return how many workers this node can hold."""
        return self.cpus if KINDS[kind].is_host else min(self.devices, self.cpus)


def place_workers(
    *,
    kind: str,
    num_devices: int,
    num_workers: int | None,
    cores: Sequence[int],
    group_size: int = 1,
) -> tuple[WorkerSlot, ...]:
    """Return a slot for each worker; every `group_size` consecutive ones form one replica.

    On GPUs and TPUs each worker has its own device, and `num_workers=None` means as many as form
    whole groups. On a CPU the workers share the cores evenly, and `None` means one group. For whole
    replicas it means one worker for every eight cores, at least two if there are two cores, since
    each holds a copy of the weights.

    Raises:
        ValueError: there are more workers than GPUs or TPUs, or they do not form whole groups.
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
            f"Workers must form whole groups of {group_size}. "
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
    """Return a slot for each worker; every `group_size` consecutive ones form one replica.

    Groups are placed on single nodes while one has room, each on the node with the most room; ties
    go to the first. The remaining places form groups across nodes. With `prefers_one_node` they
    only do if no node had room for a group, since a tensor group sends data for every token.

    On CPUs, `num_workers=None` gives each node as many workers as `place_workers` gives a machine,
    and the workers share their node's CPUs evenly.

    Args:
        num_workers: how many to place at most; None for as many as suit the nodes.
        first_replica: the number of the first replica.

    Returns:
        Fewer slots than `num_workers` if the nodes have no room for more.
    """
    room = {node.id: node.places(kind) for node in nodes}
    if KINDS[kind].is_host and num_workers is None:
        # The CPUs of a node that is too small for a group go to groups across nodes.
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
    """Return the number of workers on a machine's CPUs if the user names none."""
    return group_size if group_size > 1 else max(min(2, count), count // 8)


def _with_cpus(slots: Sequence[WorkerSlot], nodes: dict[str, Node]) -> Iterator[WorkerSlot]:
    """Yield the slots with their shares of their nodes' CPUs, and cores if a node has any."""
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
