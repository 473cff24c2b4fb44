"""python reference.py MODEL_DIR TEST.csv LENGTH OUT.npz: the answers by a plain Keras loop.

Written like the notebook's: an eager call, every row padded to the full length, LoRA not merged,
the preset's own preprocessor (through TensorFlow Text where that is installed). Shares no code with
the runner, and is run as a process of its own.
"""

import csv
import json
import re
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np


def main(folder: Path, test_set: Path, length: int, out: Path) -> None:
    preset = str(folder / "preset")
    backbone = keras_hub.models.Backbone.from_preset(preset, dtype="float32")
    backbone.load_lora_weights(str(folder / "model.lora.h5"))
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(preset, sequence_length=length)
    head = keras.layers.Dense(3, activation="softmax")
    head.build((None, backbone.output.shape[-1]))
    head.set_weights([np.load(folder / "kernel.npy"), np.load(folder / "bias.npy")])
    average = keras.layers.GlobalAveragePooling1D()

    csv.field_size_limit(sys.maxsize)
    with open(test_set, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    answers: dict[str, np.ndarray] = {}
    lengths = np.zeros(0)
    for text_format in ("raw", "turns"):
        texts = []
        for row in rows:
            cells = [row["prompt"], row["response_a"], row["response_b"]]
            if text_format == "turns":
                cells = ["\n".join(turn or "" for turn in json.loads(cell)) for cell in cells]
            text = "\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(cells)
            texts.append(re.sub(r"[\ud800-\udfff]", "", text))
        if isinstance(preprocessor, keras_hub.models.Gemma3CausalLMPreprocessor):
            batch = preprocessor({"prompts": texts, "responses": [""] * len(texts)})[0]
        else:
            batch = preprocessor(texts)[0]
        hidden = backbone(batch)
        mask = keras.ops.convert_to_numpy(batch["padding_mask"])
        counts = mask.sum(axis=1)
        if text_format == "raw":
            lengths = counts
        pooled = {
            "padded-mean": average(hidden),
            "mean": average(hidden, mask=mask),
            "last": keras.ops.convert_to_numpy(hidden)[np.arange(len(rows)), counts - 1],
        }
        for pooling, vectors in pooled.items():
            answers[f"{text_format} {pooling}"] = keras.ops.convert_to_numpy(head(vectors))
            answers[f"{text_format} {pooling} states"] = keras.ops.convert_to_numpy(vectors)
    np.savez(out, lengths=lengths, **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
