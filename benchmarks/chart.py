"""A result of `throughput.py` -> the chart in the README, as SVG.

    python benchmarks/chart.py

Reads benchmarks/results/2026-11-26-throughput.json and writes docs/results.svg, 360 pixels wide, so
that it can be read on a phone.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "2026-11-26-throughput.json"
CHART = ROOT / "docs" / "results.svg"
# Pooling -> the contenders to show, with their labels.
SHOWN = {
    "padded-mean": {
        "notebook": "notebook's eager loop",
        "Keras predict": "Keras predict",
        "ours, 2 workers": "arena-runner",
        "ours, 2 workers, int8": "arena-runner, int8",
    },
    "mean": {
        "transformers float32, mean": "transformers, float32",
        "Ray Data, mean": "Ray Data",
        "Keras predict, mean": "Keras predict",
        "transformers bfloat16, mean": "transformers, bfloat16",
        "ours, 2 workers, mean": "arena-runner",
        "ours, 2 workers, int8, mean": "arena-runner, int8",
        "ours, 2 workers, bfloat16, mean": "arena-runner, bfloat16",
    },
}
WIDTH, LABELS, BARS, LINE = 360, 152, 160, 19
OURS, OTHERS = "#c77700", "#9fb3c8"


def draw(result: dict[str, Any]) -> str:
    """Return the chart: one bar per contender, its length the seconds."""
    seconds = {one["name"]: one["steady_s"] for one in result["contenders"]}
    longest = max(seconds[name] for shown in SHOWN.values() for name in shown)
    versions = result["versions"]
    rows = result["lengths"]["rows"]
    parts, y = [], 20
    parts.append(_text(10, y, f"Seconds for {rows} rows, shorter is better", bold=True))
    for pooling, shown in SHOWN.items():
        y += LINE + 7
        parts.append(_text(10, y, f"--pooling {pooling}", bold=True))
        for name, label in shown.items():
            y += LINE
            width = max(2.0, BARS * seconds[name] / longest)
            color = OURS if label.startswith("arena-runner") else OTHERS
            parts.append(_text(LABELS - 8, y, label, anchor="end"))
            parts.append(
                f'<rect x="{LABELS}" y="{y - 11}" width="{width:.1f}" height="14" fill="{color}"/>'
            )
            parts.append(_text(LABELS + width + 5, y, f"{seconds[name]:.1f}"))
    y += 8
    for line in (
        f"{result['command']}, {result['date']}",
        f"{result['hardware']}; {result['preset_shape']} model, {result['sequence_length']} tokens",
        f"float32 unless named; median of {result['rounds']} rounds, after compiling",
        f"jax {versions['jax']}, keras {versions['keras']}, torch {versions['torch']}",
    ):
        y += 15
        parts.append(_text(10, y, line, size=11))
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 12}" width="{WIDTH}" '
        'font-family="Helvetica, Arial, sans-serif" fill="#1f2933" role="img" '
        'aria-labelledby="t">\n'
        '  <title id="t">Seconds that arena-runner and others need for the same rows.</title>\n'
        f'  <rect width="{WIDTH}" height="{y + 12}" rx="8" fill="#ffffff"/>\n  {body}\n</svg>\n'
    )


def _text(
    x: float, y: float, words: str, *, size: int = 12, bold: bool = False, anchor: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:.1f}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight}'
    return f"<text {place}>{words}</text>"


if __name__ == "__main__":
    CHART.write_text(draw(json.loads(RESULT.read_text())))
