"""python list_weights.py OUT.json: config and weights of a tiny backbone of each family.

A process of its own, so that the test process need not start Keras.
"""

import json
import sys
from pathlib import Path

import keras_hub

COMMON = {
    "vocabulary_size": 60,
    "num_layers": 2,
    "num_query_heads": 6,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 96,
}
NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
CONFIGS = {
    "Gemma": COMMON | NORMS | {"head_dim": 8},
    "Gemma3": COMMON | NORMS | {"head_dim": 8, "image_size": None},
    "Llama": COMMON,
    "Llama3": COMMON,
    "Mistral": COMMON,
    "Qwen": COMMON | {"tie_word_embeddings": True},
    "Qwen3": COMMON | {"head_dim": 8},
}

if __name__ == "__main__":
    families = {}
    for name, config in CONFIGS.items():
        backbone = getattr(keras_hub.models, f"{name}Backbone")(**config)
        families[f"{name}Backbone"] = {
            "config": config,
            "weights": [(weight.path, weight.shape) for weight in backbone.weights],
        }
    Path(sys.argv[1]).write_text(json.dumps(families))
