"""A seed -> the demo: a small Gemma 2 preset with random weights, and an arena-like test set.

Made on first use and kept in the cache folder. The driver makes texts and tokenizer; the preset
needs Keras, so another process saves it (`python -m runner.demo DIR`).
"""

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.background import python_environment
from runner.common.errors import ConfigError, WorkerError
from runner.common.files import cache_folder, whole_folder
from runner.config.run_config import RunConfig
from runner.telemetry.progress import Progress

# Increase it when anything below changes, so that an old demo in the cache is not used.
VERSION = 1
ROWS = 600
SEED = 20240711
VOCABULARY_SIZE = 2048
LORA_RANK = 4
CLASSES = 3
BACKBONE = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 256,
    "intermediate_dim": 2048,  # two gated projections of 1,024
    "head_dim": 64,
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4096,
}


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The demo's files, named like those of a real run."""

    folder: Path

    @property
    def test_set(self) -> Path:
        return self.folder / "test.csv"

    @property
    def model_files(self) -> dict[str, Path]:
        return {
            "preset": self.folder / "preset",
            "lora_weights": self.folder / "model.lora.h5",
            "head_kernel": self.folder / "head_kernel.npy",
            "head_bias": self.folder / "head_bias.npy",
        }


def stand_in(config: RunConfig, progress: Progress) -> dict[str, Path]:
    """Return field name -> demo file for what a config leaves out: model, test set or both.

    Raises:
        ConfigError, WorkerError: as `ensure_demo`.
    """
    if config.preset is not None and config.input is not None:
        return {}
    demo = ensure_demo(cache_folder(), progress)
    model = demo.model_files if config.preset is None else {}
    return model | ({"input": demo.test_set} if config.input is None else {})


def ensure_demo(cache: Path, progress: Progress) -> DemoFiles:
    """Return the demo's files under a cache folder; make them on first use.

    Raises:
        ConfigError: the cache folder is not writable.
        WorkerError: the process that saves the preset failed.
    """
    folder = cache / f"demo-{VERSION}"
    try:
        if not folder.is_dir():
            with whole_folder(folder) as made:
                _make(made, progress)
    except OSError as error:
        if not folder.is_dir():  # else another run was faster
            raise ConfigError(
                f"The demo is kept in {cache}, which is not writable ({error.strerror}). "
                "Set XDG_CACHE_HOME to another folder, or pass --preset and --input."
            ) from None
    return DemoFiles(folder)


def _make(folder: Path, progress: Progress) -> None:
    progress.phase("making the demo test set and training its tokenizer (first use)")
    rows = make_rows(ROWS, SEED)
    write_test_set(folder / "test.csv", rows)
    vocabulary = folder / "vocabulary.spm"
    train_tokenizer(vocabulary, [text for row in rows for text in row[1:]])
    progress.phase("saving the demo preset, a small Gemma 2 with random weights (first use)")
    done = subprocess.run(
        [sys.executable, "-m", "runner.demo", str(folder)],
        env=python_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        raise WorkerError(f"The demo preset could not be made: {last_line}")
    vocabulary.unlink()


def make_rows(count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Return rows (id, prompt, response_a, response_b), each text a JSON list of turns.

    They resemble the arena's: Zipf word frequencies; log-normal lengths (a median near 300 words
    per row, a long tail); some rows with two turns, a null turn, code or other scripts.
    """
    rng = random.Random(seed)
    words = _make_words(rng, 3000)
    weights = [1 / (rank + 2) for rank in range(len(words))]
    ids = rng.sample(range(10_000, 2**32), count)
    rows = []
    for row_id in ids:
        turns = 2 if rng.random() < 0.15 else 1
        cells = []
        for median in (25, 130, 130):
            texts: list[str | None] = [
                _make_text(rng, words, weights, median / turns) for _ in range(turns)
            ]
            if rng.random() < 0.01:
                texts[-1] = None
            cells.append(json.dumps(texts).replace("/", "\\/"))
        rows.append((str(row_id), *cells))
    return rows  # type: ignore[return-value]


def write_test_set(path: Path, rows: list[tuple[str, str, str, str]]) -> None:
    """Write rows as the contest's test.csv."""
    import pandas as pd

    columns = ["id", "prompt", "response_a", "response_b"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)


def train_tokenizer(
    path: Path,
    texts: list[str],
    vocabulary_size: int = VOCABULARY_SIZE,
    *,
    start: str = "<bos>",
    end: str = "<eos>",
) -> None:
    """Train a SentencePiece model on texts and write it: byte fallback, Gemma's ids for special
    tokens."""
    import sentencepiece

    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocabulary_size,
            model_type="bpe",
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece=end,
            bos_piece=start,
            unk_piece="<unk>",
            max_sentence_length=100_000,
            minloglevel=2,
        )


def save_model(
    folder: Path, vocabulary: Path, backbone: dict[str, Any], seed: int, classes: int = CLASSES
) -> None:
    """Save a random Gemma preset, a LoRA file and a head in the formats of real ones.

    The LoRA update and the head are large enough to give every row different probabilities.
    """
    import keras
    import keras_hub
    import numpy as np

    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = keras_hub.models.GemmaBackbone(**backbone)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
        keras_hub.models.GemmaTokenizer(vocabulary.read_bytes()), sequence_length=512
    )
    model.save_to_preset(str(folder / "preset"))
    preprocessor.save_to_preset(str(folder / "preset"))
    model.enable_lora(LORA_RANK)
    for variable in model.trainable_variables:
        scale = 0.3 / math.sqrt(variable.shape[-2])
        variable.assign(rng.normal(0, scale, variable.shape).astype(np.float32))
    model.save_lora_weights(str(folder / "model.lora.h5"))
    hidden = backbone["hidden_dim"]
    np.save(folder / "head_kernel.npy", rng.normal(0, 0.2, (hidden, classes)).astype(np.float32))
    np.save(folder / "head_bias.npy", rng.normal(0, 0.1, classes).astype(np.float32))


def _make_words(rng: random.Random, count: int) -> list[str]:
    consonants = [*"bcdfghlmnprstvw", "st", "tr", "ch"]
    syllables = [consonant + vowel for consonant in consonants for vowel in "aeiou"]
    words = {"".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(count)}
    return sorted(words, key=lambda word: (len(word), word))


def _make_text(rng: random.Random, words: list[str], weights: list[float], median: float) -> str:
    count = max(1, min(2000, round(rng.lognormvariate(math.log(median), 0.9))))
    chosen = rng.choices(words, weights, k=count)
    for position in range(rng.randrange(4, 12), count, 11):
        chosen[position] += rng.choice((".", ",", "?", ":\n\n- ", ".\n"))
    kind = rng.random()
    if kind < 0.05:
        chosen.append("```python\ndef f(x):\n    return x / 2\n```")
    elif kind < 0.10:
        chosen += rng.choice(
            ("これはテストです。", "Как это работает?", "¿Qué es esto? 🙂")
        ).split()
    return " ".join(chosen)


if __name__ == "__main__":
    from runner.model.process import prepare_process
    from sharding.topology import WorkerSlot

    prepare_process(WorkerSlot(0, "cpu"), verbose=False)
    target = Path(sys.argv[1])
    save_model(target, target / "vocabulary.spm", BACKBONE, SEED)
