"""The name of an accelerator -> its memory and speed, from a table with sources.

The figures are for one device with one worker, and for dense matmuls without sparsity. `nominal` is
from the data sheet. `measured` is the rate of large matmuls that others measured; this project
measured none of these. Does not know models, nor which devices are here.
"""

import re
from dataclasses import dataclass
from typing import Any

TERA, GIGA = 1e12, 1e9

# The assumed share of its nominal rate that a device sustains, if no measurement is known. A100,
# H100 and H200 sustain 0.78 to 0.80.
SUSTAINED_SHARE = 0.78


@dataclass(frozen=True, slots=True)
class Rate:
    """Matmul FLOP/s in one dtype.

    measured: None if no measurement is known. share: of `nominal`, which is then assumed.
    """

    nominal: float
    measured: float | None = None
    share: float = SUSTAINED_SHARE

    @property
    def sustained(self) -> float:
        return self.measured if self.measured is not None else self.share * self.nominal


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """One kind of accelerator.

    rates: dtype -> Rate, for each dtype that it supports; int8 products are summed in 32 bits.
    link, link_bytes_per_s: the connection between two of them, and its speed in one direction.
    usual_count: the default number of them in a machine.
    pattern: a regex that matches the name that the driver reports.
    """

    name: str
    title: str
    kind: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    rates: dict[str, Rate]
    link: str
    link_bytes_per_s: float
    usual_count: int
    pattern: str
    sources: tuple[str, ...]
    note: str = ""

    @property
    def native_dtype(self) -> str:
        """The dtype that --dtype auto uses on it."""
        half = self.rates.get("float16")
        emulated = half is not None and self.rates["bfloat16"].sustained < half.sustained
        return "float16" if emulated else "bfloat16"


def _rates(
    *, half: Rate, single: float, int8: float, bfloat16: Rate | None = None
) -> dict[str, Rate]:
    return {
        "float32": Rate(single * TERA),
        "float16": half,
        "bfloat16": bfloat16 or half,
        # No measurement is known: int8 products share float16's limits of power and memory.
        "int8": Rate(int8 * TERA, share=half.sustained / half.nominal),
    }


def _tpu_rates(bfloat16: float, int8: float) -> dict[str, Rate]:
    # The matrix unit multiplies bfloat16. With highest precision, JAX computes a float32 product as
    # six bfloat16 ones.
    return {
        "float32": Rate(bfloat16 / 6 * TERA),
        "bfloat16": Rate(bfloat16 * TERA),
        "int8": Rate(int8 * TERA),
    }


# Common to NVIDIA's large cards.
_LARGE: dict[str, Any] = {
    "kind": "gpu",
    "link": "NVLink; without it divide by ten",
    "usual_count": 1,
}
_A100: dict[str, Any] = {
    **_LARGE,
    "rates": _rates(half=Rate(312 * TERA, 250 * TERA), single=19.5, int8=624),
    "link_bytes_per_s": 200 * GIGA,
    "sources": (
        "NVIDIA A100 data sheet: 312 TFLOP/s float16 and bfloat16, 19.5 float32, 624 TOPS int8",
        "250 TFLOP/s: large matmuls, measured by others",
    ),
}

DEVICES: dict[str, DeviceModel] = {
    device.name: device
    for device in (
        DeviceModel(
            name="t4",
            title="NVIDIA T4",
            kind="gpu",
            memory_bytes=16 * GIGA,
            bandwidth_bytes_per_s=320 * GIGA,
            rates=_rates(
                half=Rate(65 * TERA, 24 * TERA),
                single=8.1,
                int8=130,
                bfloat16=Rate(2.3 * TERA, 2.3 * TERA),
            ),
            link="PCIe 3",
            link_bytes_per_s=10 * GIGA,
            usual_count=2,
            pattern=r"\bT4\b",
            sources=(
                "NVIDIA T4 data sheet: 65 TFLOP/s float16, 8.1 float32, 130 TOPS int8, 16 GB",
                "42.7 TFLOP/s float16 in short bursts, about 24 sustained at its 70 W cap; "
                "bfloat16 is emulated: 2.3 (measured by others)",
            ),
        ),
        DeviceModel(
            name="l4",
            title="NVIDIA L4",
            kind="gpu",
            memory_bytes=24 * GIGA,
            bandwidth_bytes_per_s=300 * GIGA,
            rates=_rates(half=Rate(121 * TERA), single=30.3, int8=242),
            link="PCIe 4",
            link_bytes_per_s=20 * GIGA,
            usual_count=4,
            pattern=r"\bL4\b",
            sources=(
                "NVIDIA L4 data sheet, without sparsity: 121 TFLOP/s float16 and bfloat16, "
                "30.3 float32, 242 TOPS int8; no measurement known, and its 72 W cap may cost more",
            ),
        ),
        DeviceModel(
            name="a100",
            title="NVIDIA A100 40 GB",
            memory_bytes=40 * GIGA,
            bandwidth_bytes_per_s=1.555e12,
            pattern=r"\bA100\b.*40GB",
            **_A100,
        ),
        DeviceModel(
            name="a100-80gb",
            title="NVIDIA A100 80 GB",
            memory_bytes=80 * GIGA,
            bandwidth_bytes_per_s=2.039e12,
            pattern=r"\bA100\b",
            **_A100,
        ),
        DeviceModel(
            name="h100",
            title="NVIDIA H100",
            memory_bytes=80 * GIGA,
            bandwidth_bytes_per_s=3.35e12,
            rates=_rates(half=Rate(990 * TERA, 770 * TERA), single=67, int8=1979),
            link_bytes_per_s=300 * GIGA,
            pattern=r"\bH100\b",
            sources=(
                "NVIDIA H100 SXM data sheet, without sparsity: 990 TFLOP/s float16 and bfloat16, "
                "67 float32, 1,979 TOPS int8",
                "770 TFLOP/s: large matmuls, measured by others",
            ),
            **_LARGE,
        ),
        DeviceModel(
            name="h200",
            title="NVIDIA H200",
            memory_bytes=141 * GIGA,
            bandwidth_bytes_per_s=4.8e12,
            rates=_rates(half=Rate(990 * TERA, 790 * TERA), single=67, int8=1979),
            link_bytes_per_s=300 * GIGA,
            pattern=r"\bH200\b",
            sources=(
                "NVIDIA H200 data sheet: as H100, with 141 GB at 4.8 TB/s",
                "790 TFLOP/s bfloat16: large matmuls, measured by others",
            ),
            **_LARGE,
        ),
        DeviceModel(
            name="v5e",
            title="TPU v5e chip",
            kind="tpu",
            memory_bytes=16 * GIGA,
            bandwidth_bytes_per_s=819 * GIGA,
            rates=_tpu_rates(197, 394),
            link="inter-chip links",
            link_bytes_per_s=100 * GIGA,
            usual_count=8,
            pattern=r"v5 ?(e|lite)",
            sources=(
                "Google Cloud TPU v5e: 197 TFLOP/s bfloat16, 394 TOPS int8, 16 GB at 819 GB/s, "
                "1,600 Gbit/s of links a chip; no measurement known",
            ),
        ),
        DeviceModel(
            name="v6e",
            title="TPU v6e chip",
            kind="tpu",
            memory_bytes=32 * GIGA,
            bandwidth_bytes_per_s=1.64e12,
            rates=_tpu_rates(918, 1836),
            link="inter-chip links",
            link_bytes_per_s=220 * GIGA,
            usual_count=8,
            pattern=r"v6 ?(e|lite)",
            sources=(
                "Google Cloud TPU v6e: 918 TFLOP/s bfloat16, 1,836 TOPS int8, 32 GB at 1,640 GB/s, "
                "3,584 Gbit/s of links a chip; no measurement known",
            ),
        ),
        DeviceModel(
            name="v3-8",
            title="TPU v3 core",
            kind="tpu",
            memory_bytes=16 * GIGA,
            bandwidth_bytes_per_s=450 * GIGA,
            # Its matrix unit has no int8 and multiplies integers as bfloat16.
            rates=_tpu_rates(61.5, 61.5),
            link="inter-chip links",
            link_bytes_per_s=50 * GIGA,
            usual_count=8,
            pattern=r"\bv3\b",
            sources=(
                "Google Cloud TPU v3: 123 TFLOP/s bfloat16, 32 GB and 900 GB/s a chip of two "
                "cores; a v3-8 board has 8 cores, 420 TFLOP/s by its older data sheet; no "
                "measurement known",
            ),
            note="This assumes one worker per core. If Ray assigns whole chips of two cores, each "
            "worker uses only the first, and the run takes twice as long.",
        ),
    )
}
ALIASES = {
    "v5e-8": "v5e",
    "a100-40gb": "a100",
    "v3": "v3-8",
    "tpu-v5e": "v5e",
    "v6e-8": "v6e",
    "tpu-v6e": "v6e",
    "tpu-v3-8": "v3-8",
}


def find_model(name: str) -> DeviceModel:
    """Return the device that the user named.

    Raises:
        ValueError: the table has no device with that name.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in DEVICES:
        raise ValueError(f"Expected one of {', '.join(DEVICES)}. Received: --device {name}")
    return DEVICES[key]


def recognize(reported: str, memory_bytes: float | None = None) -> DeviceModel | None:
    """Return the device whose driver reports this name, None if it is not in the table."""
    for device in DEVICES.values():
        if re.search(device.pattern, reported, re.IGNORECASE):
            if device.name == "a100-80gb" and memory_bytes and memory_bytes < 60 * GIGA:
                return DEVICES["a100"]
            return device
    return None
