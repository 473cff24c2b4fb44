"""Nouns shared by the stages of a run. Of ours it imports the planner's nouns alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharding.batches import Batch

# Seconds, of a few layers on a CPU; and how many times as long as reading a program from the cache
# compiling it takes: 8 on a CPU, 0.2 s and 1.6 s.
USUAL_COMPILE_S = 3.0
COMPILING_TO_READING = 8.0


@dataclass(frozen=True, slots=True)
class Examples:
    """The test set: ids as they were spelled and one tuple of cells for each text column.

    kept: columns that are copied to the output: text, JSON values or an Arrow column, as the file
    has them; the id column too, where its ids are numbers there.
    """

    ids: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    kept: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token ids of all rows end to end: row r is `values[offsets[r]:offsets[r + 1]]`.

    values: int32 (tokens,). offsets: int64 (rows + 1,). Two arrays, so that workers on one
    machine read one copy from shared memory. pad_id: the token that the model was trained with
    after a row's end, which `padded-mean` sees. end_id: the token that a row keeps at its end
    however it is cut, None where it is cut as it stands.
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
        """Return `rows` as int32 (num_rows, length), `pad_id` after each row's end, and the token
        counts as int32 (num_rows,); rows past `len(rows)` are filler of length 0.

        A row of more than `length` tokens is cut to them, as a run at that sequence length would.
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
    """What turns pooled vectors into classes, all float32.

    kernel: (hidden, classes). bias: (classes,). dense: kernel and bias of a layer before them, None
    where there is none; activation: that layer's, a key of `heads.ACTIVATIONS`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    dense: tuple[np.ndarray, np.ndarray] | None = None
    activation: str = "linear"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All a worker needs to make a replica. Paths and names only: models do not travel.

    head_kernel, head_bias: None where the preset is a classifier with a head of its own.
    quantization: what to make of a float preset while it is loaded; None where it is to stay as
    it is on disk. stored_bytes: of its weight files. head: a key of `heads.OUTPUTS`, or none:
    then there are no head files, and a row gets its pooled states, `classes` numbers. is_int8:
    whether the weights are int8 in the end, on disk or made so.
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
    is_int8: bool = False
    head: str = "softmax"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself once it is loaded.

    `rss_after_imports_bytes` is its resident memory before the first weight; `attention` a key of
    `attention.WAYS`; `notes` are sentences for the person.
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
    """How long one shape took, and whether its program was read from the cache on disk."""

    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What one worker spent on one batch, and what it handed on to the next stage.

    ended_at: `time.time()` on the worker's machine, 0 where nobody looked.
    """

    seconds: float
    peak_rss_bytes: int
    sent_bytes: int = 0
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Probabilities of one batch: float32 (len(batch.rows), classes), in the order of its rows.

    work: one entry for each worker that had a part in it, in the order of the group's members.
    """

    batch: Batch
    replica: int
    probabilities: np.ndarray
    work: tuple[Work, ...]

    @property
    def finite(self) -> np.ndarray:
        """Which rows came out as numbers: bool (len(batch.rows),)."""
        is_finite: np.ndarray = np.isfinite(self.probabilities).all(axis=1)
        return is_finite

    def rows_where(self, chosen: np.ndarray) -> list[int]:
        """Return the batch's rows that a mask, bool (len(batch.rows),), chooses."""
        return [row for row, is_one in zip(self.batch.rows, chosen, strict=True) if is_one]


@dataclass(frozen=True, slots=True)
class Activations:
    """What travels from one pipeline stage to the next.

    hidden: (rows, length, hidden_dim) in the model's dtype. lengths: int32 (rows,).
    """

    hidden: np.ndarray
    lengths: np.ndarray
    work: tuple[Work, ...]


@dataclass(slots=True)
class WorkerStats:
    """One line of the report's `workers`. node: its machine's name in a cluster, else empty."""

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
    # Of that, reading programs from the cache on disk.
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
        """Add a shape that is ready."""
        self.compile_s += info.seconds
        self.cached_s += info.seconds if info.cached else 0.0
        self.cached_shapes += info.cached
        self.compiled_shapes += not info.cached

    def introduce(self, info: WorkerInfo) -> None:
        """Take over what a worker said of itself."""
        self.device = info.device
        self.weight_bytes = info.weight_bytes
        self.rss_after_imports_bytes = info.rss_after_imports_bytes
        self.load_s = info.load_s


def seconds_to_compile(workers: list[WorkerStats], *, is_new: bool, replicas: int = 1) -> float:
    """Return the seconds that a shape takes on each replica until there is a program, a guess
    where none was made: one replica compiles it, the others read it from the cache on disk.

    Args:
        is_new: whether no earlier run can have left it there; else it is as those before.
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
    """What went wrong and was survived; the report's `faults`."""

    worker_deaths: int = 0
    hangs: int = 0
    memory_splits: int = 0
    retried_batches: int = 0
    nonfinite_rows: int = 0
    quarantined_rows: int = 0


@dataclass(slots=True)
class Tally:
    """What was counted while answers came.

    answered: rows that came out well. broken: rows that came out as NaN or infinity. lengths: of
    the rows of each batch, the tokens that were computed. journal_s: seconds of keeping answers.
    forecasts: seconds since the start, and the total seconds that were forecast then.
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
        """Tokens of the rows that were answered: int64 (rows,)."""
        return np.concatenate(self.lengths or [np.zeros(0, dtype=np.int64)])
