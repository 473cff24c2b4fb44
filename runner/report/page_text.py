"""Facts of a finished run -> the words of its page. Does not know HTML, drawings or files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from runner.common.units import duration, flops_text, gb
from runner.report.facts import DEMO, describe_devices
from runner.report.lanes import ENDING, IDLE, PADDING, SLOWER, WORKING
from runner.telemetry.timeline import COMPILING, LOADING, LOST, PREDICTING, STARTING, Event
from sharding.kinds import KINDS

# With fewer rows than this, predictions are not judged.
ROWS_TO_DOUBT = 50
ONE_CLASS_SHARE = 0.95
SAME_ANSWER = 1e-3
NEAR_GUESSING = 0.02
FILLED_SHARE = 0.01

# In the order of a legend.
STATES = {
    PREDICTING: "predicting",
    COMPILING: "compiling (strip: alongside other work)",
    LOADING: "loading",
    STARTING: "starting",
    IDLE: "idle",
    LOST: "lost: no answer came back",
    ENDING: "ending: the run merges and writes",
}
PARTS = {
    WORKING: "the model's matrix products, at the speed of one large matrix product",
    SLOWER: "the rest of predicting: attention, norms, memory access, smaller matrices",
    PADDING: "predicting tokens that only pad a batch",
    IDLE: "waiting for batches, programs, tokens or other members",
    COMPILING: "compiling a program or reading it from the cache, while predicting nothing",
    LOADING: "loading weights",
    STARTING: "before loading: the driver reads, Ray and the worker start",
    LOST: "batches without an answer: an error, a death, a hang or the time limit",
    ENDING: "after the last answer: merging, checking, writing",
}


def title(report: dict[str, Any]) -> str:
    rows, seconds = report["rows"], report["seconds"]
    return f"{rows['total']:,} rows in {duration(seconds['total'])}"


def subtitle(report: dict[str, Any]) -> str:
    workers, model = report["workers"], report["model"]
    parts = [f"arena-runner {report['versions'].get('arena-runner', '')}".strip(), report["mode"]]
    if report["strategy"]:
        parts.append(report["strategy"])
    if workers and model:
        parts.append(describe_devices(workers))
        parts.append(model["dtype"])
        parts.append(f"attention: {model['attention']}")
    if report["quantization"]:
        parts.append(report["quantization"]["mode"])
    return ", ".join(parts)


def tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures: (value, what it is)."""
    rows, rates, tokens = report["rows"], report["rates"], report["tokens"]
    seconds, slack_s = report["seconds"], report["deadline"]["slack_s"]
    found = [
        (duration(seconds["total"]), "from start to end"),
        (duration(seconds["predict"]), "spent predicting"),
    ]
    if rates["rows_per_s"]:
        found.append((f"{rates['rows_per_s']:,.1f}", "rows per second"))
        found.append((f"{rates['tokens_per_s']:,.0f}", "real tokens per second"))
    if tokens["padded"]:
        found.append((f"{1 - tokens['real'] / tokens['padded']:.1%}", "of the tokens are padding"))
    if rates["mfu"]:
        found.append((f"{rates['mfu']:.0%}", "of the matmul rate while predicting"))
    if slack_s is not None:
        what = "before the limit" if slack_s >= 0 else "after the limit"
        found.append((duration(abs(slack_s)), what))
    for key, what in (
        ("resumed", "rows were in the journal"),
        ("shortened", "rows were shortened"),
        ("filled", "rows got the fallback"),
    ):
        if rows[key]:
            found.append((f"{rows[key]:,}", what))
    if deaths := report["faults"]["worker_deaths"] + report["faults"]["hangs"]:
        found.append((f"{deaths:,}", "worker deaths and hangs"))
    return found


def doubts(values: np.ndarray, labels: Sequence[str], report: dict[str, Any]) -> list[str]:
    """Return what is suspect about the predictions.

    Args:
        values: float64 (rows, columns), the model's own predictions, in the order of `labels`.
    """
    rows = report["rows"]
    found = [DEMO] if report["config"]["preset"] is None else []
    if rows["filled"] > FILLED_SHARE * rows["total"]:
        found.append(
            f"{rows['filled']:,} of {rows['total']:,} rows have no prediction and got the fallback."
        )
    if len(values) < ROWS_TO_DOUBT:
        return found
    if values.std(axis=0).max() < SAME_ANSWER:
        return [
            *found,
            "The predictions hardly differ between rows. Do the head, the LoRA weights and the "
            "backbone belong together?",
        ]
    if not are_probabilities(values):
        return found
    shares = np.bincount(values.argmax(axis=1), minlength=values.shape[1]) / len(values)
    if shares.max() >= ONE_CLASS_SHARE:
        found.append(
            f"{shares.max():.1%} of the predictions favour the same class, "
            f"{labels[int(shares.argmax())]}. Do the head, the pooling and the sequence length "
            "match the training?"
        )
    if values.max(axis=1).mean() < 1 / values.shape[1] + NEAR_GUESSING:
        found.append("On average, the predictions are hardly more confident than a guess.")
    return found


def are_probabilities(values: np.ndarray) -> bool:
    """Return whether each row of (rows, columns) is a distribution over the columns."""
    return bool(
        values.shape[1] > 1
        and (values >= 0).all()
        and np.allclose(values.sum(axis=1), 1.0, atol=1e-3)
    )


def why_no_workers(rows: dict[str, int]) -> str:
    """Return why a run has no loaded worker."""
    if not rows["total"]:
        return "No worker was needed: the test set has no rows."
    if rows["resumed"] == rows["total"]:
        return "No worker was needed: the journal already had every row."
    return "No worker had loaded the model when the run ended, so it predicted nothing."


def how_to_read_workers(has_faults: bool, has_decisions: bool) -> str:
    return (
        "One row for each worker, from the start of the run to its end. The top row is the driver."
        + " Red marks are faults." * has_faults
        + " Dotted lines are decisions about the time limit." * has_decisions
    )


def describe_part(part: str, parts: dict[str, float]) -> tuple[str, str]:
    """Return the name of one of the parts of the time, and what it is."""
    if part == SLOWER and WORKING not in parts:
        return "predicting", "all of it, except for padding"
    return part, PARTS[part]


def how_to_read_shares(report: dict[str, Any], parts: dict[str, float]) -> str:
    """Return what the shares of `lanes.shares` mean; parts: those above zero."""
    said = "All workers' time, from the start of the run to its end."
    if WORKING in parts:
        rate = flops_text(report["model"]["matmul_flops_per_s"])
        return (
            f"{said} A large matrix product ran at {rate}/s on one of the devices. At "
            f"that rate, the model's matrix products make up {parts[WORKING]:.0%} of the time."
        )
    if SLOWER in parts:
        return f"{said} Predicting is one part: this run measured no rate to split it by."
    return f"{said} The run predicted nothing."


def how_to_read_throughput(has_faults: bool) -> str:
    return (
        "Real tokens of all workers, without padding. Dashed: the mean from the first batch to the "
        "last." + " Red lines are faults." * has_faults
    )


def how_to_read_forecasts(pairs: Sequence[tuple[float, float]], end_s: float) -> str:
    """Return how good the forecasts were.

    pairs: the report's `forecasts`. end_s: when the rows were done.
    """
    first, last = pairs[0][0], pairs[-1][0]
    at_s, expected_s = next(pair for pair in pairs if pair[0] >= first + (last - first) / 10)
    return (
        "The expected end of the run, by the time of each forecast. The band is the actual end "
        f"±10%. A tenth of the way from the first forecast to the last, at {duration(at_s)}, the "
        f"forecast was {(expected_s - end_s) / end_s:+.0%} off."
    )


def how_to_read_lengths(report: dict[str, Any], lengths: np.ndarray, buckets: int) -> str:
    """Return what the chart of lengths shows.

    Args:
        lengths: int64 (rows,), tokens of each row that was counted. buckets: lengths of batches.
    """
    limit, empty = report["config"]["sequence_length"], report["rows"]["total"] - len(lengths)
    said: str = (
        f"Half of the rows have up to {int(np.median(lengths)):,} tokens, the longest "
        f"{int(lengths.max()):,}; {(lengths >= limit).mean():.0%} reach the sequence length of "
        f"{limit:,}."
        + f" {empty:,} rows without a token count are not drawn." * (empty > 0)
        + " Blue lines are the planned batch lengths. Each row is padded to a line on its right."
        * (buckets > 0)
    )
    return said


def how_to_read_memory(report: dict[str, Any], most: int) -> str:
    """Return what the chart of memory shows. most: how many workers it can draw."""
    workers = report["workers"]
    said = "Peak resident memory of each worker's process."
    if len(workers) > most:
        said = f"Peak resident memory of the first {most} of {len(workers)} workers' processes."
    if not KINDS[report["model"]["kind"]].is_host:
        largest = max(worker["weight_bytes"] for worker in workers)
        said += f" The weights are on the devices, up to {gb(largest)} on one."
    return said


def how_to_read_answers(values: np.ndarray, every: int, *, bars: int, curves: int) -> str:
    """Return what the charts of predictions show.

    Args:
        values: (rows, columns), those drawn: one row in `every`. bars, curves: the most classes or
            columns that are drawn.
    """
    columns: int = values.shape[1]
    if are_probabilities(values):
        said = (
            "A good model usually spreads over the classes as the training set does, and is sure "
            "of only some rows. One bar with nearly all rows, or a single spike, usually means a "
            "broken model."
            + f" The {bars} most frequent of {columns:,} classes are drawn."
            * (columns > bars)
        )
    else:
        said = (
            "A good model gives different values to different rows. A single spike usually means "
            "a broken model."
            + f" The first {curves} of {columns:,} columns are drawn."
            * (columns > curves)
        )
    return said + f" Drawn from one row in {every}." * (every > 1)


def describe_event(found: Event, noun: str) -> str:
    return found.what if found.replica is None else f"{noun} {found.replica}: {found.what}"
