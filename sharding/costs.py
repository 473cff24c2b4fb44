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


@dataclass(frozen=True, slots=True)
class Values:
    """The bytes of one value in a layer.

    item_bytes: of a hidden state. sum_bytes: of a product of a weight, before it is scaled and
    rounded. activated_bytes: of the input of the last feed-forward product.
    """

    item_bytes: int
    sum_bytes: int
    activated_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a backbone that determine its cost.

    intermediate_dim: the width of the feed-forward part; if it is gated, of one projection.
    is_gated: two up projections and one down, as in decoders, instead of one of each.
    is_causal: a token attends only to itself and earlier ones. relative_positions: in DeBERTa, the
    number of embedded distances with which every query and key is compared. has_soft_cap: attention
    scores are capped by a tanh, as in Gemma 2.
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
    has_soft_cap: bool = False

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

    def working_bytes_per_token(self, length: int, values: Values, slices: int = 1) -> float:
        """Return the bytes that one token of a batch needs beside the weights, at the peak.

        That is while a layer attends, or in its feed-forward part. Fitted to XLA's own figures for
        a T4, which they match within 4 % (decoders of six families' dimensions, 2 layers, 256 to
        4,096 tokens; benchmarks/results/2026-11-28-temporaries.jsonl). On an H100, XLA fuses more:
        these are 18 % too high there.

        Args:
            values: of the layers. slices: members of a tensor group.
        """
        feed_forward = self.activation_bytes_per_token(values, slices)
        return max(feed_forward, self._attending_bytes_per_token(length, values, slices))

    def activation_bytes_per_token(self, values: Values, slices: int = 1) -> float:
        """Return the bytes of a token in the feed-forward part: projections, their product, the
        hidden state, and the rotary embedding. In DeBERTa, every token has its own copy of the
        embedded distances, in the layers' dtype and in float32."""
        projections = (1 + self.is_gated) * values.sum_bytes + values.activated_bytes
        distances = self.relative_positions * self.hidden_dim * (values.item_bytes + 4)
        return (
            self.intermediate_dim / slices * projections
            + (self.hidden_dim + 2 * self.head_dim) * values.item_bytes
            + distances
        )

    def _attending_bytes_per_token(self, length: int, values: Values, slices: int) -> float:
        """Return the bytes of a token while a layer attends: scores in float32 and their weights,
        queries and keys before and after the rotary embedding, values, the output.

        A soft cap keeps float32 scores twice. Decoders have the scores of a chunk of queries at a
        time, an eighth of a long row (`runner/model/attention.py`).
        """
        queries = max(64, length / 8) if self.is_causal else length
        scores = self.num_query_heads * min(queries, length) / slices
        weights = 4 if self.has_soft_cap else values.item_bytes
        heads = 2 * self.num_query_heads + 4 * self.num_key_value_heads
        return (
            scores * (4 + weights)
            + (heads * self.head_dim / slices + self.hidden_dim) * values.item_bytes
        )

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
        has_soft_cap=bool(config.get("attention_logit_soft_cap")),
    )
