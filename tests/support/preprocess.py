"""python preprocess.py PRESET TEXTS.json LENGTH OUT.npz: tokens by the preset's preprocessor."""

import json
import sys

import keras_hub
import numpy as np

preset, texts, length, out = sys.argv[1:]
preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(
    preset, sequence_length=int(length)
)
with open(texts, encoding="utf-8") as file:
    inputs = json.load(file)
if isinstance(preprocessor, keras_hub.models.Gemma3CausalLMPreprocessor):
    inputs = {"prompts": inputs, "responses": [""] * len(inputs)}
batch = preprocessor(inputs)[0]
np.savez(out, **{name: np.asarray(array) for name, array in batch.items()})
