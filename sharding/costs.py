"""A backbone's config -> its dimensions, and from them FLOPs and bytes.

Knows KerasHub's config keys, but not Keras. The table in `runner/preset/families.py` says which
function reads which family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharding.batches import BatchShape
from sharding.kinds import KINDS

# Measured on one core of an AMD EPYC: 2.4 s for 8 layers of 512, with an empty cache. For a GPU,
# the same figure is a guess.
COMPILE_S_PER_LAYER = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a backbone that determine its cost.

    intermediate_dim: the width of the feed-forward part; if it is gated, of one projection.
    is_gated: two up projections and one down, as in decoders, instead of one of each.
    is_causal: a token attends only to itself and earlier ones. relative_positions: in DeBERTa, the
    number of embedded distances with which every query and key is compared.
    """

    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_dim: int
    is_gated: bool = True
    is_causal: bool = True
    relative_positions: int = 0

    @property
    def layer_parameters(self) -> int:
        """Matmul parameters of one layer, without norms."""
        attention = (
            2 * self.hidden_dim * self.head_dim * (self.num_query_heads + self.num_key_value_heads)
        )
        return attention + (2 + self.is_gated) * self.hidden_dim * self.intermediate_dim

    @property
    def flops_per_token(self) -> int:
        """Matmul FLOPs per token, without attention scores: two for each parameter.

        DeBERTa also compares its key and query with every distance (He et al. 2021,
        https://arxiv.org/abs/2006.03654, section 3.1).
        """
        distances = 2 * self.relative_positions * self.num_query_heads * self.head_dim
        return 2 * self.num_layers * (self.layer_parameters + distances)

    def attention_flops(self, length: int) -> int:
        """Return the FLOPs of scores and values for one row of `length` tokens.

        Four for each query head, head dim and pair of positions; causal attention needs half.
        """
        pairs = (2 if self.is_causal else 4) * length * length
        return self.num_layers * self.num_query_heads * self.head_dim * pairs

    def batch_flops(self, shape: BatchShape) -> int:
        """Return the FLOPs of a padded batch, the cost by which batches are dealt.

        KerasHub's DeBERTa projects the embedded distances to queries and keys again for each row.
        """
        heads_dim = self.num_query_heads * self.head_dim
        distances = 4 * self.num_layers * self.relative_positions * self.hidden_dim * heads_dim
        per_row = self.attention_flops(shape.length) + distances
        return shape.tokens * self.flops_per_token + shape.rows * per_row

    def rows_flops(self, lengths: np.ndarray) -> float:
        """Return the FLOPs of rows without padding. lengths: (rows,) token counts."""
        pairs = float((lengths.astype(float) ** 2).sum())
        return float(lengths.sum()) * self.flops_per_token + pairs * self.attention_flops(1)

    def weight_bytes(self, item_bytes: float) -> float:
        """Return the bytes of all weights, without norms."""
        embedding = self.vocabulary_size * self.hidden_dim
        return (embedding + self.num_layers * self.layer_parameters) * item_bytes

    def working_bytes_per_token(self, length: int, item_bytes: int) -> float:
        """Return the peak bytes per token of a batch, not counting weights.

        Counts activations, and attention scores in float32 twice; decoders hold the scores of an
        eighth of the queries at a time. Adds half of that for what the compiler keeps.
        """
        part = 1 / 8 if self.is_causal else 1
        scores = 2 * 4 * self.num_query_heads * (length + self.relative_positions) * part
        return 1.5 * (self.activation_bytes_per_token(item_bytes) + scores)

    def activation_bytes_per_token(self, item_bytes: int) -> int:
        """Return the bytes per token of a layer's activations.

        These are hidden states and their norms, queries, keys and values, the feed-forward
        projections and their product.
        """
        heads = self.num_query_heads + 2 * self.num_key_value_heads
        projected = (2 + self.is_gated) * self.intermediate_dim
        values = 6 * self.hidden_dim + 2 * heads * self.head_dim + projected
        return values * item_bytes

    def compile_flops(self, kind: str, replicas: int) -> float:
        """Return the FLOPs that all replicas could compute while each compiles one shape."""
        typical = KINDS[kind].typical_flops_per_s
        return self.num_layers * COMPILE_S_PER_LAYER * typical * replicas


def gated_halves(config: Mapping[str, Any]) -> ModelShape:
    """Read Gemma 1 and 2, whose intermediate_dim counts both gated projections."""
    return _decoder(
        config, head_dim=config["head_dim"], intermediate=config["intermediate_dim"] // 2
    )


def gated(config: Mapping[str, Any]) -> ModelShape:
    """Read the other decoders. Gemma 3 and Qwen 3 set head_dim; for the others it is optional."""
    head_dim = config.get("head_dim") or config["hidden_dim"] // config["num_query_heads"]
    return _decoder(config, head_dim=head_dim, intermediate=config["intermediate_dim"])


def encoder(config: Mapping[str, Any]) -> ModelShape:
    """Read BERT, RoBERTa and DeBERTa v3; only the last has a bucket_size."""
    heads = int(config["num_heads"])
    return ModelShape(
        vocabulary_size=int(config["vocabulary_size"]),
        num_layers=int(config["num_layers"]),
        hidden_dim=int(config["hidden_dim"]),
        num_query_heads=heads,
        num_key_value_heads=heads,
        head_dim=int(config["hidden_dim"]) // heads,
        intermediate_dim=int(config["intermediate_dim"]),
        is_gated=False,
        is_causal=False,
        relative_positions=2 * int(config.get("bucket_size", 0)),
    )


def _decoder(config: Mapping[str, Any], *, head_dim: int, intermediate: int) -> ModelShape:
    return ModelShape(
        vocabulary_size=int(config["vocabulary_size"]),
        num_layers=int(config["num_layers"]),
        hidden_dim=int(config["hidden_dim"]),
        num_query_heads=int(config["num_query_heads"]),
        num_key_value_heads=int(config["num_key_value_heads"]),
        head_dim=int(head_dim),
        intermediate_dim=int(intermediate),
    )
