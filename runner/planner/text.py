"""A plan as JSON -> the text that the user reads, at most 100 columns wide.

Knows the plan's keys. Does not know how their values were computed.
"""

import shlex
import textwrap
from typing import Any

from runner.common.poolings import POOLINGS
from runner.common.units import duration, flops_text, gb, parameters_text
from sharding.kinds import KINDS

WIDTH = 100
BAR_WIDTH = 46
BLOCKS = " ▏▎▍▌▋▊▉█"
PLAIN_BLOCKS = " #"


def render(plan: dict[str, Any], *, encoding: str = "utf-8") -> str:
    """Return the text of a plan, with block characters if the encoding has them."""
    sections = [
        _head(plan),
        _lengths(plan, _blocks(encoding)),
        _batches(plan),
        _options(plan),
        _arithmetic(plan),
        _compiled(plan),
        _recommendation(plan),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _head(plan: dict[str, Any]) -> list[str]:
    model, device = plan["model"], plan["device"]
    files = "" if model["weight_files_are_here"] else " (its weights are not here)"
    where = "here" if device["is_here"] else "not here: figures from a table"
    count = f"{device['count']} x " if not KINDS[device["kind"]].is_host else ""
    lines = [
        f"Plan for {plan['rows']:,} rows, {parameters_text(model['parameters'])} weights in "
        f"{model['layers']} layers of {model['family']}{files}",
        f"on {count}{device['title']}, {gb(device['memory_bytes'])}"
        f"{' each' if count else ''} ({where})",
    ]
    for note in device["notes"]:
        lines += textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
    return lines


def _lengths(plan: dict[str, Any], blocks: str) -> list[str]:
    lengths, length = plan["lengths"], plan["config"]["sequence_length"]
    if not plan["rows"]:
        return ["The test set has no rows."]
    cut = lengths["cut"]
    real = lengths["mean"] * plan["rows"]
    lines = [
        f"Tokens a row, {lengths['mean']:,.0f} on average, {lengths['quartiles'][2]:,} median:"
    ]
    most = max(one["rows"] for one in lengths["histogram"])
    labels = [f"{one['from']:,}-{one['to']:,}" for one in lengths["histogram"]]
    width = max(map(len, labels))
    for one, label in zip(lengths["histogram"], labels, strict=True):
        bar = _bar(one["rows"] / most, blocks)
        beyond = "  cut" if one["from"] > length else ""
        lines.append(f"  {label:>{width}} {bar} {one['rows']:>7,}{beyond}")
    lines.append(
        f"  --sequence-length {length} cuts {cut['rows']:,} rows ({cut['share']:.0%}) and loses "
        f"{cut['tokens_lost'] / real:.0%} of all tokens."
        if cut["rows"]
        else f"  --sequence-length {length} cuts no row."
    )
    return lines


def _batches(plan: dict[str, Any]) -> list[str]:
    if not plan["shapes"]:
        return []
    count = sum(shape["batches"] for shape in plan["shapes"])
    shapes = ", ".join(
        f"{shape['rows']} x {shape['length']} ({shape['batches']:,})" for shape in plan["shapes"]
    )
    text = (
        f"{count:,} batches of {len(plan['shapes'])} shape{_s(len(plan['shapes']))}, "
        f"rows x tokens (batches): {shapes}"
    )
    flops = plan["flops"]
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    lines.append(
        f"  {plan['padding']:.1%} padding; {flops_text(flops['padded'])} with it, "
        f"{flops_text(flops['real'])} without ({flops_text(flops['per_token'])} a token, "
        f"attention {flops['attention_share']:.1%} more)"
    )
    pooling = plan["config"]["pooling"]
    if POOLINGS[pooling].sees_padding and plan["padding"] > 0.1:
        lines.append(
            f"  --pooling {pooling} pads every row to the sequence length, as in the notebook."
        )
    return lines


def _options(plan: dict[str, Any]) -> list[str]:
    shown = _shown(plan)
    hidden = len(plan["options"]) - len(shown)
    lines = [
        f"    {'mode':<15}{'strategy':<10}{'dtype':<10}{'weights':<9}{'workers':>7}  {'fits':<5}"
        f"{'GB a device':>12}  {'time (range)'}"
    ]
    for number, option in enumerate(shown, start=1):
        mark = "*" if _same(option, plan["recommendation"]) else " "
        need = option["per_device"]
        size = f"{need['total_bytes'] / 1e9:.1f}" if need["total_bytes"] else "-"
        room = f"{need['memory_bytes'] / 1e9:.1f}"
        weights = option["quantization"] if option["quantization"] != "none" else "as dtype"
        lines.append(
            f"{mark}{number:>2} {option['mode']:<15}{option['strategy'] or '-':<10}"
            f"{option['dtype']:<10}{weights:<9}{option['workers'] or '-':>7}  "
            f"{'yes' if option['fits'] else 'NO':<5}{f'{size} of {room}':>12}  {_time(option)}"
        )
    what = "* recommended" if plan["recommendation"]["mode"] else "None is recommended"
    lines.append(f"{what}. {hidden} more ways, with other dtypes, are in the JSON file.")
    return lines


def _arithmetic(plan: dict[str, Any]) -> list[str]:
    lines = ["How these were computed:"]
    for number, option in enumerate(_shown(plan), start=1):
        lines += textwrap.wrap(
            option["arithmetic"], WIDTH, initial_indent=f"{number:>3} ", subsequent_indent="    "
        )
    return [*lines, *_caveats(plan)]


def _compiled(plan: dict[str, Any]) -> list[str]:
    """Return what XLA says of the programs that --compile compiled."""
    compiled = plan.get("compiled")
    if compiled is None:
        return []
    if compiled["missing"]:
        return textwrap.wrap(f"--compile: {compiled['missing']}.", WIDTH)
    lines = [
        f"Compiled here for {plan['device']['title']}; bytes are XLA's own:",
        f"    {'way':<30}{'layers':<8}{'batch':<11}{'weights':>8}{'batch':>9}  {'fits':<5}"
        f"{'most tokens':>12}{'compiled':>10}",
    ]
    for number, one in enumerate(compiled["programs"], start=1):
        lines += _program(number, one)
    lines += textwrap.wrap(
        f"fits: within {compiled['share']:g} of the device's memory. most tokens: of a batch that "
        "fits, as memory grows with tokens. Attention was chunked, and kernels were not "
        "autotuned, which needs the device. Nothing was measured on a device.",
        WIDTH,
    )
    return lines


def _program(number: int, one: dict[str, Any]) -> list[str]:
    """Return the lines of one compiled program."""
    quantization = one["quantization"] if one["quantization"] != "none" else None
    way = " ".join(filter(None, [one["strategy"] or one["mode"], one["dtype"], quantization]))
    layers = f"{one['layers'][0]}-{one['layers'][1] - 1}" if one["layers"] else "all"
    head = f"{number:>3} {way:<30}{layers:<8}{one['rows']:,} x {one['length']:<6,}"
    if "error" in one:
        return [head, *_indented(f"not compiled: {one['error']}")]
    per_batch = one["temporary_bytes"] + one["output_bytes"]
    most = f"{one['largest_batch_tokens']:,}" if one["largest_batch_tokens"] else "-"
    products = ", ".join(f"{count} {_plural(name)}" for name, count in one["products"].items())
    return [
        f"{head}{gb(one['argument_bytes']):>9}{gb(per_batch):>9}  "
        f"{'yes' if one['fits'] else 'NO':<5}{most:>12}{duration(one['compile_s']):>10}",
        *_indented(f"products: {products or 'none'}"),
        *(line for warning in one["warnings"] for line in _indented(f"warning: {warning}")),
    ]


def _plural(product: str) -> str:
    """Return several products of a kind: library calls of f16."""
    kind, _, dtype = product.partition(" of ")
    return f"{kind}s of {dtype}"


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ")


def _caveats(plan: dict[str, Any]) -> list[str]:
    """Return lines on what the forecast times are based on."""
    device, measured = plan["device"], plan["calibration"]
    expected, low, high = KINDS[device["kind"]].efficiency
    if measured:
        text = (
            f"Calibrated on {measured['batches']} batches here: "
            f"{flops_text(measured['flops_per_s'])}/s a worker"
            + (
                f", {measured['efficiency']:.2f} of a large matmul's rate"
                if measured["efficiency"]
                else ""
            )
            + "; other ways are scaled by that."
        )
    elif KINDS[device["kind"]].is_host:
        text = (
            f"Times: measured on CPUs, a model reaches {low:g} to {high:g} of a large matmul's "
            "rate; --calibrate measures it here."
        )
    else:
        text = (
            f"Times: this program has not been measured on a {device['kind'].upper()} yet. Matmul "
            f"rates are from the sources below; the share that a model reaches, {expected:g} "
            f"({low:g} to {high:g}), was measured on CPUs. int8 products are expected at the "
            "integer rate and at worst at the float rate; int4 is assumed to be as fast as float. "
            "The disk is assumed to read 0.5 GB/s, and compiling to take 0.3 s a layer and shape. "
            "The first hundred rows will tell, and so does --calibrate on the device itself."
        )
    lines = textwrap.wrap(text, WIDTH)
    if not KINDS[device["kind"]].is_host:
        for dtype, rate in device["rates"].items():
            if dtype == "int8" or dtype in {option["dtype"] for option in _shown(plan)}:
                lines.append(f"- {dtype}: {flops_text(rate['used'])}/s used, {_origin(rate)}")
        for source in device["sources"]:
            lines += textwrap.wrap(source, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return lines


def _origin(rate: dict[str, Any]) -> str:
    nominal = f"{flops_text(rate['nominal'])}/s nominal"
    if rate["measured"] is None:
        return f"{rate['used'] / rate['nominal']:.2f} of {nominal}: no measurement known"
    return f"sustained, as others measured it; {nominal}"


def _recommendation(plan: dict[str, Any]) -> list[str]:
    best = plan["recommendation"]
    if best["mode"] is None:
        return textwrap.wrap(f"No recommendation: {best['why']}", WIDTH)
    option = next(option for option in plan["options"] if _same(option, best))
    name = " ".join(filter(None, [best["mode"], best["strategy"], best["dtype"]]))
    name += "" if best["quantization"] == "none" else f" {best['quantization']}"
    workers = f"{best['workers']} worker{_s(best['workers'])}"
    text = f"Recommended: {name}, {workers}, {_time(option)}. {best['why']}"
    host = option["host_bytes"]
    if plan["device"]["host_bytes"] is None:
        text += f" The machine needs about {gb(host)} of host memory."
    return [*textwrap.wrap(text, WIDTH), "", *_command_lines(best["command"])]


def _command_lines(command: list[str]) -> list[str]:
    """Return the lines of a command, each flag on one line with its value."""
    parts: list[str] = []
    for word in command:
        if word.startswith("--") or not parts or not parts[-1].startswith("--"):
            parts.append(shlex.quote(word))
        else:
            parts[-1] += " " + shlex.quote(word)
    lines, line = [], " ".join(parts[:2])
    for part in parts[2:]:
        if len(line) + len(part) + 3 > WIDTH:
            lines.append(line + " \\")
            line = "   "
        line += " " + part
    return [*lines, line]


def _shown(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options in the dtypes that matter here, those without quantization first."""
    dtypes = {plan["asked"]["dtype"], plan["device"]["auto_dtype"]}
    if plan["recommendation"]["mode"]:
        dtypes.add(plan["recommendation"]["dtype"])
    shown = [
        option
        for option in plan["options"]
        if option["dtype"] in dtypes
        and not (option["strategy"] == "tensor" and option["quantization"] != "none")
    ]
    layouts = list(dict.fromkeys((option["mode"], option["strategy"]) for option in shown))
    return sorted(
        shown,
        key=lambda option: (
            layouts.index((option["mode"], option["strategy"])),
            option["quantization"] != "none",
        ),
    )


def _same(option: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        option[key] == other.get(key) for key in ("mode", "strategy", "dtype", "quantization")
    )


def _time(option: dict[str, Any]) -> str:
    if option["seconds"] is None:
        return "not known" if option["fits"] else "-"
    fast, slow = option["seconds_range"]
    text, low, high = map(duration, (option["seconds"], fast, slow))
    if slow < 1.02 * fast:
        return text
    low = low.removesuffix(f" {high.split()[-1]}")  # one unit is enough
    return f"{text} ({low} - {high})"


def _blocks(encoding: str) -> str:
    try:
        BLOCKS.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BLOCKS
    return BLOCKS


def _bar(share: float, blocks: str) -> str:
    """Return a bar of `BAR_WIDTH` columns, filled to a share, not empty unless the share is 0."""
    steps = len(blocks) - 1
    filled = round(share * BAR_WIDTH * steps)
    filled = max(filled, 1) if share > 0 else 0
    whole, part = divmod(filled, steps)
    text = blocks[-1] * whole + (blocks[part] if part else "")
    return f"{text:<{BAR_WIDTH}}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
