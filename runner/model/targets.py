"""The name of an absent device -> what XLA must know to compile for it.

Imports neither JAX nor Keras: the planner sets the environment of the process that compiles.
"""

from dataclasses import dataclass

# The extras that install JAX's compilers for absent devices.
CUDA, TPU = "compile-cuda", "compile-tpu"
# By --device: libtpu's name of the topology, and the accelerator type that has such chips.
TPU_TOPOLOGIES = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "v3-8": ("v3:2x2", "v3-8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTarget:
    """A GPU as XLA's compiler sees it.

    capability: CUDA compute capability. cores: streaming multiprocessors. fpus, threads, shared_kb:
    float32 units, resident threads and shared memory per core. l2_mb, bandwidth_gb_per_s,
    clock_ghz: from the data sheet. memory_bytes: as the driver reports it, less than the data
    sheet's.

    Sources: NVIDIA's CUDA programming guide (limits by compute capability), the architectures'
    white papers (Turing, Ampere, Ada, Hopper) and data sheets.
    """

    title: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_kb: int
    l2_mb: int
    bandwidth_gb_per_s: int
    memory_bytes: int
    clock_ghz: float

    def as_proto(self) -> str:
        """Return XLA's `GpuTargetConfigProto` as text, for CUDA 12.9 and cuDNN 9.8."""
        major, minor = self.capability
        shared = self.shared_kb * 1024
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_core": shared,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": self.bandwidth_gb_per_s * 10**9,
            "l2_cache_size": self.l2_mb << 20,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            # CUDA reserves one KB of shared memory per block.
            "shared_memory_per_block_optin": shared - 1024,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        lines = "\n".join(f"  {name}: {value}" for name, value in device.items())
        return (
            f"gpu_device_info {{\n{lines}\n"
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 8 }\n"
            "runtime_version { major: 12 minor: 9 patch: 0 }\n"
            f'device_description_str: "{self.title}"\n'
        )


def _large(title: str, capability: tuple[int, int], **figures: int | float) -> GpuTarget:
    """Return a data-center card, which has 2,048 threads per core."""
    return GpuTarget(title=title, capability=capability, threads=2048, **figures)  # type: ignore[arg-type]


_A100 = {"cores": 108, "fpus": 64, "shared_kb": 164, "l2_mb": 40, "clock_ghz": 1.41}
_HOPPER = {"cores": 132, "fpus": 128, "shared_kb": 228, "l2_mb": 50, "clock_ghz": 1.98}
GPU_TARGETS = {
    "t4": GpuTarget(
        title="Tesla T4",
        capability=(7, 5),
        cores=40,
        fpus=64,
        threads=1024,
        shared_kb=64,
        l2_mb=4,
        bandwidth_gb_per_s=320,
        memory_bytes=15_843_721_216,
        clock_ghz=1.59,
    ),
    "l4": GpuTarget(
        title="NVIDIA L4",
        capability=(8, 9),
        cores=58,
        fpus=128,
        threads=1536,
        shared_kb=100,
        l2_mb=48,
        bandwidth_gb_per_s=300,
        memory_bytes=23 << 30,
        clock_ghz=2.04,
    ),
    "a100": _large("NVIDIA A100-SXM4-40GB", (8, 0), **_A100, bandwidth_gb_per_s=1555,
                   memory_bytes=40 << 30),
    "a100-80gb": _large("NVIDIA A100-SXM4-80GB", (8, 0), **_A100, bandwidth_gb_per_s=2039,
                        memory_bytes=80 << 30),
    "h100": _large("NVIDIA H100 80GB HBM3", (9, 0), **_HOPPER, bandwidth_gb_per_s=3352,
                   memory_bytes=80 << 30),
    "h200": _large("NVIDIA H200", (9, 0), **_HOPPER, bandwidth_gb_per_s=4800,
                   memory_bytes=140 << 30),
}  # fmt: skip


def extra_for(device: str) -> str | None:
    """Return the extra that installs the compiler for a device, None if there is no compiler."""
    if device in GPU_TARGETS:
        return CUDA
    return TPU if device in TPU_TOPOLOGIES else None


def environment_for(device: str) -> dict[str, str]:
    """Return the environment variables to set before JAX starts, to compile for a device."""
    common = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if device in GPU_TARGETS:
        # Autotuning times kernels on the card itself.
        return common | {
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        }
    return common | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": TPU_TOPOLOGIES[device][1],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    }
