"""A name -> a Gemma 2 backbone of known size, and files of it with random weights.

python -m benchmarks.shapes SHAPE VOCABULARY.spm FOLDER
"""

import sys
from pathlib import Path
from typing import Any

GEMMA_2 = {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4096,
}


def _shape(layers: int, hidden: int, heads: int, head_dim: int, intermediate: int) -> dict:
    """intermediate: as in KerasHub, both gated projections together."""
    return {
        "num_layers": layers,
        "hidden_dim": hidden,
        "num_query_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": head_dim,
        "intermediate_dim": intermediate,
        **GEMMA_2,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(2, 64, 4, 16, 512),
    "small": _shape(8, 512, 8, 64, 4096),
    "base": _shape(12, 1024, 8, 128, 8192),
    # Gemma Team 2024 (arXiv:2408.00118), table 1, and the presets' configs.
    "gemma2_2b": _shape(26, 2304, 8, 256, 18432),
    "gemma2_9b": _shape(42, 3584, 16, 256, 28672) | {"query_head_dim_normalize": True},
}


def save(shape: str, vocabulary: Path, folder: Path) -> None:
    """Write a preset, LoRA file and head of a shape."""
    import sentencepiece

    from runner.demo import save_model

    size = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary)).vocab_size()
    folder.mkdir(parents=True)
    save_model(folder, vocabulary, {"vocabulary_size": size, **SHAPES[shape]}, seed=0)


if __name__ == "__main__":
    from runner.model.process import prepare_process
    from sharding.topology import WorkerSlot

    prepare_process(WorkerSlot(0, "cpu"), verbose=False)
    save(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
