"""A made-up run for the page and the trace: two pipelines of two members, one of which dies."""

from typing import Any

import numpy as np

from runner.report.page import Story
from runner.telemetry.timeline import (
    COMPILING,
    LOADING,
    LOST,
    PREDICTING,
    STARTING,
    Event,
    Phase,
    Span,
)
from sharding.batches import Batch, BatchShape

ROWS, LIMIT = 240, 128
LABELS = ("winner_model_a", "winner_model_b", "winner_tie")


def make_story(**changes: Any) -> Story:
    """Return the story of 240 rows in 60 s; changes replace its parts, of `report` its keys."""
    rng = np.random.default_rng(7)
    lengths = np.sort(rng.integers(20, LIMIT + 1, ROWS))[::-1].astype(np.int64)
    report = make_report() | changes.pop("report", {})
    values = rng.dirichlet((4, 3, 1.5), ROWS)
    found = {
        "report": report,
        "spans": make_spans(),
        "phases": [Phase("reading", 0.5, 1.5), Phase("tokenizing", 2, 4), Phase("merging", 58, 59)],
        "events": [Event(30.0, "its worker died; it is started again", 1)],
        "lengths": lengths,
        "values": values[:-2],
        "every": 1,
        "labels": LABELS,
        "summary": ["1 worker died; the run went on."],
    }
    return Story(**found | changes)


def make_spans() -> list[Span]:
    """60 s of two groups: group 1 dies at 30 s, loads again, and loses a batch."""
    spans, shapes = [], [BatchShape(8, 128), BatchShape(12, 64)]
    for replica in (0, 1):
        for member in (0, 1):
            who = (replica, member)
            spans += [
                Span(STARTING, *who, 4.0, 8.0),
                Span(LOADING, *who, 8.0, 12.0 + member),
                Span(COMPILING, *who, 13.0, 15.0, shape=shapes[0]),
                Span(COMPILING, *who, 16.0, 19.0, shape=shapes[1], is_cached=True),
            ]
    row, clocks = 0, [15.0, 15.0]
    for index in range(24):
        replica, shape = index % 2, shapes[index // 16]
        batch = Batch(index, tuple(range(row, row + 10)), shape)
        row += 10
        if index == 11:
            spans += [Span(LOST, 1, member, 28.4, 30.0, batch=batch) for member in (0, 1)]
            for member in (0, 1):
                spans.append(Span(STARTING, 1, member, 30.0, 33.0))
                spans.append(Span(LOADING, 1, member, 33.0, 37.0))
                spans.append(Span(COMPILING, 1, member, 37.0, 37.5, shape=shape, is_cached=True))
            clocks[1] = 37.5
        start = clocks[replica]
        spans.append(Span(PREDICTING, replica, 0, start, start + 2.5, batch=batch))
        spans.append(Span(PREDICTING, replica, 1, start + 1.5, start + 3.0, batch=batch))
        clocks[replica] = start + 2.6
    return spans


def make_report() -> dict[str, Any]:
    workers = [
        {
            "replica": replica,
            "member": member,
            "device": f"cpu, cores {replica}",
            "rows": 120,
            "batches": 12,
            "busy_s": 30.0,
            "idle_s": 10.0,
            "restarts": replica,
            "peak_rss_bytes": 9e8 + 1e8 * member,
            "rss_after_imports_bytes": 4e8,
            "weight_bytes": 2e8,
            "load_s": 4.0,
            "compile_s": 5.0,
            "cached_s": 3.0,
            "sent_bytes": 10**6,
            "compiled_shapes": 1,
            "cached_shapes": 1,
        }
        for replica in (0, 1)
        for member in (0, 1)
    ]
    return {
        "schema": 1,
        "config": {"preset": "models/gemma", "sequence_length": LIMIT, "pooling": "mean"},
        "versions": {"arena-runner": "0.1.0", "jax": "0.10.2"},
        "mode": "model-parallel",
        "strategy": "pipeline",
        "rows": {"total": ROWS, "predicted": 238, "resumed": 0, "shortened": 0, "filled": 2},
        "tokens": {"real": 17_000, "padded": 20_000},
        "seconds": {"total": 60.0, "read": 1.0, "predict": 40.0, "merge": 1.0},
        "rates": {
            "rows_per_s": 6.0,
            "tokens_per_s": 425.0,
            "model_flops_per_s": 4e10,
            "mfu": 0.1,
        },
        "workers": workers,
        "faults": {
            "worker_deaths": 1,
            "hangs": 0,
            "memory_splits": 0,
            "retried_batches": 1,
            "nonfinite_rows": 0,
            "quarantined_rows": 0,
        },
        "deadline": {
            "limit_s": 75.0,
            "finished_s": 59.0,
            "slack_s": 16.0,
            "events": [{"at_s": 40.0, "what": "50 s of work are left for 30 s of time: cut"}],
        },
        "forecasts": [[16.0, 40.0], [20.0, 52.0], [30.0, 66.0], [40.0, 60.0], [50.0, 59.5]],
        "extra_passes": None,
        "model": {
            "kind": "cpu",
            "device": "cpu, cores 0",
            "dtype": "float32",
            "matmul_flops_per_s": 1e11,
            "attention": "chunked",
        },
        "quantization": None,
        "plan": {"shapes": [{"rows": 8, "length": 128}, {"rows": 12, "length": 64}]},
        "group": {"idle_share": 0.2},
    }
