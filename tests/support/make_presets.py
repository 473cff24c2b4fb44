"""python make_presets.py NAME DIR TOKENIZERS_DIR: a small random preset in real files.

A process of its own, so that the test process need not start Keras. Written with KerasHub alone.
TOKENIZERS_DIR holds gemma.spm, llama.spm, large.spm and byte_pairs/.
"""

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np

GEMMA_1 = {
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 48,
    "intermediate_dim": 192,
    "head_dim": 16,
}
GEMMA_2 = GEMMA_1 | {
    "num_key_value_heads": 2,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 24,
}
# Every dim that is split divides by three.
THIRDS = GEMMA_2 | {"num_query_heads": 6, "num_key_value_heads": 3}
HEAVY = GEMMA_2 | {
    "num_layers": 20,
    "num_query_heads": 16,
    "num_key_value_heads": 8,
    "hidden_dim": 1024,
    "intermediate_dim": 8192,
    "head_dim": 64,
}
LLAMA = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 48,
    "intermediate_dim": 96,
}
# The sixth layer is the first that sees past its window.
GEMMA_3 = GEMMA_1 | {
    "num_layers": 6,
    "intermediate_dim": 96,
    "num_key_value_heads": 2,
    "image_size": None,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 24,
}
MODELS = keras_hub.models
FAMILIES = {
    "gemma1": ("Gemma", GEMMA_1),
    "gemma2": ("Gemma", GEMMA_2),
    "thirds": ("Gemma", THIRDS),
    "gemma3": ("Gemma3", GEMMA_3),
    "llama": ("Llama", LLAMA),
    "llama3": ("Llama3", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 24}),
    "qwen": ("Qwen", LLAMA | {"use_sliding_window_attention": True, "sliding_window_size": 24}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
}


def save(
    folder: Path,
    name: str,
    vocabulary: Path,
    *,
    rank: int = 4,
    shard_gb: float = 10,
    dtype: str = "float32",
) -> None:
    """Save preset, LoRA file and head as a trained model would leave them."""
    family, config = FAMILIES[name]
    make_tokenizer = getattr(MODELS, f"{family}Tokenizer")
    if vocabulary.is_dir():
        files = (vocabulary / "vocabulary.json", vocabulary / "merges.txt")
        tokenizer = make_tokenizer(*map(str, files))
    elif family == "Gemma3":
        tokenizer = make_tokenizer(vocabulary.read_bytes(), has_vision_tokens=False)
    else:
        tokenizer = make_tokenizer(vocabulary.read_bytes())
    backbone = getattr(MODELS, f"{family}Backbone")(
        vocabulary_size=tokenizer.vocabulary_size(), **config, dtype=dtype
    )
    backbone.save_to_preset(str(folder / "preset"), max_shard_size=shard_gb)
    preprocessor = getattr(MODELS, f"{family}CausalLMPreprocessor")(tokenizer, sequence_length=64)
    preprocessor.save_to_preset(str(folder / "preset"))
    rng = np.random.default_rng(7)
    backbone.enable_lora(rank)
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(0, 0.2, variable.shape))
    backbone.save_lora_weights(str(folder / "model.lora.h5"))
    np.save(folder / "kernel.npy", rng.normal(0, 0.5, (config["hidden_dim"], 3)).astype("float32"))
    np.save(folder / "bias.npy", rng.normal(0, 0.1, 3).astype("float32"))


FAMILIES["heavy"] = ("Gemma", HEAVY)
TOKENIZERS = {
    **dict.fromkeys(("Gemma", "Gemma3"), "gemma.spm"),
    **dict.fromkeys(("Llama", "Mistral"), "llama.spm"),
    **dict.fromkeys(("Llama3", "Qwen", "Qwen3"), "byte_pairs"),
}
# Presets that are a family's in another form.
VARIANTS = {
    # In several weight files, as Kaggle ships the large ones.
    "sharded": {"shard_gb": 2e-4},
    # As Kaggle had it in 2024: bfloat16 weights, classes under their old package's name.
    "kaggle": {"dtype": "bfloat16"},
    # With the real tokenizer's size, for the real rows.
    "arena": {},
}
NAMES = (*FAMILIES, *VARIANTS)


def main(name: str, folder: Path, tokenizers: Path) -> None:
    keras.utils.set_random_seed(3 + NAMES.index(name))
    kind = name if name in FAMILIES else "gemma2"
    vocabulary = "large.spm" if name == "arena" else TOKENIZERS[FAMILIES[kind][0]]
    save(folder, kind, tokenizers / vocabulary, **VARIANTS.get(name, {}))
    if name == "kaggle":
        for path in (folder / "preset").glob("*.json"):
            path.write_text(path.read_text().replace("keras_hub", "keras_nlp"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
