"""How many bytes do batches need on a device that is not here, by XLA's own account?

Compiles two layers of models of known dimensions (temporaries do not grow with layers). Needs the
extras compile-cuda and compile-tpu. The formulas in `sharding/costs.py` are fitted to what it
prints; `tests/sharding/test_working_memory.py` compares them.

python -m benchmarks.temporaries --device t4 --dtype float16 [--quantization int8] >> FILE.jsonl
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES
from runner.model.targets import environment_for
from runner.planner.compiling import ask_compiler


def _llama(
    hidden: int, heads: int, groups: int, intermediate: int, words: int, **more: Any
) -> dict:
    return {"hidden_dim": hidden, "num_query_heads": heads, "num_key_value_heads": groups,
            "intermediate_dim": intermediate, "vocabulary_size": words, **more}  # fmt: skip


# Name -> KerasHub's module and class, and the published config but for its layers.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        name: ("gemma", "GemmaBackbone", {"vocabulary_size": 256_000, **SHAPES[name]})
        for name in ("gemma2_9b", "gemma2_2b")
    },
    "llama3_8b": ("llama", "LlamaBackbone", _llama(4096, 32, 8, 14336, 128_256)),
    "llama_1b": ("llama", "LlamaBackbone", _llama(2048, 32, 8, 8192, 128_256)),
    "mistral_7b": (
        "mistral", "MistralBackbone", _llama(4096, 32, 8, 14336, 32_000, sliding_window=4096)
    ),
    "qwen2.5_7b": ("qwen", "QwenBackbone", _llama(3584, 28, 4, 18944, 152_064)),
    "deberta_v3_base": (
        "deberta_v3", "DebertaV3Backbone",
        {"vocabulary_size": 128_100, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072,
         "max_sequence_length": 512, "bucket_size": 256},
    ),
}  # fmt: skip
BATCHES = [[8, 512], [8, 1024], [2, 2048], [32, 256], [1, 4096]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantization")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", nargs=2, type=int, help="of a stage; all if not given")
    flags = parser.parse_args()
    for name in flags.models:
        for line in measure(name, flags):
            print(json.dumps(line), flush=True)


def measure(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what XLA says of each batch of a model, or why it does not compile."""
    module, class_name, config = MODELS[name]
    is_encoder = "num_heads" in config
    config = config | {"num_layers": 2} | ({} if is_encoder else {"layer_norm_epsilon": 1e-6})
    batches = [batch for batch in BATCHES if batch[1] <= config.get("max_sequence_length", 8192)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({
            "module": f"keras_hub.src.models.{module}.{module}_backbone",
            "class_name": class_name, "config": config,
            "registered_name": f"keras_hub>{class_name}",
        }))  # fmt: skip
        request = {
            "device": flags.device, "preset": folder, "dtype": flags.dtype,
            "quantization": flags.quantization, "pooling": "first" if is_encoder else "mean",
            "heads": config["num_heads" if is_encoder else "num_query_heads"],
            "head": "softmax", "classes": 3, "layers": flags.layers, "shapes": batches,
        }  # fmt: skip
        answers = ask_compiler(request, environment_for(flags.device))
        asked = {"model": name, "device": flags.device, "dtype": flags.dtype,
                 "quantization": flags.quantization, "layers": flags.layers}  # fmt: skip
        return [
            asked | {"shape": batch} | answer
            for batch, answer in zip(batches, answers, strict=False)
        ]


if __name__ == "__main__":
    main()
