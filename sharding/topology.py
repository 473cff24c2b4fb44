"""Devices found and workers asked for -> one slot a replica.

Does not know how devices are found or how a process is tied to one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Padded tokens a batch when the person names no budget. CPU: 512 and 2,048 were equally fast and
# 8,192 a third slower (measured on two cores, hidden size 512). GPU and TPU: enough to fill the
# matrix units while the float32 attention square of 16 heads at 512 tokens stays near 0.5 GB.
DEFAULT_TOKENS_PER_BATCH = {"cpu": 2048, "gpu": 16384, "tpu": 16384}


@dataclass(frozen=True, slots=True)
class ReplicaSlot:
    """The place of one replica: its number, the kind of device, and its cores on a CPU.

    `kind` is cpu, gpu or tpu, or auto: whatever JAX finds.
    """

    replica: int
    kind: str
    cores: tuple[int, ...] = ()


def place_replicas(
    *, kind: str, num_devices: int, num_workers: int | None, cores: Sequence[int]
) -> tuple[ReplicaSlot, ...]:
    """Return one slot a worker.

    On GPU and TPU each worker has a device of its own; `num_workers=None` takes all. On a CPU the
    cores are dealt out evenly (more workers than cores share them), and `None` means one worker
    for every eight cores but two where there are two cores: each holds a copy of the weights.

    Raises:
        ValueError: more workers than devices on GPU or TPU.
    """
    if kind == "cpu":
        count = num_workers or max(min(2, len(cores)), len(cores) // 8)
        return tuple(
            ReplicaSlot(replica, kind, _share_of_cores(cores, replica, count))
            for replica in range(count)
        )
    count = num_workers or max(1, num_devices)
    if count > num_devices:
        raise ValueError(
            f"Each worker needs a {kind} of its own and {num_devices} were found. "
            f"Received: --num-workers {count}"
        )
    return tuple(ReplicaSlot(replica, kind) for replica in range(count))


def _share_of_cores(cores: Sequence[int], replica: int, count: int) -> tuple[int, ...]:
    if count >= len(cores):
        return (cores[replica % len(cores)],)
    start, stop = (len(cores) * edge // count for edge in (replica, replica + 1))
    return tuple(cores[start:stop])
