"""How much work code does, in lines run: the same on every machine and under any load."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tests.conftest import ROOT

OURS = tuple(f"{ROOT / package}/" for package in ("runner", "sharding"))


@contextmanager
def count_lines() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many lines of runner/ and sharding/ have run in the block.

    What a library or a built-in function does inside itself is not counted.
    """
    lines = 0

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        return count if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield lambda: lines
    finally:
        sys.settrace(before)
