"""The records of a plan: its input, the ways to run, and what a calibration measured.

Does not know how a way is judged, which is in `ways.py`.
"""

from dataclasses import dataclass, field

import numpy as np

from runner.common.machine import Devices
from runner.config.run_config import RunConfig
from runner.preset.auto import plan_run
from runner.preset.families import strategies
from runner.preset.reader import Preset
from sharding.batches import Plan
from sharding.fit import Way
from sharding.memory import Need
from sharding.strategies import auto_strategy
from sharding.times import ONE_PROCESS_ON_A_CPU, Seconds

QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The results of a calibration.

    way: what was run. flops_per_s: of a worker on the model. efficiency: flops_per_s over
    `PlanInput.peak`, None if the peak is not known. before_predict_s: a run's time without reading,
    tokenizing and predicting. slowness: before_predict_s over its forecast. compile_s: the time
    that another shape adds on one worker. seconds: how long the calibration took.
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
    """A run to plan, and the devices for it.

    lengths: (rows,) token counts, truncated to the sequence length. read_s, tokenize_s: measured.
    file_bytes: of the weights. plans: those made so far, by budget and replicas.
    """

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
        """The preset's own quantization; for float weights, all of them."""
        return (self.preset.quantization,) if self.preset.quantization else QUANTIZATIONS

    @property
    def dtype(self) -> str:
        """The dtype to compute in."""
        wanted: str = self.config.dtype
        return self.devices.native_dtype if wanted == "auto" else wanted

    @property
    def asked(self) -> tuple[str, str | None, str, str]:
        """The requested way."""
        strategy = self.config.strategy
        if self.config.mode == "model-parallel" and strategy in (None, "auto"):
            known = strategies(self.preset.class_name)
            strategy = auto_strategy(known, self.config.members, self.preset.shape.num_layers)
        quantization = self.preset.quantization or self.config.quantization
        return self.config.mode, strategy, self.dtype, quantization

    def peak(self, way: "Way | Option") -> float | None:
        """Return the FLOP/s of large matmuls on one worker, None if not known."""
        rate = self.devices.rate(way.dtype, way.quantization)
        if rate is None or not self.devices.is_host:
            return rate
        cores = len(self.devices.cores) / way.workers
        return rate * cores * (ONE_PROCESS_ON_A_CPU if way.mode == "single" and cores > 1 else 1.0)

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
    """One way to run.

    why_not: the reason if it does not fit. memory_bytes, need: of the fullest device. host_bytes:
    memory that the machine needs. budget: the most padded tokens of a batch. range_s: the shortest
    and the longest likely time. arithmetic: how memory and time were computed, in a line.
    """

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
        """Mode, strategy, dtype and quantization."""
        return self.mode, self.strategy, self.dtype, self.quantization

    @property
    def replicas(self) -> int:
        return max(1, self.workers // self.group_size)

    @property
    def total_s(self) -> float | None:
        """How long the run should take, None if not known."""
        return self.seconds.total if self.seconds else None
