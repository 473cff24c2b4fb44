"""A kind of device (cpu, gpu, tpu) -> everything that depends on the kind, in one record.

To add a kind, add a record here, and find its devices in `runner/common/machine.py`. A model of
device, such as an H100, is an entry in `devices.py`. No other code looks at the name of a kind.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Facts about every device of a kind.

    platform: its name in JAX_PLATFORMS. extra: the package's extra with JAX's libraries for it.
    resource: its name among Ray's resources. place: what a worker needs on a node, in words.
    is_host: its memory and cores are the machine's own. Workers share the cores, the compiler takes
    cores from batches, and weights are in the worker's own memory.
    fits_batches: its memory limits the tokens per batch.
    bucket_multiple: padded lengths are multiples of this, for vector and matrix units.
    kept_values: of a token, in each layer, that stay in its memory until the batch ends, in hidden
    states.
    tokens_per_batch: the default budget, in padded tokens per batch.
    auto_dtype: what --dtype auto means; None if the compute capability decides.
    typical_flops_per_s: of one device that runs a model, rounded.
    efficiency: the share of a large matmul's rate that a model reaches on padded tokens:
    expected, lowest and highest.
    imported_bytes: resident memory of each worker before it loads weights.
    libraries_s: seconds to import Keras, JAX and JAX's libraries.
    """

    name: str
    platform: str
    extra: str
    resource: str
    place: str
    is_host: bool = False
    fits_batches: bool = False
    bucket_multiple: int
    kept_values: float = 0.0
    tokens_per_batch: int
    auto_dtype: str | None
    typical_flops_per_s: float
    efficiency: tuple[float, float, float]
    imported_bytes: float
    libraries_s: float


CPU = Kind(
    name="cpu",
    platform="cpu",
    extra="",
    resource="CPU",
    place="CPU",
    is_host=True,
    bucket_multiple=8,
    # 512 and 2,048 were equally fast and 8,192 a third slower (two cores, hidden size 512).
    tokens_per_batch=2048,
    # Both 16-bit dtypes are slower than float32 on most.
    auto_dtype="float32",
    typical_flops_per_s=1e11,  # a pair of cores with AVX-512
    # Measured: 0.46 to 0.81 (benchmarks/results, LOG.md).
    efficiency=(0.6, 0.5, 0.75),
    imported_bytes=0.4e9,  # measured
    libraries_s=1.5,
)
# For the other two, efficiency, memory and import times are copied from CPUs or guessed.
GPU = Kind(
    name="gpu",
    platform="cuda",
    extra="cuda",
    resource="GPU",
    place="GPU and a CPU",
    fits_batches=True,
    bucket_multiple=16,
    # Enough to fill the matrix units while the float32 attention square of 16 heads at 512 tokens
    # stays near 0.5 GB.
    tokens_per_batch=16384,
    auto_dtype=None,
    typical_flops_per_s=2e13,  # a T4
    efficiency=(0.6, 0.45, 0.75),
    imported_bytes=1.5e9,
    libraries_s=10.0,
)
TPU = Kind(
    name="tpu",
    platform="tpu",
    extra="tpu",
    resource="TPU",
    place="TPU chip and a CPU",
    bucket_multiple=128,
    # By XLA for a v5e: 143 kB a token in 2 layers of Gemma 2 9B, 605 kB in 21. Why is not known.
    kept_values=3.5,
    tokens_per_batch=16384,
    auto_dtype="bfloat16",
    typical_flops_per_s=1e14,  # a TPU v5e
    efficiency=(0.5, 0.35, 0.7),
    imported_bytes=1.5e9,
    libraries_s=15.0,
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (CPU, GPU, TPU)}
# The compute capability of NVIDIA Ampere. Older devices emulate bfloat16; a T4 (7.5) reaches a
# twentieth of its float16 rate.
FIRST_WITH_BFLOAT16 = 8.0


def named_by_jax(platforms: str) -> str:
    """Return the kind of the first platform in JAX_PLATFORMS, or that platform if it is unknown."""
    wanted = platforms.partition(",")[0]
    return next((kind.name for kind in KINDS.values() if kind.platform == wanted), wanted)


def auto_dtype(kind: str, capability: float | None = None) -> str | None:
    """Return what --dtype auto means on a device; None if a GPU's compute capability is unknown."""
    known = KINDS[kind].auto_dtype
    if known is not None or capability is None:
        return known
    return "bfloat16" if capability >= FIRST_WITH_BFLOAT16 else "float16"
