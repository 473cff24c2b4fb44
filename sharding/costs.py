"""A backbone's config -> its dimensions, and from them FLOPs and bytes.

Knows the names of KerasHub's config keys, and nothing of Keras itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sharding.batches import BatchShape

# Measured on one core of an AMD EPYC: 2.4 s for 8 layers of 512, nothing in the cache. On a GPU it
# is a guess of the same size.
COMPILE_S_PER_LAYER = 0.3
# One device at work on a model, by kind: an AVX-512 core pair, a T4, a TPU v5e, rounded.
TYPICAL_FLOPS_PER_S = {"cpu": 1e11, "gpu": 2e13, "tpu": 1e14}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder that decide what it costs.

    `intermediate_dim` is the width of one of the two gated feed-forward projections.
    """

    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_dim: int

    @property
    def layer_parameters(self) -> int:
        """Matmul parameters of one layer; norms are left out."""
        attention = (
            2 * self.hidden_dim * self.head_dim * (self.num_query_heads + self.num_key_value_heads)
        )
        return attention + 3 * self.hidden_dim * self.intermediate_dim

    @property
    def flops_per_token(self) -> int:
        """Matmul FLOPs of one token without attention scores: two for each parameter."""
        return 2 * self.num_layers * self.layer_parameters

    def attention_flops(self, length: int) -> int:
        """FLOPs of causal scores and values for one row of `length` tokens.

        Four for each query head, head dim and pair of positions, of which causality leaves half.
        """
        return 2 * self.num_layers * self.num_query_heads * self.head_dim * length * length

    def batch_flops(self, shape: BatchShape) -> int:
        """FLOPs of a padded batch, the cost by which shards are cut."""
        return shape.tokens * self.flops_per_token + shape.rows * self.attention_flops(shape.length)

    def weight_bytes(self, item_bytes: float) -> float:
        """Bytes of all weights, norms left out."""
        embedding = self.vocabulary_size * self.hidden_dim
        return (embedding + self.num_layers * self.layer_parameters) * item_bytes

    def working_bytes_per_token(self, length: int, item_bytes: int) -> float:
        """Bytes that one token of a batch needs beside the weights, at the widest place of a layer.

        Activations; attention scores in float32 of an eighth of the queries at a time, twice; and
        half as much again for what a compiler keeps.
        """
        scores = 2 * 4 * self.num_query_heads * length / 8
        return 1.5 * (self.activation_bytes_per_token(item_bytes) + scores)

    def activation_bytes_per_token(self, item_bytes: int) -> int:
        """Bytes of hidden states and their norms, queries, keys and values, both feed-forward
        projections and their product."""
        heads = self.num_query_heads + 2 * self.num_key_value_heads
        values = 6 * self.hidden_dim + 2 * heads * self.head_dim + 3 * self.intermediate_dim
        return values * item_bytes

    def compile_flops(self, kind: str, replicas: int) -> float:
        """Return the FLOPs that all replicas could do while each compiles one shape."""
        return self.num_layers * COMPILE_S_PER_LAYER * TYPICAL_FLOPS_PER_S[kind] * replicas


def _gemma(config: Mapping[str, Any]) -> ModelShape:
    # KerasHub's Gemma names the two gated projections together: each has half the width.
    return _shape(config, head_dim=config["head_dim"], intermediate=config["intermediate_dim"] // 2)


def _llama(config: Mapping[str, Any]) -> ModelShape:
    head_dim = config.get("head_dim") or config["hidden_dim"] // config["num_query_heads"]
    return _shape(config, head_dim=head_dim, intermediate=config["intermediate_dim"])


def _shape(config: Mapping[str, Any], *, head_dim: int, intermediate: int) -> ModelShape:
    return ModelShape(
        vocabulary_size=int(config["vocabulary_size"]),
        num_layers=int(config["num_layers"]),
        hidden_dim=int(config["hidden_dim"]),
        num_query_heads=int(config["num_query_heads"]),
        num_key_value_heads=int(config["num_key_value_heads"]),
        head_dim=int(head_dim),
        intermediate_dim=int(intermediate),
    )


# KerasHub class name -> how its config is read. A new decoder family is one line here. Only Gemma 1
# and 2 double the feed-forward width; Gemma 3 and Qwen 3 name their head dim, the others may.
FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelShape]] = {
    "GemmaBackbone": _gemma,
    "Gemma3Backbone": _llama,
    "LlamaBackbone": _llama,
    "Llama3Backbone": _llama,
    "MistralBackbone": _llama,
    "QwenBackbone": _llama,
    "Qwen3Backbone": _llama,
}
# Config keys of Gemma 3 that add inputs (images) or outputs (a pooled vector) to the backbone.
MORE_THAN_TEXT = ("vision_encoder", "is_embedding_model")


def model_shape(class_name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the dimensions of the backbone that a KerasHub config.json describes.

    Raises:
        ValueError: the class is no decoder listed in `FAMILIES`, a key is missing, or the
            backbone takes images or returns a pooled vector.
    """
    if class_name not in FAMILIES:
        raise ValueError(
            f"Expected a text decoder backbone, one of {', '.join(sorted(FAMILIES))}. "
            f"Received: class_name={class_name!r}"
        )
    for key in MORE_THAN_TEXT:
        if config.get(key):
            raise ValueError(
                f"Expected a {class_name} from token ids to hidden states alone, as in the presets "
                f"whose name ends in _text. Received: a config with {key}"
            )
    try:
        return FAMILIES[class_name](config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"The config of {class_name} lacks or garbles {error}.") from error
