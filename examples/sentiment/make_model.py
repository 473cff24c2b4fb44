"""python examples/sentiment/make_model.py: a preset and a head of two classes, random weights.

They stand in for your own model: the same files as in a real job.
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from runner.demo import BACKBONE, make_rows, save_model, train_tokenizer  # noqa: E402
from runner.model.process import prepare_process  # noqa: E402
from sharding.topology import WorkerSlot  # noqa: E402

VOCABULARY_SIZE = 600


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(HERE / "reviews.csv", encoding="utf-8", newline="") as file:
        texts = [f"{row['title']}\n{row['body']}" for row in csv.DictReader(file)]
    # A few reviews are too little text for so many tokens.
    texts += [cell for row in make_rows(60, seed=1) for cell in row[1:]]
    vocabulary = folder / "vocabulary.spm"
    train_tokenizer(vocabulary, texts, VOCABULARY_SIZE)
    prepare_process(WorkerSlot(0, "cpu"), verbose=False)
    backbone = BACKBONE | {"vocabulary_size": VOCABULARY_SIZE, "num_layers": 2}
    save_model(folder, vocabulary, backbone, seed=1, classes=2)
    vocabulary.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE / "model")
