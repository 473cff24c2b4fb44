"""What a plan is made of: its input, each way to run, and what a few batches have shown.

Nouns alone; `ways.py` makes an option of an input.
"""

from dataclasses import dataclass, field

import numpy as np

from runner.common.machine import Devices
from runner.config.run_config import RunConfig
from runner.preset.auto import plan_run
from runner.preset.families import strategies
from runner.preset.reader import Preset
from sharding.batches import Plan
from sharding.dtypes import dtype_beside
from sharding.memory import Need
from sharding.strategies import auto_strategy
from sharding.times import ONE_PROCESS_ON_A_CPU, Seconds

QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a few batches showed, for `PlanInput.measured`.

    efficiency: FLOP/s of a worker on the model over `Devices.rate`; or flops_per_s itself, where
    that rate is not known. before_predict_s: all of a run but reading, tokenizing and predicting.
    slowness: that over its forecast. compile_s: what a further shape adds on one worker.
    """

    way: tuple[str, str | None, str, str]
    flops_per_s: float
    efficiency: float | None
    before_predict_s: float
    slowness: float
    compile_s: float
    batches: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInput:
    """What is to be done, and on what. lengths: (rows,), cut at the sequence length."""

    config: RunConfig
    preset: Preset
    devices: Devices
    lengths: np.ndarray
    read_s: float
    tokenize_s: float
    file_bytes: float
    measured: Measured | None = None
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict)

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The preset's own, or all that can be made of float weights."""
        return (self.preset.quantization,) if self.preset.quantization else QUANTIZATIONS

    def dtype(self, quantization: str) -> str:
        """Return the dtype to compute in beside such weights."""
        if self.config.dtype != "auto":
            return self.config.dtype
        return dtype_beside(quantization, self.devices.native_dtype)

    @property
    def asked(self) -> tuple[str, str | None, str, str]:
        """The way that the config names."""
        strategy = self.config.strategy
        if self.config.mode == "model-parallel" and strategy in (None, "auto"):
            known = strategies(self.preset.class_name)
            strategy = auto_strategy(known, self.config.members, self.preset.shape.num_layers)
        quantization = self.preset.quantization or self.config.quantization
        return self.config.mode, strategy, self.dtype(quantization), quantization

    def peak(self, mode: str, dtype: str, quantization: str, workers: int) -> float | None:
        """Return the FLOP/s of large matmuls in one of so many workers, None where not known."""
        rate = self.devices.rate(dtype, quantization)
        if rate is None or not self.devices.is_host:
            return rate
        cores = len(self.devices.cores) / workers
        return rate * cores * (ONE_PROCESS_ON_A_CPU if mode == "single" and cores > 1 else 1.0)

    def plan(self, *, budget: int, replicas: int) -> Plan:
        """Return the batches under a budget, as the run itself would make them."""
        key = (budget, replicas)
        if key not in self.plans:
            self.plans[key] = plan_run(
                self.lengths,
                self.config,
                self.preset,
                kind=self.devices.kind,
                replicas=replicas,
                budget=budget,
            )
        return self.plans[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run. `memory_bytes` and `need` are of the fullest device, `budget` is the most
    padded tokens of a batch."""

    mode: str
    strategy: str | None
    dtype: str
    quantization: str
    workers: int
    group_size: int
    fits: bool
    why_not: str | None
    memory_bytes: float
    arithmetic: str
    budget: int = 0
    need: Need | None = None
    host_bytes: float | None = None
    plan: Plan | None = None
    seconds: Seconds | None = None
    range_s: tuple[float, float] | None = None

    @property
    def way(self) -> tuple[str, str | None, str, str]:
        return self.mode, self.strategy, self.dtype, self.quantization

    @property
    def total_s(self) -> float | None:
        return self.seconds.total if self.seconds else None
