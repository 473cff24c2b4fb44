"""Small presets with random weights, by name; made on the spot, once for all sessions."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runner.demo import make_rows, train_tokenizer
from tests.support.stored import made_once

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL_NAMES = (
    *("gemma1", "gemma2", "thirds", "gemma3", "llama", "llama3", "mistral", "qwen", "qwen3"),
    *("sharded", "kaggle", "arena", "heavy"),
)


@dataclass(frozen=True)
class Model:
    """One model's files on disk."""

    folder: Path

    @property
    def preset(self) -> Path:
        return self.folder / "preset"

    def flags(self) -> list[str]:
        return [
            *("--preset", str(self.preset), "--lora-weights", str(self.folder / "model.lora.h5")),
            *("--head-kernel", str(self.folder / "kernel.npy")),
            *("--head-bias", str(self.folder / "bias.npy")),
        ]


class Models(dict[str, Model]):
    """The presets of make_presets.py by name, each made when it is first asked for."""

    def __init__(self, folder: Path, make: Callable[[str, Path, Path], None]) -> None:
        self._folder, self._make_preset = folder, make

    def __missing__(self, name: str) -> Model:
        with made_once(self._folder / name) as target:
            if target is not None:
                self._make(name, target)
        self[name] = Model(self._folder / name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in MODEL_NAMES

    def _make(self, name: str, target: Path) -> None:
        tokenizers = self._folder / "tokenizers"
        with made_once(tokenizers) as folder:
            if folder is not None:
                make_tokenizers(folder)
        self._make_preset(name, target, tokenizers)


def make_tokenizers(folder: Path) -> None:
    """Write gemma.spm, llama.spm, large.spm (the real one, if it is there) and byte_pairs/."""
    texts = [text for row in make_rows(60, seed=5) for text in row[1:]]
    train_tokenizer(folder / "gemma.spm", texts, vocabulary_size=600)
    train_tokenizer(folder / "llama.spm", texts, vocabulary_size=600, start="<s>", end="</s>")
    real = SHARED / "gemma_tokenizer.model"
    shutil.copy(real if real.is_file() else folder / "gemma.spm", folder / "large.spm")
    (folder / "byte_pairs").mkdir()
    train_byte_pairs(folder / "byte_pairs", texts, vocabulary_size=600)


def train_byte_pairs(folder: Path, texts: list[str], *, vocabulary_size: int) -> None:
    """Write a byte-level BPE with the special tokens of Llama 3 and Qwen after all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    special = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    ids = model["vocab"]
    for name in (*special, "im_start", "im_end", "endoftext"):
        ids[f"<|{name}|>"] = len(ids)
    (folder / "vocabulary.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
