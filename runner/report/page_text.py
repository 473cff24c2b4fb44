"""Facts of a finished run -> the words of its page. Does not know HTML, drawings or files."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from runner.report.lanes import ENDING, IDLE, PADDING, SLOWER, WORKING
from runner.telemetry.timeline import COMPILING, LOADING, LOST, PREDICTING, STARTING, Event
from sharding.kinds import KINDS

# From so many rows on, a model of which one of these is true is doubted.
ROWS_TO_DOUBT = 50
ONE_CLASS_SHARE = 0.95
SAME_ANSWER = 1e-3
NEAR_GUESSING = 0.02
FILLED_SHARE = 0.01

# In the order of a legend.
STATES = {
    PREDICTING: "predicting",
    COMPILING: "compiling",
    LOADING: "loading",
    STARTING: "starting",
    IDLE: "idle",
    LOST: "lost: no answer came of it",
    ENDING: "ending; the run's own work",
}
PARTS = {
    WORKING: "what the model's products need where the device multiplies large matrices",
    SLOWER: "what predicting takes longer than that: attention, norms, memory, smaller matrices",
    PADDING: "predicting tokens that are no one's: rows padded to a shape",
    IDLE: "waiting for batches, shapes, tokens or other members",
    COMPILING: "making or reading the program of a shape, with no batch beside it",
    LOADING: "reading weights and merging LoRA",
    STARTING: "before the worker's process was up: the driver reads, Ray starts",
    LOST: "batches that failed, whose worker died or hung, or for which no time was left",
    ENDING: "after the last answer: merging, checking, writing",
}
HOW_TO_READ_THROUGHPUT = (
    "Tokens that are no padding, of all workers together; dashed: the mean from the first batch to "
    "the last. A red line is a fault."
)
HOW_TO_READ_CLASSES = (
    "A model that works spreads over the classes about as the training set did, and is sure of "
    "some rows and not of others. One bar that holds nearly all, or a single spike, is a broken "
    "model."
)
HOW_TO_READ_SCORES = (
    "A model that works gives different values to different rows; a single spike is a broken model."
)


def title(report: dict[str, Any]) -> str:
    rows, seconds = report["rows"], report["seconds"]
    return f"{rows['total']:,} rows in {_duration(seconds['total'])}"


def subtitle(report: dict[str, Any]) -> str:
    workers, model = report["workers"], report["model"]
    parts = [f"arena-runner {report['versions'].get('arena-runner', '')}".strip(), report["mode"]]
    if report["strategy"]:
        parts.append(report["strategy"])
    if workers and model:
        parts.append(f"{len(workers)} x {model['device'].split(',')[0]}")
        parts.append(model["dtype"])
        parts.append(f"attention: {model['attention']}")
    if report["quantization"]:
        parts.append(report["quantization"]["mode"])
    return ", ".join(parts)


def tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures: (value, what it is)."""
    rows, rates, tokens = report["rows"], report["rates"], report["tokens"]
    seconds, deadline = report["seconds"], report["deadline"]
    found = [(_duration(seconds["total"]), "start to end"),
             (_duration(seconds["predict"]), "of that predicting")]  # fmt: skip
    if rates["rows_per_s"]:
        found.append((f"{rates['rows_per_s']:,.1f}", "rows a second"))
        found.append((f"{rates['tokens_per_s']:,.0f}", "real tokens a second"))
    if tokens["padded"]:
        found.append((f"{1 - tokens['real'] / tokens['padded']:.1%}", "of the tokens are padding"))
    if rates["mfu"]:
        found.append((f"{rates['mfu']:.0%}", "of the matmul rate while predicting"))
    if deadline["limit_s"] is not None:
        found.append((_duration(deadline["slack_s"]), "left of the limit"))
    for key in ("resumed", "shortened", "filled"):
        if rows[key]:
            found.append((f"{rows[key]:,}", f"rows {key}"))
    deaths = report["faults"]["worker_deaths"] + report["faults"]["hangs"]
    if deaths:
        found.append((str(deaths), "workers died or hung"))
    return found


def doubts(values: np.ndarray, labels: Sequence[str], report: dict[str, Any]) -> list[str]:
    """Return what is suspect about the answers.

    Args:
        values: float64 (rows, columns), of the model itself.
    """
    found = []
    if report["config"]["preset"] is None:
        found.append(
            "The model is the demo preset: its weights are random, and its answers mean nothing."
        )
    rows = report["rows"]
    if rows["filled"] > FILLED_SHARE * rows["total"]:
        found.append(
            f"{rows['filled']:,} of {rows['total']:,} rows have no answer of the model: they got "
            "the fallback."
        )
    if len(values) < ROWS_TO_DOUBT:
        return found
    if values.std(axis=0).max() < SAME_ANSWER:
        return [
            *found,
            "Every row gets nearly the same answer. Do head, LoRA and backbone belong together?",
        ]
    if values.shape[1] < 2 or not are_shares_of_one(values):
        return found
    shares = np.bincount(values.argmax(axis=1), minlength=values.shape[1]) / len(values)
    if shares.max() >= ONE_CLASS_SHARE:
        found.append(
            f"{shares.max():.1%} of the rows get the same class, {labels[int(shares.argmax())]}. "
            "Do head, pooling and sequence length match the training?"
        )
    if values.max(axis=1).mean() < 1 / values.shape[1] + NEAR_GUESSING:
        found.append("The model is hardly surer of any row than a guess would be.")
    return found


def are_shares_of_one(values: np.ndarray) -> bool:
    """Whether each row of (rows, columns) is a distribution over the columns."""
    return bool(
        values.shape[1] > 1
        and (values >= 0).all()
        and np.allclose(values.sum(axis=1), 1.0, atol=1e-3)
    )


def how_to_read_workers(has_faults: bool, has_decisions: bool) -> str:
    said = "A row a worker, from the start of the process to its end; above them the run itself."
    if has_faults:
        said += " A red mark is a fault."
    if has_decisions:
        said += " A dotted line is a decision about the time limit."
    return said


def how_to_read_shares(
    report: dict[str, Any], parts: dict[str, float], limit_s: float | None
) -> str:
    said = "All workers' time from the start of the process to its end, in parts that sum to it."
    if limit_s is None:
        return said + " Nobody measured what the devices can do, so predicting is one part."
    rate = report["model"]["matmul_flops_per_s"] / 1e9
    return (
        f"{said} The devices multiply large matrices at {rate:,.0f} GFLOP/s each, measured in this "
        "run: at that rate the model's products alone would have taken "
        f"{parts.get(WORKING, 0):.0%} of the time."
    )


def how_to_read_forecasts(pairs: Sequence[tuple[float, float]], truth_s: float) -> str:
    first, last = pairs[0][0], pairs[-1][0]
    after = first + (last - first) / 10
    at_s, expected_s = next(pair for pair in pairs if pair[0] >= after)
    return (
        "When the run was expected to be done, by the time at which that was said; the band is "
        f"10 % around when it was. After a tenth of predicting, at {_duration(at_s)}, the forecast "
        f"was {(expected_s - truth_s) / truth_s:+.0%} off."
    )


def how_to_read_lengths(report: dict[str, Any], lengths: np.ndarray, buckets: int) -> str:
    limit = report["config"]["sequence_length"]
    said = (
        f"Rows have {int(np.median(lengths)):,} tokens in the middle and {int(lengths.max()):,} at "
        f"most; {(lengths >= limit).mean():.0%} fill the {limit:,} that rows are cut to."
    )
    if buckets:
        said += (
            " A blue line is a length that rows are padded to: what lies between a row and the "
            "next line on its right is padding."
        )
    return said


def how_to_read_memory(report: dict[str, Any]) -> str:
    said = "The most that each worker's process had resident."
    if not KINDS[report["model"]["kind"]].is_host:
        most = max(worker["weight_bytes"] for worker in report["workers"]) / 1e9
        said += f" Weights are on the devices instead, {most:,.1f} GB at most on one."
    return said


def event(found: Event, noun: str) -> str:
    return found.what if found.replica is None else f"{noun} {found.replica}: {found.what}"


def _duration(seconds: float) -> str:
    if abs(seconds) < 100:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(abs(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    said = f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
    return said if seconds >= 0 else f"-{said}"
