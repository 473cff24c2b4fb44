"""Devices found and workers asked for -> one slot a replica.

Does not know how devices are found or how a process is tied to one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Padded tokens a batch when the person names no budget. CPU: 512 and 2,048 were equally fast and
# 8,192 a third slower (measured on two cores, hidden size 512). GPU and TPU: enough to fill the
# matrix units while the float32 attention square of 16 heads at 512 tokens stays near 0.5 GB.
DEFAULT_TOKENS_PER_BATCH = {"cpu": 2048, "gpu": 16384, "tpu": 16384}

# Padded lengths are multiples of this: what vector and matrix units like.
BUCKET_MULTIPLES = {"cpu": 8, "gpu": 16, "tpu": 128}


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The place of one worker: its replica, its number in that replica's group, and its device.

    `kind` is cpu, gpu or tpu, or auto: whatever JAX finds. `cores` are its own, on a CPU.
    """

    replica: int
    kind: str
    cores: tuple[int, ...] = ()
    member: int = 0


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
    where there are two cores: each holds a copy of the weights.

    Raises:
        ValueError: more workers than devices on GPU or TPU; workers that do not make whole groups.
    """
    if num_workers is None:
        if kind != "cpu":
            num_workers = max(group_size, num_devices // group_size * group_size)
        else:
            num_workers = group_size if group_size > 1 else max(min(2, len(cores)), len(cores) // 8)
    if kind != "cpu" and num_workers > num_devices:
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
            cores=_share_of_cores(cores, number, num_workers) if kind == "cpu" else (),
            member=number % group_size,
        )
        for number in range(num_workers)
    )


def _share_of_cores(cores: Sequence[int], number: int, count: int) -> tuple[int, ...]:
    if count >= len(cores):
        return (cores[number % len(cores)],)
    start, stop = (len(cores) * edge // count for edge in (number, number + 1))
    return tuple(cores[start:stop])
