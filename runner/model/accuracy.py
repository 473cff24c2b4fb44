"""Two tables of probabilities -> how much quantization changed them, as numbers and a sentence.

Does not know models or files.
"""

from typing import Any

import numpy as np

from runner.common.poolings import padded_length
from sharding.batches import Batch, BatchShape

# How many rows are computed again in float32.
REFERENCE_ROWS = 8


def reference_batch(lengths: np.ndarray, *, pooling: str, sequence_length: int) -> Batch:
    """Return the first rows of a test set as one batch, padded as the pooling requires.

    lengths: (rows,) token counts.
    """
    rows = min(REFERENCE_ROWS, len(lengths))
    length = padded_length(pooling, int(lengths[:rows].max()), sequence_length)
    return Batch(0, tuple(range(rows)), BatchShape(rows, length))


def compare(
    quantized: np.ndarray, reference: np.ndarray, *, seconds: float, head: str = "softmax"
) -> dict[str, Any]:
    """Return the report's `quantization` figures for two tables (rows, classes).

    Only softmax heads have `changed_argmax`: the others have no likeliest class. seconds: how long
    it took to compute the tables.
    """
    difference = np.abs(quantized - reference)
    figures = {
        "reference_rows": len(reference),
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
    }
    if head == "softmax":
        changed = quantized.argmax(axis=1) != reference.argmax(axis=1)
        figures["changed_argmax"] = int(changed.sum())
    return figures | {"seconds": round(seconds, 4), "measured": "in this run"}


def describe(mode: str, figures: dict[str, Any]) -> str:
    """Return a sentence for the user about what `compare` returned."""
    if "reference_rows" not in figures:
        return f"{mode}: the difference from float32 is unknown ({figures['measured']})."
    numbers, changed = "numbers", ""
    if "changed_argmax" in figures:
        numbers = "probabilities"
        changed = f"; the likeliest class changed in {figures['changed_argmax']}"
    return (
        f"{mode} differs from float32 by at most {figures['max_abs_difference']:.4f} and on "
        f"average {figures['mean_abs_difference']:.4f} in the first "
        f"{figures['reference_rows']} rows' {numbers}{changed} ({figures['measured']})."
    )
