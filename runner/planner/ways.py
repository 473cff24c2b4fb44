"""Rows, a model and devices -> each way to run: if it fits, how long it takes, and the arithmetic.

A way is a mode, a strategy, a dtype and a quantization. Does not know files, nor how a plan is
shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from runner.common.errors import ConfigError
from runner.common.units import duration, flops_text, gb, parameters_text
from runner.planner.records import Option, PlanInput
from runner.preset.families import strategies
from sharding.batches import Plan
from sharding.costs import ModelShape
from sharding.dtypes import dtype_beside
from sharding.fit import (
    DEVICE,
    HOST,
    STAGE,
    WEIGHTS,
    Before,
    Fit,
    Room,
    Way,
    bytes_per_token,
    fit,
    forecast,
    plan_flops,
)
from sharding.kinds import KINDS
from sharding.memory import SHARE_FOR_WEIGHTS, SHARE_IN_USE
from sharding.times import START_S, Seconds, compile_seconds, load_seconds
from sharding.topology import place_workers

# In order of preference among equally quick ones.
LAYOUTS: tuple[tuple[str, str | None], ...] = (
    ("data-parallel", None),
    ("model-parallel", "pipeline"),
    ("model-parallel", "tensor"),
    ("single", None),
)
DTYPES = ("float32", "float16", "bfloat16")


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
    """Return a pipeline over `members` of these devices, even if there are fewer."""
    more = replace(job, devices=replace(job.devices, count=members))
    return _option(more, "model-parallel", "pipeline", dtype, quantization, members)


def _first_that_fits(tried: Iterator[Option]) -> Option:
    """Return the first option that fits, that of the smallest group; else the last."""
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
    devices = job.devices
    room = Room(kind=devices.kind, memory_bytes=devices.memory_bytes, host_bytes=devices.host_bytes)
    way = Way(
        strategy=strategy,
        dtype=dtype,
        quantization=quantization,
        workers=_workers(job, mode, members),
        members=members,
        quantizes=quantization != "none" and job.preset.quantization is None,
    )
    option = Option(
        mode=mode,
        strategy=strategy,
        dtype=dtype,
        quantization=quantization,
        workers=way.workers,
        group_size=members,
        fits=False,
        why_not=None,
        memory_bytes=room.per_worker_bytes(max(way.workers, 1)),
        arithmetic="",
    )
    if impossible := _impossible(job, mode, strategy, dtype, quantization, members):
        return replace(option, why_not=impossible, arithmetic=f"{impossible} - not possible")
    found = fit(
        job.preset.shape,
        room,
        way,
        sequence_length=job.config.sequence_length,
        asked_budget=job.config.max_tokens_per_batch,
        plan=lambda budget: job.plan(budget=budget, replicas=way.replicas),
    )
    option = replace(
        option,
        budget=found.budget,
        need=found.need,
        host_bytes=found.host_bytes,
        plan=found.plan,
    )
    why_not, memory = _memory_text(job.preset.shape, room, way, found)
    if why_not is not None:
        return replace(option, why_not=why_not, arithmetic=f"{memory} - does not fit")
    seconds, range_s, how = _time(job, mode, way, found)
    return replace(
        option, fits=True, seconds=seconds, range_s=range_s, arithmetic=f"{memory}; {how}"
    )


def _memory_text(shape: ModelShape, room: Room, way: Way, found: Fit) -> tuple[str | None, str]:
    """Return why a way does not fit, None if it does, and how its memory was computed."""
    held, limit, members = found.held_bytes, room.limit_bytes, way.members
    weights = (
        f"{parameters_text(shape.weight_bytes(1))} weights x {found.item_bytes:g} byte"
        f"{'' if found.item_bytes == 1 else 's'} = {gb(found.whole_bytes)}"
    )
    if found.exceeds == STAGE:
        most = f"{members} x {SHARE_FOR_WEIGHTS:g} x {gb(room.memory_bytes)}"
        why_not = f"weights need {gb(found.whole_bytes)}, more than {most}"
        return why_not, f"{weights} > {most}"
    if way.strategy == "pipeline":
        weights += f", {gb(held)} on the fullest of {members}"
    elif members > 1:
        weights += f", {gb(held)} on each of {members}"
    if found.exceeds == WEIGHTS:
        assert limit is not None, "this is a bug: nothing exceeds no limit"
        return (
            f"weights need {gb(held)}, a device has {gb(limit)}",
            f"{weights} > {gb(limit)}",
        )
    assert found.plan is not None, "this is a bug: weights that fit have a plan"
    assert found.need is not None, "this is a bug: weights that fit have a need"
    assert found.host_bytes is not None, "this is a bug: weights that fit have a host"
    total, host = found.need.total_bytes, found.host_bytes
    batch_tokens = max((batch.tokens for batch in found.plan.shapes), default=0)
    memory = f"{weights} + {gb(total - held)} for batches of {batch_tokens:,} tokens = {gb(total)}"
    if limit is not None:
        if found.exceeds == DEVICE:
            usable = gb(limit * SHARE_IN_USE)
            return (
                f"needs {gb(total)}, {usable} of {gb(limit)} can be used",
                f"{memory} > {SHARE_IN_USE:g} x {gb(limit)}",
            )
        memory += f" of {SHARE_IN_USE:g} x {gb(limit)}"
    if found.exceeds == HOST:
        assert room.host_bytes is not None, "this is a bug: nothing exceeds no limit"
        return (
            f"needs {gb(host)} of host memory, {gb(room.host_bytes)} are here",
            f"{memory} a worker, {gb(host)} with all libraries and loading > "
            f"{gb(room.host_bytes)} of this machine",
        )
    if limit is None:
        memory += f" a worker, {gb(host)} in all of {gb(room.memory_bytes)}"
    return None, memory


def _workers(job: PlanInput, mode: str, members: int) -> int:
    """Return the number of workers; 0 if there are too few devices for a group.

    Raises:
        ConfigError: more workers than devices.
    """
    devices, wanted = job.devices, job.config.num_workers
    if mode == "single":
        return 1
    if not devices.is_host and devices.count < members:
        return 0
    if wanted is not None:
        # In other modes than the asked one, as many of its workers as make whole groups.
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


def _impossible(
    job: PlanInput, mode: str, strategy: str | None, dtype: str, quantization: str, members: int
) -> str | None:
    """Return why a way does not exist with any memory, None if it does."""
    shape, devices = job.preset.shape, job.devices
    if mode == "model-parallel":
        if strategy not in strategies(job.preset.class_name):
            return f"{job.preset.class_name} cannot be divided in this way"
        if not devices.is_host and devices.count < members:
            return f"needs {members} devices, there is {devices.count}"
        if strategy == "pipeline" and members > shape.num_layers:
            return f"{shape.num_layers} layers cannot be cut into {members} stages"
    if strategy == "tensor":
        if quantization != "none":
            return "a scale that belongs to a whole kernel cannot be cut into slices"
        split = (shape.num_query_heads, shape.intermediate_dim, shape.vocabulary_size)
        if any(size % members for size in split):
            return (
                f"{split[0]} query heads, {split[1]:,} feed-forward columns and {split[2]:,} "
                f"embeddings are not all divisible by {members}"
            )
    if dtype_beside(quantization, dtype) != dtype:
        return f"{quantization} layers do not compute in {dtype}"
    if devices.model is not None and dtype not in devices.model.rates:
        return f"{devices.title} does not multiply {dtype}"
    return None


def _time(
    job: PlanInput, mode: str, way: Way, found: Fit
) -> tuple[Seconds | None, tuple[float, float] | None, str]:
    """Return the seconds by stage, the range of their total, and how they were computed."""
    assert found.plan is not None, "this is a bug: what fits has a plan"
    shape, devices, plan = job.preset.shape, job.devices, found.plan
    rates, rate_text = _rates(job, mode, way)
    if rates is None:
        return None, None, rate_text
    before, before_text = _before(job, mode, way, plan)
    middle, slow, fast = (
        forecast(
            shape,
            plan,
            way,
            before,
            rate=rate,
            share=found.share,
            link_bytes_per_s=devices.link_bytes_per_s,
        )
        for rate in rates
    )
    flops, traffic = plan_flops(shape, plan), bytes_per_token(shape, way)
    link = ""
    if way.strategy == "tensor":
        exchange = plan.padded_tokens / way.replicas * traffic / devices.link_bytes_per_s
        link = (
            f", of it {duration(exchange)} exchanging {traffic / 1e3:,.4g} kB a token at "
            f"{devices.link_bytes_per_s / 1e9:g} GB/s"
        )
    elif way.strategy == "pipeline":
        ideal = flops / way.workers / rates[0]
        link = f", {max(0.0, middle.predict / ideal - 1):.1%} of it waiting for other stages"
    workers = f"{way.workers} x " if way.workers > 1 else ""
    how = (
        f"{flops_text(flops)} of padded tokens / ({workers}{rate_text}) = "
        f"{duration(middle.predict)}{link}; {before_text}"
    )
    return middle, (fast.total, slow.total), how


def _rates(job: PlanInput, mode: str, way: Way) -> tuple[tuple[float, float, float] | None, str]:
    """Return the FLOP/s of a worker on the model, expected, least and most, and how they were
    computed; or None, and why they are not known."""
    measured, dtype, quantization = job.measured, way.dtype, way.quantization
    if measured is not None and measured.way == (mode, way.strategy, dtype, quantization):
        rate = measured.flops_per_s
        return (rate, rate, rate), f"{flops_text(rate)}/s measured here"
    peak = job.peak(mode, dtype, quantization, way.workers)
    if peak is None:
        form = dtype if quantization == "none" else f"{dtype} with {quantization}"
        return None, f"how fast {form} is on {job.devices.title} is not known"
    expected, low, high = KINDS[job.devices.kind].efficiency
    if measured is not None and measured.efficiency is not None:
        expected, low, high = (measured.efficiency * part for part in (1.0, 0.8, 1.2))
    return (peak * expected, peak * low, peak * high), f"{flops_text(peak)}/s x {expected:.2g}"


def _before(job: PlanInput, mode: str, way: Way, plan: Plan) -> tuple[Before, str]:
    """Return the seconds before the batches, and how they were computed."""
    shape, kind, measured = job.preset.shape, job.devices.kind, job.measured
    start = START_S["single" if mode == "single" else "ray"]
    load = load_seconds(
        shape,
        kind=kind,
        file_bytes=job.file_bytes,
        members=way.members,
        strategy=way.strategy,
        quantizes=way.quantizes,
    )
    compiling = compile_seconds(
        shape,
        kind=kind,
        shapes=len(plan.shapes),
        replicas=way.workers // way.members,
        members=way.members,
        strategy=way.strategy,
    )
    if measured is not None:
        start, load, compiling = (part * measured.slowness for part in (start, load, compiling))
    quantizing = " with quantizing" if way.quantizes else ""
    text = f"load {duration(load)}{quantizing}, compile {duration(compiling)}"
    asked = (mode, way.strategy, way.dtype, way.quantization)
    if measured is not None and measured.way == asked:
        start, load = measured.before_predict_s, 0.0
        replicas = way.workers // way.members
        others = (len(plan.shapes) - 1) / replicas if job.devices.is_host else 0.0
        compiling = measured.compile_s * others
        text = f"start, load and first compile {duration(start)} as measured"
        if compiling:
            text += f", other compiles {duration(compiling)}"
    before = Before(
        read=job.read_s, tokenize=job.tokenize_s, start=start, load=load, compile=compiling
    )
    return before, text
