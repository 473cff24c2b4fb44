"""Pages in Markdown -> the commands and scripts that a reader would copy from them.

A command is a line of a console block that begins with `$ `. It continues while lines end in a
backslash; the lines below are its output. If no test can run it, the line says so, also to the
reader: `$ make soak  # not run by the tests: takes eight minutes`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("console", "text", "python", "toml", "json", "csv")
NOT_RUN = "# not run by the tests:"
# The beginning of a line that a reader would paste into a terminal.
PROGRAM = r"(python3?|arena-runner|pip3?|ray|apt(-get)?|docker|git|make|export)"
ARGUMENT = r"(-{1,2}[\w-]+|\S*[./]\S*|install|wheel|download|start|clone|\w+=\S*|\w[\w-]*$)"
PASTED = re.compile(rf"\s*(\$ |{PROGRAM} +{ARGUMENT})")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the line of its fence, its language, its lines."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def numbers(self) -> range:
        """The numbers of its lines in the page, including its fences."""
        return range(self.line, self.line + len(self.lines) + 2)


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a console block, its continuation lines joined."""

    where: str
    text: str
    why_not_run: str | None

    @property
    def is_cheap(self) -> bool:
        """Whether it starts no model."""
        words = self.text.split()
        is_ours = any(word in ("arena-runner", "run.py", "runner") for word in words[:3])
        only_says = "--help" in words or ("--plan" in words and "--calibrate" not in words)
        return self.why_not_run is None and is_ours and only_says


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page.

    Raises:
        ValueError: a block has no end.
    """
    blocks: list[Block] = []
    fence, language, begun = "", "", 0
    inside: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        found = re.match(r"\s*(```+|~~~+)\s*(.*)$", line)
        if found and not fence:
            (fence, language), begun, inside = found.groups(), number, []
        elif found and found[1].startswith(fence) and not found[2]:
            blocks.append(Block(page, begun, language.strip(), tuple(inside)))
            fence = ""
        elif fence:
            inside.append(line)
    if fence:
        raise ValueError(f"{page}:{begun}: a block does not end: expected a closing fence.")
    return blocks


def read_commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a console block."""
    lines = iter(enumerate(block.lines, block.line + 1))
    for number, line in lines:
        if not line.lstrip().startswith("$ "):
            continue
        text = line.lstrip()[2:]
        while text.endswith("\\"):
            text = text[:-1] + next(lines)[1].strip()
        text, _, why = text.partition(NOT_RUN)
        yield Command(f"{block.page.name}:{number}", text.strip(), why.strip() or None)


def stray_commands(page: Path) -> list[str]:
    """Return lines that a reader would take for commands but no test runs."""
    blocks = read_blocks(page)
    stray = [
        f"{block}: a block of language '{block.language}'"
        for block in blocks
        if block.language not in LANGUAGES
    ]
    stray += [
        f"{block}: a console block that does not begin with `$ `"
        for block in blocks
        if block.language == "console" and not block.lines[0].lstrip().startswith("$ ")
    ]
    block_at = {number: block for block in blocks for number in block.numbers}
    for number, line in enumerate(page.read_text().splitlines(), 1):
        block = block_at.get(number)
        if block is None:
            is_stray = line.startswith("$ ") or (line.startswith("    ") and PASTED.match(line))
        else:
            is_stray = block.language not in ("console", "python") and PASTED.match(line)
        if is_stray:
            stray.append(f"{page.name}:{number}: {line.strip()}")
    return stray


def inline_code(page: Path) -> list[tuple[int, str]]:
    """Return the text between backticks outside blocks, with line numbers."""
    fenced = {number for block in read_blocks(page) for number in block.numbers}
    lines = enumerate(page.read_text().splitlines(), 1)
    # A span may continue on the next line.
    text = "\n".join("" if number in fenced else line for number, line in lines)
    return [
        (text.count("\n", 0, found.start()) + 1, " ".join(found[1].split()))
        for found in re.finditer(r"`([^`]+)`", text)
    ]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
