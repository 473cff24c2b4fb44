"""A model's dimensions, a way to hold it and a batch -> bytes a device needs, and what fits.

Pure arithmetic, by which the runner cuts stages and batches and `--plan` says what fits. Does not
know which devices there are.
"""

from dataclasses import dataclass

from sharding.batches import BatchShape
from sharding.costs import ModelShape
from sharding.kinds import KINDS
from sharding.stages import StageLayers, cut_stages

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Of a weight, its scales (and zero points) left out.
QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}
# Of a device's memory; the rest is for activations, work space and the CUDA context.
SHARE_FOR_WEIGHTS = 0.85
# Of a device's memory, for weights and batches together: less than `process.GPU_MEMORY_FRACTION`.
SHARE_IN_USE = 0.9
# The driver with a test set's text and tokens, and Ray's own processes.
DRIVER_BYTES = 1.0e9


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that the fullest device needs. What lies beside activations while they are computed,
    and the float copy of a weight while it is quantized, are both work space."""

    weights_bytes: float
    activations_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.activations_bytes + self.workspace_bytes


def weight_item_bytes(dtype: str, quantization: str) -> float:
    """Bytes of one weight."""
    return QUANTIZED_BYTES.get(quantization, float(ITEM_BYTES[dtype]))


def value_item_bytes(dtype: str, quantization: str) -> int:
    """Bytes of one activation: what is quantized comes out of a product in 32 bits."""
    return 4 if quantization != "none" else ITEM_BYTES[dtype]


def cut_layers(
    shape: ModelShape, members: int, item_bytes: float, memory_bytes: float | None
) -> tuple[StageLayers, ...]:
    """Return the stages of a pipeline.

    Args:
        item_bytes: of a weight.
        memory_bytes: of a device; None for no limit.

    Raises:
        ValueError: more members than layers, or a stage that no device can hold.
    """
    layer_flops = shape.batch_flops(BatchShape(1, 512)) / shape.num_layers
    layer_bytes = int(shape.layer_parameters * item_bytes)
    return cut_stages(
        [layer_flops] * shape.num_layers,
        [layer_bytes] * shape.num_layers,
        members,
        first_bytes=int(shape.vocabulary_size * shape.hidden_dim * item_bytes),
        max_bytes=int(memory_bytes * SHARE_FOR_WEIGHTS) if memory_bytes else None,
    )


def fullest_bytes(
    shape: ModelShape,
    *,
    members: int,
    strategy: str | None,
    item_bytes: float,
    memory_bytes: float | None,
) -> float:
    """Return the bytes of weights that the fullest member of a replica holds.

    Raises:
        ValueError: as `cut_layers`.
    """
    if strategy == "pipeline":
        stages = cut_layers(shape, members, item_bytes, memory_bytes)
        return max(stage.weight_bytes for stage in stages)
    return shape.weight_bytes(item_bytes) / members


def batch_budget(
    shape: ModelShape,
    *,
    memory_bytes: float,
    held_bytes: float,
    value_bytes: int,
    sequence_length: int,
    most: int,
) -> int:
    """Return the padded tokens of a batch that fits beside the weights, at most `most`, but one
    row of `sequence_length` at least.

    Args:
        held_bytes: weights that the fullest device holds.
        value_bytes: of an activation.
    """
    free = memory_bytes * SHARE_IN_USE - held_bytes
    fit = free / shape.working_bytes_per_token(sequence_length, value_bytes)
    return int(max(sequence_length, min(most, fit)))


def need(
    shape: ModelShape,
    *,
    held_bytes: float,
    tokens: int,
    length: int,
    value_bytes: int,
    loading_bytes: float = 0.0,
) -> Need:
    """Return what a device needs for batches of `tokens` padded tokens in rows of `length`.

    Args:
        loading_bytes: beside the weights while they are loaded, before there are batches.
    """
    activations = tokens * shape.activation_bytes_per_token(value_bytes)
    working = tokens * shape.working_bytes_per_token(length, value_bytes)
    return Need(held_bytes, activations, max(working, loading_bytes) - activations)


def host_bytes(
    shape: ModelShape,
    *,
    kind: str,
    workers: int,
    members: int,
    strategy: str | None,
    item_bytes: int,
    device_bytes: float,
) -> float:
    """Return the host memory of a run: the driver, each worker's libraries and the largest tensor
    it reads, twice (as read and as copied); on a CPU what "devices" hold as well.

    Args:
        item_bytes: of a float weight.
        device_bytes: what all workers' devices hold together.
    """
    embedding = shape.vocabulary_size * shape.hidden_dim
    kernel = shape.hidden_dim * shape.intermediate_dim
    if strategy == "tensor":
        largest = workers * embedding / members
    elif strategy == "pipeline":
        largest = workers / members * (embedding + (members - 1) * kernel)
    else:
        largest = workers * embedding
    libraries = workers * KINDS[kind].imported_bytes
    held = device_bytes if KINDS[kind].is_host else 0.0
    return DRIVER_BYTES + libraries + 2 * largest * item_bytes + held
