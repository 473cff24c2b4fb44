"""FLOPs, bytes and a device's rate -> seconds of a run, stage by stage.

Pure arithmetic. Where a figure was measured by this project the comment says where; the others are
named as guesses, in the plan's own words too. Does not know which devices there are.
"""

from dataclasses import dataclass

from sharding.costs import COMPILE_S_PER_LAYER, ModelShape
from sharding.kinds import KINDS

# One process on all cores against as many as there are cores: 12.5 s and 11.5 s, measured on two.
ONE_PROCESS_ON_A_CPU = 0.92
# Bytes a second that members of a tensor group exchange through gloo on one CPU machine: 18.5 kB a
# token cost 2.6 s of 122,880 tokens (benchmarks/results/2026-11-23-modes.md).
CPU_LINK_BYTES_PER_S = 0.9e9
# Activations of a pipeline go through host memory: copied off, put in the object store, copied on.
STAGE_LINK_BYTES_PER_S = 1.0e9
# Process, imports, Ray and its actors, the end: measured on two CPU cores.
START_S = {"single": 1.0, "ray": 4.5}
# The graph of the model.
GRAPH_S_PER_LAYER = 0.05
# A guess: a local SSD gives more, a network disk less.
DISK_BYTES_PER_S = 0.5e9
# Float weights that a worker turns into int8 or int4 a second: 160 M in 3.7 s (LOG.md).
QUANTIZED_PER_S = 43e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """The seconds of each stage of a run. tokenize: the part that is left when the workers have
    started and loaded."""

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
    """Return the seconds in which all workers have loaded.

    Workers read the same files at the same time, so the disk gives each byte once; the members of a
    pipeline quantize their parts side by side.
    """
    libraries = KINDS[kind].libraries_s + GRAPH_S_PER_LAYER * shape.num_layers
    quantizing = shape.weight_bytes(1) / QUANTIZED_PER_S if quantizes else 0.0
    if strategy == "pipeline":
        quantizing /= members
    return libraries + file_bytes / DISK_BYTES_PER_S + quantizing


def compile_seconds(
    shape: ModelShape, *, kind: str, shapes: int, replicas: int, members: int, strategy: str | None
) -> float:
    """Return what compiling adds to a run in which nothing is in the cache.

    The first shape is waited for. The others compile beside the batches: on a GPU or TPU in host
    cores that are free, on a CPU in those that compute. Each shape compiles on one worker alone.
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

    Replicas pull batches, so the last one waits half a batch on average. A pipeline is as fast as
    its slowest stage, or as its hand-over if that is slower; filling and draining it costs a
    batch a further stage. A tensor group computes, then exchanges.

    Args:
        flops: matmul FLOPs of padded tokens, attention included.
        rate: FLOP/s of one worker on a whole model.
        slowest_share: the part of a replica's FLOPs that its busiest member computes.
        bytes_per_token: what one member sends.
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
