"""This machine, or the name of a device -> the devices that workers compute on.

Reads nvidia-smi, /dev, /proc and the control group, and times a matmul on one CPU core. Starts
neither Ray nor JAX, since the driver must not take device memory. Does not know models.
"""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from runner.common.errors import ConfigError
from sharding.devices import DEVICES, DeviceModel, find_model, recognize
from sharding.kinds import KINDS, auto_dtype, named_by_jax
from sharding.times import CPU_LINK_BYTES_PER_S

# Speed of a whole model relative to float32, by dtype and quantization, on a core with AVX-512
# BF16 and VNNI (benchmarks/LOG.md, 2026-11-26). Not known for cores without them.
CPU_SPEEDUPS = {
    ("float32", "none"): 1.0,
    ("bfloat16", "none"): 1.6,
    ("float32", "int8"): 1.55,
    ("bfloat16", "int8"): 1.50,
}
CPU_FEATURES = ("avx512_bf16", "avx512_vnni")
MULTIPLY_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
MEASURE_RATE = """
import time, numpy
values = numpy.full((1024, 1024), 1 / 1024, numpy.float32)
best, end = 1.0, time.perf_counter() + 0.6
while time.perf_counter() < end:
    started = time.perf_counter()
    values @ values
    best = min(best, time.perf_counter() - started)
print(2 * 1024**3 / best)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices of a run: `count` of one kind; on a CPU, the `cores` to divide among workers.

    model: the device's entry in `sharding.devices`; None on a CPU or if there is no entry.
    memory_bytes: of one GPU or TPU; on a CPU, of the machine.
    host_bytes: memory of the machine; None if the devices are not here.
    core_flops_per_s: float32 matmul rate of one CPU core, as measured now.
    """

    kind: str
    title: str
    count: int
    is_here: bool
    memory_bytes: float
    host_bytes: float | None
    model: DeviceModel | None = None
    cores: tuple[int, ...] = ()
    core_flops_per_s: float = 0.0
    is_fast_in_16_bits: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_host(self) -> bool:
        """Whether workers share this machine's cores and memory."""
        return KINDS[self.kind].is_host

    @property
    def native_dtype(self) -> str:
        """What --dtype auto means."""
        if self.model is not None and not KINDS[self.kind].auto_dtype:
            return self.model.native_dtype
        return KINDS[self.kind].auto_dtype or "bfloat16"

    def rate(self, dtype: str, quantization: str) -> float | None:
        """Return the FLOP/s of a large matmul on one device or core; None if it is not known.

        On a CPU, int8 counts as fast as `dtype` unless it was measured to be faster. int4 is as
        fast as `dtype` everywhere, since it is unpacked first.
        """
        if self.is_host:
            form = (dtype, "none" if quantization == "int4" else quantization)
            speedup = CPU_SPEEDUPS.get(form)
            if speedup is None or (speedup != 1 and not self.is_fast_in_16_bits):
                return None
            return self.core_flops_per_s * speedup
        return self._sustained(dtype)

    @property
    def integer_rate(self) -> float | None:
        """Operations per second of a large int8 matmul on a GPU or TPU, None if not known."""
        return None if self.is_host else self._sustained("int8")

    def _sustained(self, dtype: str) -> float | None:
        rate = self.model.rates.get(dtype) if self.model else None
        return rate.sustained if rate else None

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes per second between two devices."""
        return self.model.link_bytes_per_s if self.model else CPU_LINK_BYTES_PER_S


def named_devices(name: str, count: int | None) -> Devices:
    """Return devices of the table in `sharding.devices`, which need not be here.

    Args:
        count: None for the usual number in one machine.

    Raises:
        ConfigError: the table has no such device.
    """
    try:
        model = find_model(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    notes = (model.note,) if model.note else ()
    if count is None:
        notes = (f"Assumes {model.usual_count} devices; --num-workers N sets another number.",
                 *notes)  # fmt: skip
    return Devices(
        kind=model.kind,
        title=model.title,
        count=count or model.usual_count,
        is_here=False,
        memory_bytes=model.memory_bytes,
        host_bytes=None,
        model=model,
        notes=notes,
    )


def devices_here() -> Devices:
    """Return the devices that a run on this machine would use.

    If JAX_PLATFORMS is set, it decides the kind, as in a run.

    Raises:
        ConfigError: there is no device of that kind.
    """
    kind = named_by_jax(os.environ.get("JAX_PLATFORMS", ""))
    gpus = _gpus() if kind in ("", "gpu") else []
    chips = _tpu_chips() if kind in ("", "tpu") else 0
    host = memory_of_machine()
    if gpus:
        names = sorted({name for name, _ in gpus})
        memory = min(size for _, size in gpus)
        model = recognize(names[0], memory)
        notes = []
        if len(names) > 1:
            notes.append(f"The GPUs differ ({', '.join(names)}); all are counted as {names[0]}.")
        if model is None:
            notes.append(
                f"No rate is known for {names[0]}: --calibrate measures it. Known: "
                f"{', '.join(DEVICES)}."
            )
        return Devices(kind="gpu", title=names[0], count=len(gpus), is_here=True,
                       memory_bytes=memory, host_bytes=host, model=model,
                       notes=tuple(notes))  # fmt: skip
    if chips:
        reported = os.environ.get("TPU_ACCELERATOR_TYPE", "")
        model = recognize(reported) or DEVICES["v5e"]
        note = f"TPU_ACCELERATOR_TYPE is {reported or 'not set'}: counted as {model.title}."
        return Devices(kind="tpu", title=model.title, count=chips, is_here=True,
                       memory_bytes=model.memory_bytes, host_bytes=host, model=model,
                       notes=(note, *([model.note] if model.note else [])))  # fmt: skip
    if kind not in ("", "cpu"):
        raise ConfigError(
            f"No {kind} was found here; --device NAME plans for one elsewhere. "
            f"Received: JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"
        )
    cores = cores_here()
    name, features = _cpu()
    return Devices(
        kind="cpu",
        title=f"{len(cores)} CPU cores{f', {name}' if name else ''}",
        count=len(cores),
        is_here=True,
        memory_bytes=host,
        host_bytes=host,
        cores=cores,
        core_flops_per_s=_core_rate(),
        is_fast_in_16_bits=all(feature in features for feature in CPU_FEATURES),
    )


def memory_of_machine() -> float:
    """Return the bytes of this machine's memory, or of its control group's limit if it is less."""
    sizes = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                sizes.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return float(min(sizes))


def cores_here() -> tuple[int, ...]:
    """Return the CPU cores that this process may use, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def ask_nvidia_smi(fields: str) -> list[str]:
    """Return a line of comma-separated fields for each NVIDIA GPU; no lines if it fails."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _gpus() -> list[tuple[str, float]]:
    """Return name and memory in bytes of each NVIDIA GPU that CUDA_VISIBLE_DEVICES allows."""
    rows = [line.rsplit(",", 1) for line in ask_nvidia_smi("name,memory.total")]
    try:
        found = [(name.strip(), float(int(size) << 20)) for name, size in rows]
    except ValueError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    named = [number.strip() for number in visible.split(",") if number.strip()]
    if all(number.isdigit() for number in named):
        return [found[int(number)] for number in named if int(number) < len(found)]
    return found[: len(named)]  # named by UUID


def _tpu_chips() -> int:
    """Count TPU chips by their device files: /dev/accel0, or /dev/vfio/0 on newer machines."""
    accelerators = list(Path("/dev").glob("accel[0-9]*"))
    return len(accelerators or list(Path("/dev/vfio").glob("[0-9]*")))


def _cpu() -> tuple[str, set[str]]:
    """Return the name and the feature flags of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", set()
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    return values.get("model name", ""), set(values.get("flags", "").split())


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this machine's cores have instructions that multiply bfloat16."""
    _, features = _cpu()
    return not features.isdisjoint(MULTIPLY_BFLOAT16)


def _core_rate() -> float:
    """Measure the FLOP/s of a float32 matmul on one core: NumPy in a single-threaded process."""
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", MEASURE_RATE]
    done = subprocess.run(
        command, env=os.environ | threads, capture_output=True, text=True, timeout=60, check=True
    )
    return float(done.stdout)


def device_memory_bytes() -> int | None:
    """Return the memory of the smallest NVIDIA GPU here; None if there is none."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    found = _numbers_of_gpus("memory.total")
    return min(map(int, found)) << 20 if found else None


def _numbers_of_gpus(field: str) -> list[str]:
    """Return a number for each NVIDIA GPU, as text; none if one of them is not known."""
    numbers = [line.strip() for line in ask_nvidia_smi(field)]
    try:
        return numbers if all(float(number) >= 0 for number in numbers) else []
    except ValueError:
        return []


def gpu_dtype() -> str | None:
    """Return what --dtype auto means on the oldest NVIDIA GPU here; None if there is none."""
    capabilities = _numbers_of_gpus("compute_cap")
    if not capabilities:
        return None
    return auto_dtype("gpu", min(map(float, capabilities)))
