"""Two tables of probabilities -> how far quantization moved them, in numbers and in a sentence.

Pure arithmetic; `driver/run.py` and `prepare.py` bring the tables.
"""

from typing import Any

import numpy as np

from runner.common.poolings import padded_length
from sharding.batches import Batch, BatchShape

# Rows whose probabilities are computed again in float32.
REFERENCE_ROWS = 8


def reference_batch(lengths: np.ndarray, *, pooling: str, sequence_length: int) -> Batch:
    """Return the first rows of a test set as one batch, padded as their pooling needs it.

    lengths: (rows,) token counts.
    """
    rows = min(REFERENCE_ROWS, len(lengths))
    length = padded_length(pooling, int(lengths[:rows].max()), sequence_length)
    return Batch(0, tuple(range(rows)), BatchShape(rows, length))


def compare(
    quantized: np.ndarray, reference: np.ndarray, *, seconds: float, head: str = "softmax"
) -> dict[str, Any]:
    """Return the report's `quantization` figures for two tables (rows, classes).

    `changed_argmax` is of a softmax alone: other heads' numbers have no likeliest class.
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
    """Return a sentence for the person about what `compare` returned."""
    if "reference_rows" not in figures:
        return f"{mode}: how far it lies from float32 is not known ({figures['measured']})."
    is_softmax = "changed_argmax" in figures
    return (
        f"{mode} lies {figures['max_abs_difference']:.4f} at most and "
        f"{figures['mean_abs_difference']:.4f} on average from float32 in the first "
        f"{figures['reference_rows']} rows' "
        + (
            f"probabilities; the likeliest class changed in {figures['changed_argmax']}"
            if is_softmax
            else "numbers"
        )
        + f" ({figures['measured']})."
    )
