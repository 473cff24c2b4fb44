"""Rows, a model and devices -> each way to run: whether it fits, how long it should take, and how
that comes about in one line.

A way is a mode, a strategy, a dtype and a quantization. Does not know files, nor how a plan looks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from runner.common.errors import ConfigError
from runner.common.machine import Devices
from runner.common.units import (
    duration,
    flops_text,
    gb,
    parameters_text,
)
from runner.config.flags import flag
from runner.config.run_config import RunConfig
from runner.preset.auto import plan_run
from runner.preset.families import strategies
from runner.preset.reader import Preset
from sharding.batches import Plan
from sharding.dtypes import dtype_beside
from sharding.kinds import KINDS
from sharding.memory import (
    DRIVER_BYTES,
    ITEM_BYTES,
    SHARE_FOR_WEIGHTS,
    SHARE_IN_USE,
    Need,
    batch_budget,
    cut_layers,
    host_bytes,
    need,
    value_item_bytes,
    weight_item_bytes,
)
from sharding.strategies import auto_strategy, tensor_bytes_per_token
from sharding.times import (
    ONE_PROCESS_ON_A_CPU,
    START_S,
    Seconds,
    compile_seconds,
    load_seconds,
    predict_seconds,
)
from sharding.topology import place_workers

# In the order in which the first of equals is taken.
LAYOUTS: tuple[tuple[str, str | None], ...] = (
    ("data-parallel", None),
    ("model-parallel", "pipeline"),
    ("model-parallel", "tensor"),
    ("single", None),
)
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int8", "int4")
# A time limit and what goes on from before are a person's run's alone, not a calibrating one's.
FLAGS_OF_A_LONG_RUN = (
    *("time_limit", "on_deadline", "min_sequence_length", "fallback_probabilities"),
    *("resume", "journal"),
)
FLAGS_OF_A_RUN = (
    *("mode", "strategy", "group_size", "num_workers", "dtype", "quantization"),
    *("preset", "lora_weights", "head_kernel", "head_bias", "pooling", "sequence_length"),
    *("text_format", "max_tokens_per_batch", *FLAGS_OF_A_LONG_RUN, "input", "output", "report"),
)


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


def all_options(job: PlanInput) -> list[Option]:
    """Return every way to run.

    Raises:
        ConfigError: more workers than devices.
    """
    options = []
    for mode, strategy in LAYOUTS:
        for dtype in DTYPES:
            for quantization in job.quantizations:
                sizes = _group_sizes(job, mode)
                tried = (_option(job, mode, strategy, dtype, quantization, n) for n in sizes)
                options.append(_first_that_fits(tried))
    return options


def pipeline_over(job: PlanInput, members: int, dtype: str, quantization: str) -> Option:
    """Return a pipeline over so many devices as these, whatever their number is."""
    more = replace(job, devices=replace(job.devices, count=members))
    return _option(more, "model-parallel", "pipeline", dtype, quantization, members)


def _first_that_fits(tried: Iterator[Option]) -> Option:
    """The smallest group that fits; else the largest, which came nearest."""
    for option in tried:
        if option.fits:
            break
    return option


def _group_sizes(job: PlanInput, mode: str) -> Sequence[int]:
    if mode != "model-parallel":
        return (1,)
    if job.config.group_size is not None or job.devices.is_host:
        return (job.config.group_size or 2,)
    count = job.config.num_workers or job.devices.count
    sizes = [size for size in (2, 4, 8, 16, 32, 64) if size <= count and count % size == 0]
    return sizes or (2,)


def _option(
    job: PlanInput, mode: str, strategy: str | None, dtype: str, quantization: str, members: int
) -> Option:
    shape, devices = job.preset.shape, job.devices
    workers = _workers(job, mode, members)
    replicas = max(1, workers // members)
    option = Option(
        mode=mode,
        strategy=strategy,
        dtype=dtype,
        quantization=quantization,
        workers=workers,
        group_size=members,
        fits=False,
        why_not=None,
        memory_bytes=_memory_per_worker(devices, max(workers, 1)),
        arithmetic="",
    )
    if impossible := _impossible(job, mode, strategy, dtype, quantization, members):
        return replace(option, why_not=impossible, arithmetic=f"{impossible} - does not go")
    item_bytes = weight_item_bytes(dtype, quantization)
    whole = shape.weight_bytes(item_bytes)
    weights = (
        f"{parameters_text(shape.weight_bytes(1))} weights x {item_bytes:g} byte"
        f"{'' if item_bytes == 1 else 's'} = {gb(whole)}"
    )
    # A CPU's memory is the machine's: it has no device that a stage must stay within.
    limit = devices.memory_bytes if not devices.is_host else None
    share = 1 / members
    held = whole / members
    if strategy == "pipeline":
        try:
            stages = cut_layers(shape, members, item_bytes, limit)
        except ValueError:
            return replace(
                option,
                why_not=f"weights need {gb(whole)}, more than {members} x "
                f"{SHARE_FOR_WEIGHTS:g} x {gb(devices.memory_bytes)}",
                arithmetic=f"{weights} > {members} x {SHARE_FOR_WEIGHTS:g} x "
                f"{gb(devices.memory_bytes)} - does not fit",
            )
        held = max(stage.weight_bytes for stage in stages)
        share = max(stage.stop - stage.start for stage in stages) / shape.num_layers
        weights += f", {gb(held)} on the fullest of {members}"
    elif members > 1:
        weights += f", {gb(held)} on each of {members}"
    if limit is not None and held > limit:
        return replace(
            option,
            need=Need(held, 0.0, 0.0),
            why_not=f"weights need {gb(held)}, a device has {gb(limit)}",
            arithmetic=f"{weights} > {gb(limit)} - does not fit",
        )

    value_bytes = value_item_bytes(dtype, quantization)
    budget = job.config.max_tokens_per_batch or KINDS[devices.kind].tokens_per_batch
    if job.config.max_tokens_per_batch is None and KINDS[devices.kind].fits_batches:
        budget = batch_budget(
            shape,
            memory_bytes=devices.memory_bytes,
            held_bytes=held,
            value_bytes=value_bytes,
            sequence_length=job.config.sequence_length,
            most=budget,
        )
    plan = job.plan(budget=budget, replicas=replicas)
    quantizes = quantization != "none" and job.preset.quantization is None
    largest = max(shape.vocabulary_size, shape.intermediate_dim) * shape.hidden_dim
    needs = max(
        (
            need(
                shape,
                held_bytes=held,
                tokens=batch.tokens,
                length=batch.length,
                value_bytes=value_bytes,
                loading_bytes=largest * ITEM_BYTES[dtype] if quantizes else 0.0,
            )
            for batch in plan.shapes
        ),
        key=lambda one: one.total_bytes,
        default=Need(held, 0.0, 0.0),
    )
    host = host_bytes(
        shape,
        kind=devices.kind,
        workers=workers,
        members=members,
        strategy=strategy,
        item_bytes=ITEM_BYTES[dtype],
        device_bytes=needs.total_bytes * workers,
    )
    batch_tokens = max((batch.tokens for batch in plan.shapes), default=0)
    memory = (
        f"{weights} + {gb(needs.total_bytes - held)} for batches of {batch_tokens:,} tokens "
        f"= {gb(needs.total_bytes)}"
    )
    option = replace(option, budget=budget, need=needs, host_bytes=host, plan=plan)
    if limit is not None:
        room = limit * SHARE_IN_USE
        if needs.total_bytes > room:
            return replace(
                option,
                why_not=f"needs {gb(needs.total_bytes)}, {gb(room)} of {gb(limit)} can be used",
                arithmetic=f"{memory} > {SHARE_IN_USE:g} x {gb(limit)} - does not fit",
            )
        memory += f" of {SHARE_IN_USE:g} x {gb(limit)}"
    if devices.host_bytes is not None and host > devices.host_bytes:
        return replace(
            option,
            why_not=f"needs {gb(host)} of host memory, {gb(devices.host_bytes)} are here",
            arithmetic=f"{memory} a worker, {gb(host)} with all libraries and loading > "
            f"{gb(devices.host_bytes)} of this machine - does not fit",
        )
    if limit is None:
        memory += f" a worker, {gb(host)} in all of {gb(devices.memory_bytes)}"
    seconds, range_s, how = _time(
        job,
        (mode, strategy, dtype, quantization),
        plan,
        workers=workers,
        members=members,
        share=share,
        quantizes=quantizes,
    )
    return replace(
        option, fits=True, seconds=seconds, range_s=range_s, arithmetic=f"{memory}; {how}"
    )


def _workers(job: PlanInput, mode: str, members: int) -> int:
    """Return how many workers there would be; 0 where no whole group can be made.

    Raises:
        ConfigError: more workers than devices.
    """
    devices, wanted = job.devices, job.config.num_workers
    if mode == "single":
        return 1
    if not devices.is_host and devices.count < members:
        return 0
    if wanted is not None:
        # Other modes than the asked one take as many of its workers as make whole groups.
        wanted = wanted // members * members or members
    try:
        slots = place_workers(
            kind=devices.kind,
            num_devices=devices.count,
            num_workers=wanted,
            cores=devices.cores,
            group_size=members,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return len(slots)


def _memory_per_worker(devices: Devices, workers: int) -> float:
    if not devices.is_host:
        return devices.memory_bytes
    return max(
        0.0, (devices.memory_bytes - DRIVER_BYTES) / workers - KINDS[devices.kind].imported_bytes
    )


def _impossible(
    job: PlanInput, mode: str, strategy: str | None, dtype: str, quantization: str, members: int
) -> str | None:
    """Return why a way does not exist, whatever the memory."""
    shape, devices = job.preset.shape, job.devices
    if mode == "model-parallel":
        if strategy not in strategies(job.preset.class_name):
            return f"{job.preset.class_name} is not held by several workers in this way"
        if not devices.is_host and devices.count < members:
            return f"needs {members} devices, there is {devices.count}"
        if strategy == "pipeline" and members > shape.num_layers:
            return f"{shape.num_layers} layers cannot be cut into {members} stages"
    if strategy == "tensor":
        if quantization != "none":
            return "a scale that belongs to a whole kernel is not cut into slices"
        split = (shape.num_query_heads, shape.intermediate_dim, shape.vocabulary_size)
        if any(size % members for size in split):
            return (
                f"{split[0]} query heads, {split[1]:,} feed-forward columns and {split[2]:,} "
                f"embeddings do not all divide by {members}"
            )
    if dtype_beside(quantization, dtype) != dtype:
        return f"{quantization} layers do not compute in {dtype}"
    if devices.model is not None and dtype not in devices.model.rates:
        return f"{devices.title} does not multiply {dtype}"
    return None


def _time(
    job: PlanInput,
    way: tuple[str, str | None, str, str],
    plan: Plan,
    *,
    workers: int,
    members: int,
    share: float,
    quantizes: bool,
) -> tuple[Seconds | None, tuple[float, float] | None, str]:
    """Return the seconds, the range they may lie in, and how they come about."""
    mode, strategy, dtype, quantization = way
    shape, devices, measured = job.preset.shape, job.devices, job.measured
    replicas = workers // members
    peak = job.peak(mode, dtype, quantization, workers)
    expected, low, high = KINDS[devices.kind].efficiency
    rates = None
    if measured is not None and measured.way == way:
        rates = (measured.flops_per_s,) * 3
        rate_text = f"{flops_text(measured.flops_per_s)}/s measured here"
    elif peak is not None:
        if measured is not None and measured.efficiency is not None:
            expected, low, high = (measured.efficiency * part for part in (1.0, 0.8, 1.2))
        rates = (peak * expected, peak * low, peak * high)
        rate_text = f"{flops_text(peak)}/s x {expected:.2g}"
    if rates is None:
        return (
            None,
            None,
            f"how fast {dtype}{_and(quantization)} is on {devices.title} is not known",
        )
    flops = float(sum(shape.batch_flops(batch.shape) for batch in plan.batches))
    item_bytes = ITEM_BYTES[dtype]
    traffic = 0.0
    if strategy == "tensor":
        traffic = tensor_bytes_per_token(shape, members, item_bytes)
    elif strategy == "pipeline":
        traffic = shape.hidden_dim * item_bytes

    def predict(rate: float) -> float:
        return predict_seconds(
            flops=flops,
            padded_tokens=plan.padded_tokens,
            batches=len(plan.batches),
            rate=rate,
            replicas=replicas,
            members=members,
            strategy=strategy,
            slowest_share=share,
            bytes_per_token=traffic,
            link_bytes_per_s=devices.link_bytes_per_s,
        )

    start = START_S["single" if mode == "single" else "ray"]
    load = load_seconds(
        shape,
        kind=devices.kind,
        file_bytes=job.file_bytes,
        members=members,
        strategy=strategy,
        quantizes=quantizes,
    )
    compiling = compile_seconds(
        shape,
        kind=devices.kind,
        shapes=len(plan.shapes),
        replicas=replicas,
        members=members,
        strategy=strategy,
    )
    if measured is not None:
        start, load, compiling = (part * measured.slowness for part in (start, load, compiling))
    before = f"load {duration(load)}{' with quantizing' if quantizes else ''}, compile " + duration(
        compiling
    )
    if measured is not None and measured.way == way:
        start, load = measured.before_predict_s, 0.0
        others = (len(plan.shapes) - 1) / replicas if devices.is_host else 0.0
        compiling = measured.compile_s * others
        before = f"start, load and first compile {duration(start)} as measured"
        if compiling:
            before += f", other compiles {duration(compiling)}"

    def seconds(rate: float) -> Seconds:
        return Seconds(
            read=job.read_s,
            tokenize=max(0.0, job.tokenize_s - start - load),
            start=start,
            load=load,
            compile=compiling,
            predict=predict(rate),
        )

    middle, slow, fast = (seconds(rate) for rate in rates)
    link = ""
    if strategy == "tensor":
        exchange = plan.padded_tokens / replicas * traffic / devices.link_bytes_per_s
        link = (
            f", of it {duration(exchange)} exchanging {traffic / 1e3:,.4g} kB a token at "
            f"{devices.link_bytes_per_s / 1e9:g} GB/s"
        )
    elif strategy == "pipeline":
        ideal = flops / workers / rates[0]
        link = f", {max(0.0, middle.predict / ideal - 1):.1%} of it stages that wait"
    how = (
        f"{flops_text(flops)} of padded tokens / ({_times(workers)}{rate_text}) = "
        f"{duration(middle.predict)}{link}; {before}"
    )
    return middle, (fast.total, slow.total), how


def command_flags(config: RunConfig, **changes: object) -> list[str]:
    """Return the flags that make a config's run, with changes: None leaves a flag out."""
    plain = RunConfig()
    flags: list[str] = []
    for name in FLAGS_OF_A_RUN:
        value = changes[name] if name in changes else getattr(config, name)
        if value is None or (name != "mode" and value == getattr(plain, name)):
            continue
        if isinstance(value, tuple):
            value = ",".join(f"{part:g}" for part in value)
        flags += [flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    return flags


def _times(workers: int) -> str:
    return f"{workers} x " if workers > 1 else ""


def _and(quantization: str) -> str:
    return f" with {quantization}" if quantization != "none" else ""
