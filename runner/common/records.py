"""The records that rooms pass to each other, and the estimate of compile time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharding.batches import Batch

# Seconds to compile a few layers on a CPU; and the ratio of that to reading the program from the
# cache (measured on a CPU: 1.6 s and 0.2 s).
USUAL_COMPILE_S = 3.0
COMPILING_TO_READING = 8.0


@dataclass(frozen=True, slots=True)
class Examples:
    """The test set: ids as the file spells them, and a tuple of cells for each text column.

    kept: columns to copy to the output, as stored in the file: text, JSON values or an Arrow
    column. They include the id column if its ids are numbers.
    """

    ids: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    kept: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token ids of all rows end to end: row r is `values[offsets[r]:offsets[r + 1]]`.

    values: int32 (tokens,). offsets: int64 (rows + 1,). Two flat arrays, so that workers on one
    machine read one copy from shared memory. pad_id: the padding token that the model was trained
    with; `padded-mean` sees it. end_id: the token that ends a truncated row; None keeps its own.
    """

    values: np.ndarray
    offsets: np.ndarray
    pad_id: int = 0
    end_id: int | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row: int64 (rows,)."""
        return np.diff(self.offsets)

    def batch_arrays(
        self, rows: tuple[int, ...], num_rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of `rows`, int32 (num_rows, length), padded with `pad_id`, and their
        token counts, int32 (num_rows,). Rows past `len(rows)` are filler of length 0.

        Rows of more than `length` tokens are truncated, as in a run with that sequence length.
        """
        starts = self.offsets[list(rows)]
        whole = self.offsets[np.add(rows, 1)] - starts
        counts = np.minimum(whole, length)
        tokens = np.full((num_rows, length), self.pad_id, dtype=np.int32)
        lengths = np.zeros(num_rows, dtype=np.int32)
        lengths[: len(rows)] = counts
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        real = np.arange(length) < lengths[:, None]
        tokens[real] = self.values[np.repeat(starts, counts) + within]
        if self.end_id is not None:
            tokens[: len(rows)][whole > length, -1] = self.end_id
        return tokens, lengths


@dataclass(frozen=True, slots=True)
class Head:
    """The weights that turn pooled vectors into classes, all float32.

    kernel: (hidden, classes). bias: (classes,). dense: kernel (hidden, hidden) and bias (hidden,)
    of a layer before them, if there is one. activation: that layer's, a key of
    `program.ACTIVATIONS`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    dense: tuple[np.ndarray, np.ndarray] | None = None
    activation: str = "linear"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a worker needs to load a replica: paths and names only, since models do not travel.

    head_kernel, head_bias: None if the preset is a classifier with a head of its own.
    quantization: how to quantize a float preset while it is loaded; None loads it as stored.
    stored_bytes: size of its weight files. head: a key of `program.OUTPUTS`; or "none", without
    head files: the answer to a row is its pooled hidden state, `classes` numbers.
    """

    preset: str
    lora_weights: str | None
    head_kernel: str | None
    head_bias: str | None
    classes: int
    pooling: str
    dtype: str
    quantization: str | None
    compilation_cache: str | None
    stored_bytes: int = 0
    head: str = "softmax"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker reports once it has loaded its model.

    rss_after_imports_bytes: peak resident memory before the first weight is loaded. attention: a
    key of `attention.WAYS`. notes: sentences for the user.
    """

    kind: str
    device: str
    dtype: str
    weight_bytes: int
    rss_after_imports_bytes: int
    load_s: float
    matmul_flops_per_s: float
    attention: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompileInfo:
    """How long it took to compile one shape, or to read its program from the cache on disk."""

    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What one worker spent on one batch, and how much it sent to the next stage.

    ended_at: `time.time()` on the worker's machine; 0 if it was not recorded.
    """

    seconds: float
    peak_rss_bytes: int
    sent_bytes: int = 0
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Probabilities of one batch: float32 (len(batch.rows), classes), in the order of its rows.

    work: one entry for each worker that took part, in the order of the group's members.
    """

    batch: Batch
    replica: int
    probabilities: np.ndarray
    work: tuple[Work, ...]

    @property
    def finite(self) -> np.ndarray:
        """Which rows are finite: bool (len(batch.rows),)."""
        is_finite: np.ndarray = np.isfinite(self.probabilities).all(axis=1)
        return is_finite

    def rows_where(self, chosen: np.ndarray) -> list[int]:
        """Return the batch's rows that a mask selects, bool (len(batch.rows),)."""
        return [row for row, is_one in zip(self.batch.rows, chosen, strict=True) if is_one]


@dataclass(frozen=True, slots=True)
class Activations:
    """What one pipeline stage sends to the next.

    hidden: (rows, length, hidden_dim) in the model's dtype. lengths: int32 (rows,), real tokens.
    """

    hidden: np.ndarray
    lengths: np.ndarray
    work: tuple[Work, ...]


@dataclass(slots=True)
class WorkerStats:
    """One entry of the report's `workers`.

    node: the name of its machine in a cluster, else empty. cached_s: the part of compile_s spent on
    reading programs from the cache on disk.
    """

    replica: int
    member: int = 0
    device: str = ""
    node: str = ""
    rows: int = 0
    batches: int = 0
    busy_s: float = 0.0
    idle_s: float = 0.0
    peak_rss_bytes: int = 0
    restarts: int = 0
    sent_bytes: int = 0
    weight_bytes: int = 0
    rss_after_imports_bytes: int = 0
    load_s: float = 0.0
    compile_s: float = 0.0
    cached_s: float = 0.0
    compiled_shapes: int = 0
    cached_shapes: int = 0

    def count(self, rows: int, work: Work) -> None:
        """Add a finished batch."""
        self.rows += rows
        self.batches += 1
        self.busy_s += work.seconds
        self.sent_bytes += work.sent_bytes
        self.peak_rss_bytes = max(self.peak_rss_bytes, work.peak_rss_bytes)

    def count_compiled(self, info: CompileInfo) -> None:
        """Add a compiled shape."""
        self.compile_s += info.seconds
        self.cached_s += info.seconds if info.cached else 0.0
        self.cached_shapes += info.cached
        self.compiled_shapes += not info.cached

    def introduce(self, info: WorkerInfo) -> None:
        """Copy what a worker reported after loading."""
        self.device = info.device
        self.weight_bytes = info.weight_bytes
        self.rss_after_imports_bytes = info.rss_after_imports_bytes
        self.load_s = info.load_s


def seconds_to_compile(workers: list[WorkerStats], *, is_new: bool, replicas: int = 1) -> float:
    """Estimate the mean seconds a replica takes to get the program for one more shape.

    One replica compiles it; the others read it from the cache on disk. Without measurements, a
    compile counts as `USUAL_COMPILE_S`.

    Args:
        is_new: whether no earlier run can have cached it; if not, it is like the shapes so far.
    """
    read = sum(worker.cached_shapes for worker in workers)
    compiled = sum(worker.compiled_shapes for worker in workers)
    reading_s = sum(worker.cached_s for worker in workers) / read if read else None
    compiling_s = USUAL_COMPILE_S if reading_s is None else COMPILING_TO_READING * reading_s
    if compiled:
        compiling_s = sum(one.compile_s - one.cached_s for one in workers) / compiled
    if is_new:
        return compiling_s
    if reading_s is None:
        reading_s = compiling_s / COMPILING_TO_READING
    elif not compiled:
        return reading_s
    return (compiling_s + (replicas - 1) * reading_s) / replicas


@dataclass(slots=True)
class Faults:
    """Counts of faults that the run recovered from; the report's `faults`."""

    worker_deaths: int = 0
    hangs: int = 0
    memory_splits: int = 0
    retried_batches: int = 0
    nonfinite_rows: int = 0
    quarantined_rows: int = 0


@dataclass(slots=True, kw_only=True)
class Computed:
    """What an executor has done so far; it changes while the executor works.

    info: from a worker that has loaded; None before. stats: one per worker.
    copied_batches: batches that two replicas computed. start_workers_s: until the last process was
    up. predict_s: from the time when the first replica was ready to the last answer.
    """

    info: WorkerInfo | None = None
    stats: list[WorkerStats] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    copied_batches: int = 0
    start_workers_s: float = 0.0
    predict_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Counts over the answers so far.

    answered: number of rows with a finite answer. broken: rows whose answer is NaN or infinite.
    lengths: for each batch, the tokens computed per row, int64 (rows,). journal_s: seconds spent on
    saving answers. forecasts: pairs (seconds since the start, total seconds forecast then).
    """

    answered: int = 0
    broken: list[int] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    real_tokens: int = 0
    padded_tokens: int = 0
    journal_s: float = 0.0
    forecasts: list[tuple[float, float]] = field(default_factory=list)

    @property
    def lengths_done(self) -> np.ndarray:
        """Tokens of the answered rows: int64 (rows,)."""
        return np.concatenate(self.lengths or [np.zeros(0, dtype=np.int64)])
