"""A model's dimensions, how it is held, and a batch -> the bytes that a device needs.

The runner sizes stages and batches with it, and `--plan` says what fits. Does not know which
devices there are.
"""

from dataclasses import dataclass

from sharding.batches import BatchShape
from sharding.costs import ModelShape, Values
from sharding.kinds import KINDS
from sharding.stages import StageLayers, cut_stages

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bytes per weight, without scales and zero points.
QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}
# The share of a device's memory for weights. The rest is for activations, workspace and the CUDA
# context.
SHARE_FOR_WEIGHTS = 0.85
# The share for weights and batches together: less than `process.GPU_MEMORY_FRACTION`.
SHARE_IN_USE = 0.9
# Used by the driver, with the texts and tokens of a test set, and by Ray's own processes.
DRIVER_BYTES = 1.0e9


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that the fullest device needs.

    workspace_bytes: temporary values besides the activations, or the float copy of a weight while
    it is quantized.
    """

    weights_bytes: float
    activations_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.activations_bytes + self.workspace_bytes


def weight_item_bytes(dtype: str, quantization: str) -> float:
    """Return the bytes of one weight."""
    return QUANTIZED_BYTES.get(quantization, float(ITEM_BYTES[dtype]))


def product_dtype(quantization: str | None, dtype: str) -> str:
    """Return the dtype in which a layer quantized in this way computes, in a model of `dtype`.

    A product of int8 is a sum of integers up to 127 x 127 x columns, but float16 ends at 65,504. So
    sums are scaled in float32, and rounded to float16 once, when they leave the layer.
    """
    return "float32" if (quantization, dtype) == ("int8", "float16") else dtype


def values_of(dtype: str, quantization: str) -> Values:
    """Return the bytes of values in layers that compute in a dtype.

    Sums of int8 products have 32 bits. In float32, the input of the next product is rounded to int8
    as soon as it is computed.
    """
    item = ITEM_BYTES[dtype]
    if quantization != "int8":
        return Values(item, item, item)
    return Values(item, 4, 1 if item == 4 else item)


def cut_layers(
    shape: ModelShape, members: int, item_bytes: float, memory_bytes: float | None
) -> tuple[StageLayers, ...]:
    """Return the stages of a pipeline.

    Args:
        item_bytes: of a weight.
        memory_bytes: of a device; None for no limit.

    Raises:
        ValueError: more members than layers, or a stage that is too large for any device.
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
    values: Values,
    slices: int,
    sequence_length: int,
    most: int,
) -> int:
    """Return how many padded tokens per batch fit next to the weights.

    The result is at most `most`, but at least one row of `sequence_length`.

    Args:
        held_bytes: of weights, on the fullest device.
        slices: members of a tensor group, else 1.
    """
    free = memory_bytes * SHARE_IN_USE - held_bytes
    fit = free / shape.working_bytes_per_token(sequence_length, values, slices)
    return int(max(sequence_length, min(most, fit)))


def need(
    shape: ModelShape,
    *,
    held_bytes: float,
    tokens: int,
    length: int,
    values: Values,
    slices: int = 1,
    kept_bytes: float = 0.0,
    loading_bytes: float = 0.0,
) -> Need:
    """Return what a device needs for batches of `tokens` padded tokens, in rows of `length`.

    Args:
        slices: members of a tensor group, else 1.
        kept_bytes: of all layers, for each token.
        loading_bytes: needed beside the weights while they are loaded, before any batch.
    """
    activations = tokens * shape.activation_bytes_per_token(values, slices)
    working = tokens * (shape.working_bytes_per_token(length, values, slices) + kept_bytes)
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
    """Return the host memory of a run.

    Counts the driver, and for each worker its libraries and the largest tensor that it reads, twice
    since it is copied once. On a CPU, also counts what the devices hold.

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
