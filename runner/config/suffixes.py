"""The suffix of a test set or submission -> its format. `data/` reads and writes the formats."""

from collections.abc import Sequence
from pathlib import Path

# Format -> its suffixes, the usual one first.
FORMATS: dict[str, tuple[str, ...]] = {
    "CSV": (".csv",),
    "Parquet": (".parquet", ".pq"),
    "JSON lines": (".jsonl",),
}
USUAL_SUFFIXES = [suffixes[0] for suffixes in FORMATS.values()]


def format_of(path: Path) -> str:
    """Return the format of a file; CSV if its suffix is not known."""
    suffix = path.suffix.lower()
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), "CSV")


def either(names: Sequence[str]) -> str:
    """Join names as in a sentence: a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
