"""Rows, a model and devices -> each way to run: whether it fits, how long it takes, and why.

A way is a mode, a strategy, a dtype and a quantization. Does not know files, or how a plan is
shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from runner.common.errors import ConfigError
from runner.common.units import duration, flops_text, gb, kb, parameters_text
from runner.config.flags import DEFAULT_GROUP_SIZE
from runner.planner.records import Option, PlanInput
from runner.preset.families import strategies
from sharding.batches import Plan
from sharding.costs import ModelShape
from sharding.fit import (
    DEVICE,
    HOST,
    STAGE,
    WEIGHTS,
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

# In order of preference among equally fast ones.
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
                ways = (
                    _way(job, (mode, strategy, dtype, quantization), members)
                    for members in _group_sizes(job, mode)
                )
                options.append(_first_that_fits(_option(job, way) for way in ways))
    return options


def pipeline_over(job: PlanInput, members: int, dtype: str, quantization: str) -> Option:
    """Return a pipeline over `members` of these devices, even if there are fewer."""
    more = replace(job, devices=replace(job.devices, count=members))
    way = _way(more, ("model-parallel", "pipeline", dtype, quantization), members)
    return _option(more, way)


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
        return (job.config.group_size or DEFAULT_GROUP_SIZE,)
    count = job.config.num_workers or job.devices.count
    sizes = [size for size in (2, 4, 8, 16, 32, 64) if size <= count and count % size == 0]
    return sizes or (2,)


def _way(job: PlanInput, name: tuple[str, str | None, str, str], members: int) -> Way:
    mode, strategy, dtype, quantization = name
    return Way(
        mode=mode,
        strategy=strategy,
        dtype=dtype,
        quantization=quantization,
        workers=_workers(job, mode, members),
        members=members,
        quantizes=quantization != "none" and job.preset.quantization is None,
    )


def _option(job: PlanInput, way: Way) -> Option:
    devices, shape = job.devices, job.preset.shape
    room = Room(kind=devices.kind, memory_bytes=devices.memory_bytes, host_bytes=devices.host_bytes)
    option = Option(
        mode=way.mode,
        strategy=way.strategy,
        dtype=way.dtype,
        quantization=way.quantization,
        workers=way.workers,
        group_size=way.members,
        fits=False,
        why_not=None,
        memory_bytes=room.per_worker_bytes(max(way.workers, 1)),
        arithmetic="",
    )
    if impossible := _not_dividable(job, way) or _not_computable(job, way):
        return replace(option, why_not=impossible, arithmetic=f"{impossible} - not possible")
    found = fit(
        shape,
        room,
        way,
        sequence_length=job.config.sequence_length,
        asked_budget=job.config.max_tokens_per_batch,
        plan=lambda budget: job.plan(budget=budget, replicas=way.replicas),
    )
    option = replace(
        option, budget=found.budget, need=found.need, host_bytes=found.host_bytes, plan=found.plan
    )
    why_not, memory = _memory_text(shape, room, way, found)
    if why_not is not None:
        return replace(option, why_not=why_not, arithmetic=f"{memory} - does not fit")
    seconds, range_s, how = _time(job, way, found)
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
                f"needs {gb(total)}, only {usable} of {gb(limit)} can be used",
                f"{memory} > {SHARE_IN_USE:g} x {gb(limit)}",
            )
        memory += f" of {SHARE_IN_USE:g} x {gb(limit)}"
    if found.exceeds == HOST:
        assert room.host_bytes is not None, "this is a bug: nothing exceeds no limit"
        return (
            f"needs {gb(host)} of host memory, this machine has {gb(room.host_bytes)}",
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
        # In modes other than the requested one, as many workers as form whole groups.
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


def _not_dividable(job: PlanInput, way: Way) -> str | None:
    """Return why a group cannot hold a replica in this way, however much memory it has."""
    shape, devices, members = job.preset.shape, job.devices, way.members
    if way.mode != "model-parallel":
        return None
    if way.strategy not in strategies(job.preset.class_name):
        return f"{job.preset.class_name} cannot be divided in this way"
    if not devices.is_host and devices.count < members:
        there = "there is" if devices.count == 1 else "there are"
        return f"needs {members} devices, {there} {devices.count}"
    if way.strategy == "pipeline":
        too_many = f"{shape.num_layers} layers cannot be cut into {members} stages"
        return too_many if members > shape.num_layers else None
    return _not_sliceable(shape, way)


def _not_sliceable(shape: ModelShape, way: Way) -> str | None:
    """Return why weights cannot be sliced over the members of a tensor group."""
    members = way.members
    if way.quantization != "none":
        return "a scale that belongs to a whole kernel cannot be cut into slices"
    split = (shape.num_query_heads, shape.intermediate_dim, shape.vocabulary_size)
    if any(size % members for size in split):
        return (
            f"{split[0]} query heads, {split[1]:,} feed-forward columns and {split[2]:,} "
            f"embeddings are not all divisible by {members}"
        )
    return None


def _not_computable(job: PlanInput, way: Way) -> str | None:
    """Return why these devices cannot compute in this dtype."""
    devices = job.devices
    if devices.model is not None and way.dtype not in devices.model.rates:
        return f"{devices.title} does not multiply {way.dtype}"
    return None


def _time(
    job: PlanInput, way: Way, found: Fit
) -> tuple[Seconds | None, tuple[float, float] | None, str]:
    """Return the seconds by stage, the range of their total, and how they were computed."""
    assert found.plan is not None, "this is a bug: what fits has a plan"
    shape, devices, plan = job.preset.shape, job.devices, found.plan
    rates, rate_text = _rates(job, way, plan)
    if rates is None:
        return None, None, rate_text
    before, before_text = _before(job, way, plan)
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
    link = ""
    if way.strategy == "tensor":
        traffic = bytes_per_token(shape, way)
        exchange = plan.padded_tokens / way.replicas * traffic / devices.link_bytes_per_s
        link = (
            f", of it {duration(exchange)} exchanging {kb(traffic)} a token at "
            f"{gb(devices.link_bytes_per_s)}/s"
        )
    flops = plan_flops(shape, plan)
    if way.strategy == "pipeline":
        ideal = flops / way.workers / rates[0]
        link = f", {max(0.0, middle.predict / ideal - 1):.1%} of it waiting for other stages"
    workers = f"{way.workers} x " if way.workers > 1 else ""
    how = (
        f"{flops_text(flops)} of padded tokens / ({workers}{rate_text}) = "
        f"{duration(middle.predict)}{link}; {before_text}"
    )
    return middle, (fast.total, slow.total), how


def _rates(job: PlanInput, way: Way, plan: Plan) -> tuple[tuple[float, float, float] | None, str]:
    """Return the FLOP/s of a worker on the model (expected, least, most) and how they were
    computed; or None, and why they are not known.

    Nobody has measured the integer rate of these GPUs and TPUs. So the least is that of float
    products.
    """
    measured = job.measured
    if measured is not None and measured.way == way.name:
        rate = measured.flops_per_s
        return (rate, rate, rate), f"{flops_text(rate)}/s measured here"
    peak = job.peak(way)
    if peak is None:
        with_ = "" if way.quantization == "none" else f" with {way.quantization}"
        return None, f"the speed of {way.dtype}{with_} on {job.devices.title} is not known"
    expected, low, high = KINDS[job.devices.kind].efficiency
    if measured is not None and measured.efficiency is not None:
        expected, low, high = (measured.efficiency * part for part in (1.0, 0.8, 1.2))
    integer = job.devices.integer_rate if way.quantization == "int8" else None
    if integer is None:
        return (peak * expected, peak * low, peak * high), f"{flops_text(peak)}/s x {expected:.2g}"
    flops = plan_flops(job.preset.shape, plan)
    # Products of weights are of int8; attention's are of the way's dtype.
    attention = 1 - plan.padded_tokens * job.preset.shape.flops_per_token / flops if flops else 0.0
    mixed = 1 / (attention / peak + (1 - attention) / integer)
    text = (
        f"{flops_text(mixed)}/s x {expected:.2g} ({attention:.1%} of it in {way.dtype} at "
        f"{flops_text(peak)}/s, the rest int8 at {flops_text(integer)}/s)"
    )
    return (mixed * expected, peak * low, mixed * high), text


def _before(job: PlanInput, way: Way, plan: Plan) -> tuple[Seconds, str]:
    """Return the seconds of all stages but predicting, and how they were computed."""
    shape, kind, measured = job.preset.shape, job.devices.kind, job.measured
    start = START_S["single" if way.mode == "single" else "ray"]
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
        replicas=way.replicas,
        members=way.members,
        strategy=way.strategy,
    )
    if measured is not None:
        start, load, compiling = (part * measured.slowness for part in (start, load, compiling))
    quantizing = " with quantizing" if way.quantizes else ""
    text = f"load {duration(load)}{quantizing}, compile {duration(compiling)}"
    if measured is not None and measured.way == way.name:
        start, load = measured.before_predict_s, 0.0
        others = (len(plan.shapes) - 1) / way.replicas if job.devices.is_host else 0.0
        compiling = measured.compile_s * others
        text = f"start, load and first compile {duration(start)} as measured"
        if compiling:
            text += f", other compiles {duration(compiling)}"
    before = Seconds(
        read=job.read_s, tokenize=job.tokenize_s, start=start, load=load, compile=compiling
    )
    return before, text
