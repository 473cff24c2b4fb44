"""XLA's optimized program, as text -> how it computes matrix products, and what wastes time.

Imports neither JAX nor Keras.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# The cost of smaller squares of scores, and of smaller arrays, is negligible.
SHORTEST_SQUARE = 256
LARGE_WEIGHT_BYTES = 1 << 20
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16}

# An instruction: its name, type, operation, and operands with attributes.
INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) "
    r"(?P<what>[\w-]+)\((?P<rest>.*)$"
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .*)?\{$")
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
# Parameters of `Program.forward` that are weights.
WEIGHT = re.compile(r"(non_)?trainable|head")
NAMES = re.compile(r"%([\w.-]+)")
LIBRARY, KERNEL, LOOP, UNIT = "library call", "fused kernel", "loop", "matrix unit"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a program. type: of its result. rest: operands and attributes, as text."""

    name: str
    type: str
    what: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return NAMES.findall(self.rest.partition("), ")[0])

    def attribute(self, name: str) -> str:
        found = re.search(rf'\b{name}="?%?([^",\s}}]+)', self.rest)
        return found[1] if found else ""


@dataclass(slots=True)
class Computation:
    """A function of a program: its instructions by name, in order."""

    is_entry: bool = False
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction | None:
        return next((one for one in self.instructions.values() if one.is_root), None)


def read_program(text: str, *, length: int, scores: int = 0) -> dict[str, Any]:
    """Return an optimized program's matrix products by kind, and warnings.

    Args:
        text: as `jax.stages.Compiled.as_text` returns it. length: tokens per row. scores: of all
            rows and heads. An array with fewer is a chunk of them, though it may be square.

    Returns:
        products: "KIND of DTYPE" -> how many; KIND is library call, fused kernel, loop, or matrix
        unit (of a TPU). squares: how many float32 squares of scores there are.
        made_of_weights_bytes: arrays that each call computes from weights alone. warnings:
        sentences.
    """
    computations = _parse(text)
    products = _products(computations)
    squares = _squares(computations.values(), length, scores)
    made = _made_of_weights(computations)
    warnings = []
    if squares:
        warnings.append(f"{squares} float32 squares of scores, {length} x {length}, are in memory")
    if made:
        warnings.append(
            f"{len(made)} arrays ({sum(made) / 1e9:.2f} GB) are computed from weights alone in "
            "each call: transposed, joined or unpacked"
        )
    slow = {name: count for name, count in products.items() if name in ("loop of s8", "loop of s4")}
    if slow:
        warnings.append(f"{sum(slow.values())} integer products are not library calls")
    return {
        "products": dict(products),
        "squares": squares,
        "made_of_weights_bytes": sum(made),
        "warnings": warnings,
    }


def _parse(text: str) -> dict[str, Computation]:
    """Return the computations of a program by name."""
    found: dict[str, Computation] = {}
    current = Computation()
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = found[header["name"]] = Computation(is_entry=bool(header["entry"]))
        elif match := INSTRUCTION.match(line):
            current.instructions[match["name"]] = Instruction(
                match["name"], match["type"], match["what"], match["rest"], bool(match["root"])
            )
    return found


def _products(computations: dict[str, Computation]) -> Counter[str]:
    """Count the matrix products by what computes them and by the dtype of the first operand."""
    kernels: set[str] = set()
    called = [
        one.attribute("calls")
        for computation in computations.values()
        for one in computation.instructions.values()
        if one.what == "fusion" and '"kind":"__triton' in one.rest
    ]
    while called:  # a kernel's parts are computations too
        kernels.add(name := called.pop())
        parts = computations.get(name, Computation()).instructions.values()
        called += {one.attribute("calls") for one in parts} - kernels - {""}
    found: Counter[str] = Counter()
    for name, computation in computations.items():
        for one in computation.instructions.values():
            kind = None
            if one.what == "custom-call" and re.search(r"cublas|cudnn", one.rest):
                kind = LIBRARY
            elif one.what == "convolution":
                kind = UNIT
            elif one.what == "dot":
                kind = KERNEL if name in kernels else LOOP
            if kind is not None:
                found[f"{kind} of {_operand_dtype(one, computation)}"] += 1
    return found


def _operand_dtype(one: Instruction, computation: Computation) -> str:
    inline = ARRAY.match(one.rest)
    if inline:
        return inline[1]
    first = computation.instructions.get(one.operands[0]) if one.operands else None
    known = ARRAY.search(first.type) if first else None
    return known[1] if known else "unknown"


def _squares(computations: Iterable[Computation], length: int, scores: int) -> int:
    """Count the square arrays of float32 scores, outside of fusions."""
    if length < SHORTEST_SQUARE:
        return 0
    return sum(
        dtype == "f32" and dims[-2:] == [length, length] and math.prod(dims) >= scores
        for computation in computations
        if computation.is_entry
        for one in computation.instructions.values()
        for dtype, sizes in ARRAY.findall(one.type)
        if len(dims := [int(size) for size in sizes.split(",") if size]) > 2
    )


def _made_of_weights(computations: dict[str, Computation]) -> list[int]:
    """Return the bytes of each large array that depends on weights alone."""
    entry = next((one for one in computations.values() if one.is_entry), Computation())
    weights: set[str] = set()
    found = []
    for one in entry.instructions.values():
        operands = one.operands
        if one.what == "parameter" and WEIGHT.match(one.name):
            weights.add(one.name)
        elif operands and weights.issuperset(operands):
            if one.what in ("bitcast", "reshape", "get-tuple-element"):
                weights.add(one.name)
            elif one.what in ("fusion", "transpose", "copy", "concatenate"):
                size = _bytes_of(one.type)
                found += [size] if size >= LARGE_WEIGHT_BYTES else []
    return found


def _bytes_of(type_: str) -> int:
    """Return the bytes of an array, or of all arrays in a tuple."""
    total = 0
    for dtype, sizes in ARRAY.findall(type_):
        bits = ITEM_BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
