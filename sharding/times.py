"""FLOPs, bytes and a device's rate -> seconds of a run, phase by phase.

For each figure that this project measured, a comment says where. The others are guesses, and the
plan says so. Does not know which devices there are.
"""

from dataclasses import dataclass

from sharding.costs import COMPILE_S_PER_LAYER, ModelShape
from sharding.kinds import KINDS

# The speed of one process on all cores, relative to one process per core: 12.5 s and 11.5 s,
# measured on two cores.
ONE_PROCESS_ON_A_CPU = 0.92
# How fast members of a tensor group exchange data through gloo on one CPU machine: 18.5 kB per
# token took 2.6 s for 122,880 tokens (benchmarks/results/2026-11-23-modes.md).
CPU_LINK_BYTES_PER_S = 0.9e9
# Activations of a pipeline go through host memory and Ray's object store.
STAGE_LINK_BYTES_PER_S = 1.0e9
# The process, imports, Ray and its actors, and the end of the run: measured on two CPU cores.
START_S = {"single": 1.0, "ray": 4.5}
# To build the model's graph.
GRAPH_S_PER_LAYER = 0.05
# A guess: a local SSD is faster, a network disk slower.
DISK_BYTES_PER_S = 0.5e9
# Float weights that a worker quantizes per second: 160 M in 3.7 s (LOG.md).
QUANTIZED_PER_S = 43e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """The seconds of each phase of a run. tokenize: what is left once the workers have loaded."""

    read: float
    tokenize: float
    start: float
    load: float
    compile: float
    predict: float = 0.0

    @property
    def total(self) -> float:
        before = self.read + self.tokenize + self.start + self.load + self.compile
        return before + self.predict


def load_seconds(
    shape: ModelShape,
    *,
    kind: str,
    file_bytes: float,
    members: int,
    strategy: str | None,
    quantizes: bool,
) -> float:
    """Return the seconds until all workers have loaded.

    Workers read the same files at the same time, so the disk reads each byte once. Members of a
    pipeline quantize their parts in parallel.
    """
    libraries = KINDS[kind].libraries_s + GRAPH_S_PER_LAYER * shape.num_layers
    quantizing = shape.weight_bytes(1) / QUANTIZED_PER_S if quantizes else 0.0
    if strategy == "pipeline":
        quantizing /= members
    return libraries + file_bytes / DISK_BYTES_PER_S + quantizing


def compile_seconds(
    shape: ModelShape, *, kind: str, shapes: int, replicas: int, members: int, strategy: str | None
) -> float:
    """Return the seconds that compiling adds to a run with an empty cache.

    The run waits for the first shape. The others compile while batches run: with a GPU or TPU on
    idle host cores, with a CPU on the cores that compute. One worker compiles each shape.
    """
    one = COMPILE_S_PER_LAYER * shape.num_layers / (members if strategy == "pipeline" else 1)
    others = (shapes - 1) / replicas if KINDS[kind].is_host else 0.0
    return one * (1 + others)


def predict_seconds(
    *,
    flops: float,
    padded_tokens: int,
    batches: int,
    rate: float,
    replicas: int,
    members: int = 1,
    strategy: str | None = None,
    slowest_share: float = 1.0,
    bytes_per_token: float = 0.0,
    link_bytes_per_s: float = 1.0,
) -> float:
    """Return the seconds of all batches.

    Replicas pull batches, so at the end each waits half a batch on average. A pipeline is as fast
    as its slowest stage or transfer; filling and draining it takes one batch for each stage after
    the first. A tensor group computes, then exchanges.

    Args:
        flops: matmul FLOPs of padded tokens, attention included.
        rate: FLOP/s of one worker on a whole model.
        slowest_share: the share of a replica's FLOPs that its busiest member computes.
        bytes_per_token: that one member sends.
    """
    batches = max(batches, 1)
    compute = flops * slowest_share / rate / replicas
    if strategy == "pipeline":
        traffic = padded_tokens / replicas * bytes_per_token / STAGE_LINK_BYTES_PER_S
        one_batch = max(compute, traffic) / batches * replicas
        return max(compute, traffic) + (members - 1 + 0.5 * (replicas > 1)) * one_batch
    if strategy == "tensor":
        compute += padded_tokens / replicas * bytes_per_token / link_bytes_per_s
    return compute * (1 + 0.5 * (replicas > 1) * replicas / batches)
