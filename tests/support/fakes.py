"""A runner whose model is arithmetic on token ids, in a process that outlives what it is fed.

`python -m tests.support.fakes` is that process: it calls `runner.cli.main` for each line it reads.
Native code (HDF5, Arrow, SentencePiece) may crash or hang on a damaged file: then the process is
gone, the caller hears of it, and the next case gets a new one.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.common.records import BatchResult, CompileInfo, ModelSpec, TokenTable, Work, WorkerInfo
from runner.model.process import prepare_process
from sharding.batches import Batch, BatchShape
from sharding.topology import WorkerSlot

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
# What a file claims and does not hold must not be allocated.
MOST_ADDRESS_BYTES = 16 << 30
STARTS_WITHIN_S = 120


def answer(ids: Sequence[int]) -> np.ndarray:
    """Return the fake model's probabilities for one row's tokens, float64 (classes,).

    Depends on every token and its place, so a lost, repeated or swapped one shows.
    """
    places = np.arange(1, len(ids) + 1)
    ids = np.asarray(ids, dtype=np.int64)
    sums = [int((places * (ids + 7 * label) ** 2).sum()) for label in range(CLASSES)]
    shares = [1 + total % 1009 for total in sums]
    return np.array(shares) / sum(shares)


class FakeReplica:
    """`runner.model.worker.Replica` without JAX: `answer` of each row.

    Args:
        reads_weights: `load` builds and fills the backbone first, as the real one does.
    """

    def __init__(
        self, slot: WorkerSlot, *, verbose: bool = False, reads_weights: bool = False
    ) -> None:
        prepare_process(slot, verbose=verbose)
        self._reads_weights = reads_weights

    def find_device(self, dtype: str, compilation_cache: str | None) -> tuple[str, str]:
        return "cpu", "float32" if dtype == "auto" else dtype

    def load(self, spec: ModelSpec) -> WorkerInfo:
        if self._reads_weights:
            from runner.model.loading import load_backbone

            load_backbone(
                spec.preset, spec.lora_weights, dtype="float32", quantization=spec.quantization
            )
        return WorkerInfo("cpu", "fake", "float32", 0, 0, 0.0, 1e9, "fake")

    def hold_tokens(self, tokens: TokenTable) -> None:
        self._tokens = tokens

    def compile(self, shape: BatchShape) -> CompileInfo:
        return CompileInfo(0.0, True)

    def predict(self, batch: Batch) -> BatchResult:
        probabilities = self._answers(batch).astype(np.float32)
        return BatchResult(batch, 0, probabilities, (Work(0.0, 0),))

    def predict_in_float(self, spec: ModelSpec, batch: Batch) -> np.ndarray:
        return self._answers(batch)

    def _answers(self, batch: Batch) -> np.ndarray:
        tokens, lengths = self._tokens.batch_arrays(
            batch.rows, batch.shape.rows, batch.shape.length
        )
        rows = [answer(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        return np.stack(rows)[: len(batch.rows)]


def write_fake_job(folder: Path, rows: int = 40) -> dict[str, Path]:
    """Write a preset whose weights `FakeReplica` never reads, a head and a test set.

    Returns: the settings of a run that name them.
    """
    import h5py

    from runner.demo import make_rows, train_tokenizer, write_test_set

    preset, assets = folder / "preset", folder / "preset" / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    test_set = make_rows(rows, seed=3)
    texts = [text for row in make_rows(60, seed=5) for text in row[1:]]
    train_tokenizer(assets / "vocabulary.spm", texts, vocabulary_size=600)
    sizes = {"vocabulary_size": 600, "num_layers": 1, "num_query_heads": 2, "head_dim": 8,
             "num_key_value_heads": 1, "hidden_dim": 16, "intermediate_dim": 32}  # fmt: skip
    module = "keras_hub.src.models.gemma.gemma_backbone"
    config = {"module": module, "class_name": "GemmaBackbone", "config": sizes}
    (preset / "config.json").write_text(json.dumps(config))
    (preset / "tokenizer.json").write_text(json.dumps({"class_name": "GemmaTokenizer"}))
    with h5py.File(preset / "model.weights.h5", "w") as file:
        file["nothing"] = np.zeros(40_000, np.float32)
    np.save(folder / "kernel.npy", np.zeros((16, 3), np.float32))
    np.save(folder / "bias.npy", np.zeros(3, np.float32))
    write_test_set(folder / "test.csv", test_set)
    return {
        "preset": preset,
        "head_kernel": folder / "kernel.npy",
        "head_bias": folder / "bias.npy",
        "input": folder / "test.csv",
    }


@dataclass(frozen=True)
class Ended:
    """How one command line ended. code: None where the process died or hung; stderr says how."""

    code: int | None
    stderr: str
    seconds: float


class FakeRunner:
    """Runs command lines with `FakeReplica`, one after the other, in one process."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder, self._env = folder, env
        self._process: subprocess.Popen | None = None

    def run(self, argv: Sequence[str], *, reads_weights: bool, limit_s: float) -> Ended:
        """Run `main(argv)`; end the process if it takes longer than `limit_s`."""
        started = time.monotonic()
        if self._process is None:
            self._start()
            limit_s += STARTS_WITHIN_S
        self._process.stdin.write(json.dumps([list(argv), reads_weights]) + "\n")
        self._process.stdin.flush()
        is_there, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if is_there else ""
        seconds = time.monotonic() - started
        if not line:
            how = "it died" if is_there else f"it hung: no end after {limit_s:.0f} s"
            if not is_there:
                self._process.kill()
            return Ended(None, f"{how}; exit status {self.close()}", seconds)
        return Ended(*json.loads(line), seconds)

    def close(self) -> int | None:
        """End the process and return its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.stdin.close()
        status = process.wait(timeout=60)
        process.stdout.close()
        return status

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fakes"],
            cwd=self._folder,
            env=self._env | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def serve() -> None:
    """Answer each line `[argv, reads_weights]` with a line `[exit code, stderr]`."""
    import functools
    import resource

    import runner.executors.single
    from runner.cli import main

    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESS_BYTES, MOST_ADDRESS_BYTES))
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    for line in sys.stdin:
        argv, reads_weights = json.loads(line)
        runner.executors.single.Replica = functools.partial(
            FakeReplica, reads_weights=reads_weights
        )
        # By file descriptor: native code writes there past sys.stderr.
        with tempfile.TemporaryFile() as errors:
            os.dup2(errors.fileno(), 2)
            code = main(argv)
            sys.stderr.flush()
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        print(json.dumps([code, said]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
