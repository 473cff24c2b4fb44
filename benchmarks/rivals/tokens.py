"""python tokens.py PRESET TEST.csv LENGTH OUT.npz: token ids for all rivals, by KerasHub's own
preprocessor, as the notebook makes them."""

import sys

import keras_hub
import numpy as np
import pandas as pd


def main(preset: str, test_set: str, length: int, out: str) -> None:
    preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(preset, sequence_length=length)
    table = pd.read_csv(test_set, dtype=str, keep_default_na=False)
    cells = table[["prompt", "response_a", "response_b"]].to_numpy()
    texts = ["\n\nPROMPT\n\n" + "\n\nRESPONSE:\n\n".join(row) for row in cells]
    inputs = preprocessor(texts)[0]
    tokens, mask = (np.asarray(inputs[name]) for name in ("token_ids", "padding_mask"))
    np.savez(out, tokens=tokens.astype(np.int32), lengths=mask.sum(axis=1).astype(np.int32))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
