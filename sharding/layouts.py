"""A backbone's weights -> how each is split over the devices of a tensor-parallel group.

The mesh has the axes ("batch", "model") and the shape (1, group size), so a layout only says which
dim of a weight is split over "model". Knows paths and shapes, but not Keras or JAX.

Attention heads and feed-forward columns are split (Megatron-LM, Shoeybi et al. 2019, section 3), so
each block sums partial results twice: after attention_output and after the last feed-forward
matmul. For Gemma, the rules follow KerasHub's `GemmaBackbone.get_layout_map`. KerasHub's maps for
Llama and Qwen instead split the hidden dim of the query, key and value kernels, which needs a sum
for each of the three, and do not split `reverse_embeddings`. Here both are split as for Gemma.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SPLIT_AXIS = "model"
# A weight with at least this many dims must match a rule; one with fewer that matches none is
# replicated. Dims are counted, not elements, so that small test models follow the same rules.
MIN_CLAIMED_DIMS = 2


@dataclass(frozen=True, slots=True)
class Weight:
    """A variable of a backbone: its path in Keras, and its shape."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How one weight is split over a group.

    axes: for each dim, a mesh axis or None; ("model", None, None) splits dim 0.
    rule: the pattern that matched the weight; "" if none did and it is small.
    reason: why it is replicated; "" if it is split.
    """

    path: str
    axes: tuple[str | None, ...]
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a family, for all weights whose paths match a pattern.

    pattern: a regex that must match the whole path.
    reason: why the weight is replicated; "" if a dim is split.
    if_uneven: why the weight is replicated if the group size does not divide its dim; "" if that is
    an error. `{size}` and `{group_size}` are filled in.
    """

    pattern: str
    axes: tuple[str | None, ...]
    reason: str = ""
    if_uneven: str = ""


TOO_SMALL = "a weight with one dim is too small to be worth splitting"
NORM = "a norm needs its whole scale on every device, which is a few kilobytes"
FEW_HEADS = (
    "the number of key/value heads ({size}) is not divisible by the {group_size} devices, so each "
    "computes all of them"
)


def _norm(pattern: str) -> Rule:
    return Rule(pattern, (None,), reason=NORM)


# Gemma 2 9B; 16 query heads, 8 key/value heads, hidden 3584, head dim 256.
#
# token_embedding/embeddings                              (256000, 3584)
# decoder_block_0/pre_attention_norm/scale                (3584,)
# decoder_block_0/post_attention_norm/scale               (3584,)     Gemma 2 and 3
# decoder_block_0/attention/query/kernel                  (16, 3584, 256)
# decoder_block_0/attention/key/kernel                    (8, 3584, 256)
# decoder_block_0/attention/value/kernel                  (8, 3584, 256)
# decoder_block_0/attention/attention_output/kernel       (16, 256, 3584)
# decoder_block_0/pre_ffw_norm/scale                      (3584,)
# decoder_block_0/post_ffw_norm/scale                     (3584,)     Gemma 2 and 3
# decoder_block_0/ffw_gating/kernel                       (3584, 14336)
# decoder_block_0/ffw_gating_2/kernel                     (3584, 14336)
# decoder_block_0/ffw_linear/kernel                       (14336, 3584)
# final_normalization/scale                               (3584,)
_GEMMA = (
    Rule(r"token_embedding/embeddings", (SPLIT_AXIS, None)),
    Rule(r"decoder_block_\d+/attention/query/kernel", (SPLIT_AXIS, None, None)),
    Rule(
        r"decoder_block_\d+/attention/(key|value)/kernel",
        (SPLIT_AXIS, None, None),
        if_uneven=FEW_HEADS,
    ),
    Rule(r"decoder_block_\d+/attention/attention_output/kernel", (SPLIT_AXIS, None, None)),
    Rule(r"decoder_block_\d+/ffw_gating(_2)?/kernel", (None, SPLIT_AXIS)),
    Rule(r"decoder_block_\d+/ffw_linear/kernel", (SPLIT_AXIS, None)),
    _norm(r"decoder_block_\d+/(pre|post)_(attention|ffw)_norm/scale"),
    _norm(r"final_normalization/scale"),
)

# Gemma 3 adds one scale for all query heads and one for all key heads, each of the head dim.
#
# decoder_block_0/attention/query_norm/scale              (256,)
# decoder_block_0/attention/key_norm/scale                (256,)
_GEMMA_3 = (
    *_GEMMA,
    _norm(r"decoder_block_\d+/attention/(query|key)_norm/scale"),
)

# Llama 3 8B; 32 query heads, 8 key/value heads, hidden 4096, head dim 128. Unlike Gemma's, kernels
# of query, key and value have the hidden dim first.
#
# token_embedding/embeddings                              (128256, 4096)
# token_embedding/reverse_embeddings                      (4096, 128256)   untied models only
# transformer_layer_0/self_attention/query/kernel         (4096, 32, 128)
# transformer_layer_0/self_attention/key/kernel           (4096, 8, 128)
# transformer_layer_0/self_attention/value/kernel         (4096, 8, 128)
# transformer_layer_0/self_attention/attention_output/kernel  (32, 128, 4096)
# transformer_layer_0/self_attention_layernorm/scale      (4096,)
# transformer_layer_0/feedforward_intermediate_dense/kernel   (4096, 14336)
# transformer_layer_0/feedforward_gate_dense/kernel       (4096, 14336)
# transformer_layer_0/feedforward_output_dense/kernel     (14336, 4096)
# transformer_layer_0/feedforward_layernorm/scale         (4096,)
# sequence_output_layernorm/scale                         (4096,)
_LLAMA = (
    Rule(r"token_embedding/embeddings", (SPLIT_AXIS, None)),
    Rule(r"token_embedding/reverse_embeddings", (None, SPLIT_AXIS)),
    Rule(r"transformer_layer_\d+/self_attention/query/kernel", (None, SPLIT_AXIS, None)),
    Rule(
        r"transformer_layer_\d+/self_attention/(key|value)/kernel",
        (None, SPLIT_AXIS, None),
        if_uneven=FEW_HEADS,
    ),
    Rule(r"transformer_layer_\d+/self_attention/attention_output/kernel", (SPLIT_AXIS, None, None)),
    Rule(r"transformer_layer_\d+/feedforward_(intermediate|gate)_dense/kernel", (None, SPLIT_AXIS)),
    Rule(r"transformer_layer_\d+/feedforward_output_dense/kernel", (SPLIT_AXIS, None)),
    _norm(r"transformer_layer_\d+/(self_attention|feedforward)_layernorm/scale"),
    _norm(r"sequence_output_layernorm/scale"),
)

# Qwen 2 and 2.5 (7B: 28 query heads, 4 key/value heads, head dim 128) have Llama's paths, and
# biases that are split like the heads of their kernels.
#
# transformer_layer_0/self_attention/query/bias           (28, 128)
# transformer_layer_0/self_attention/key/bias             (4, 128)
# transformer_layer_0/self_attention/value/bias           (4, 128)
_QWEN = (
    *_LLAMA,
    Rule(r"transformer_layer_\d+/self_attention/query/bias", (SPLIT_AXIS, None)),
    Rule(
        r"transformer_layer_\d+/self_attention/(key|value)/bias",
        (SPLIT_AXIS, None),
        if_uneven=FEW_HEADS,
    ),
)

# Qwen 3 has Llama's paths, and one scale for all query heads and one for all key heads.
#
# transformer_layer_0/self_attention/query_dense_layernorm/scale  (128,)
# transformer_layer_0/self_attention/key_dense_layernorm/scale    (128,)
_QWEN_3 = (
    *_LLAMA,
    _norm(r"transformer_layer_\d+/self_attention/(query|key)_dense_layernorm/scale"),
)

# KerasHub class name -> its rules. Exactly one must match each weight.
RULES: dict[str, tuple[Rule, ...]] = {
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": _GEMMA_3,
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "QwenBackbone": _QWEN,
    "Qwen3Backbone": _QWEN_3,
}


def lay_out(family: str, weights: Sequence[Weight], group_size: int) -> tuple[WeightLayout, ...]:
    """Return the layout of each weight, in the order given.

    Args:
        family: the KerasHub class name of the backbone, a key of `RULES`.
        group_size: the number of devices that hold one replica together.

    Raises:
        ValueError: the family is unknown, the group has no device, several rules match a weight, no
            rule matches one with `MIN_CLAIMED_DIMS` or more dims, a weight and its rule have
            different numbers of dims, or the group size does not divide a dim that must be split.
    """
    if family not in RULES:
        raise ValueError(
            f"There are no layout rules for this backbone. Expected one of "
            f"{', '.join(sorted(RULES))}. Received: family={family!r}"
        )
    if group_size < 1:
        raise ValueError(f"A group needs at least one device. Received: group_size={group_size}")
    layouts = []
    for weight in weights:
        rule = _find_rule(family, weight)
        if rule is None:
            axes: tuple[str | None, ...] = (None,) * len(weight.shape)
            layouts.append(WeightLayout(weight.path, axes, "", TOO_SMALL))
            continue
        axes, reason = rule.axes, rule.reason
        if SPLIT_AXIS in axes and _split_size(rule, weight) % group_size:
            if not rule.if_uneven:
                raise ValueError(_uneven(family, weights, weight, rule, group_size))
            size = _split_size(rule, weight)
            axes = (None,) * len(axes)
            reason = rule.if_uneven.format(size=size, group_size=group_size)
        layouts.append(WeightLayout(weight.path, axes, rule.pattern, reason))
    return tuple(layouts)


def replicated_reasons(layouts: Sequence[WeightLayout]) -> tuple[str, ...]:
    """Return a sentence for each distinct reason why weights are replicated."""
    paths: dict[str, list[str]] = {}
    for layout in layouts:
        if layout.reason:
            paths.setdefault(layout.reason, []).append(layout.path)
    return tuple(
        f"Every device holds a whole copy of {_name(claimed)}: {reason}."
        for reason, claimed in paths.items()
    )


def _find_rule(family: str, weight: Weight) -> Rule | None:
    """Return the rule that matches a weight, None for a small weight that none matches."""
    rules = [rule for rule in RULES[family] if re.fullmatch(rule.pattern, weight.path)]
    if len(rules) > 1 or (not rules and len(weight.shape) >= MIN_CLAIMED_DIMS):
        matching = ", ".join(repr(rule.pattern) for rule in rules) or "none"
        raise ValueError(
            f"Exactly one layout rule of {family} must match {weight.path}; without one, every "
            f"device would hold the whole weight. Received: {matching} for shape={weight.shape}"
        )
    if rules and len(rules[0].axes) != len(weight.shape):
        raise ValueError(
            f"The layout rule for {weight.path} is for {len(rules[0].axes)} dims: "
            f"{rules[0].pattern!r}. Received: shape={weight.shape}"
        )
    return rules[0] if rules else None


def _split_size(rule: Rule, weight: Weight) -> int:
    return weight.shape[rule.axes.index(SPLIT_AXIS)]


def _uneven(
    family: str, weights: Sequence[Weight], weight: Weight, rule: Rule, group_size: int
) -> str:
    """Return a message that names the uneven dim and the group sizes that would work."""
    common = math.gcd(*_sizes_to_divide(family, weights))
    fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    return (
        f"Dim {rule.axes.index(SPLIT_AXIS)} of {weight.path} cannot be split evenly over a group. "
        f"Expected a group size that divides every weight of this {family}: {fitting}. "
        f"Received: group_size={group_size}, shape={weight.shape}"
    )


def _sizes_to_divide(family: str, weights: Sequence[Weight]) -> Iterator[int]:
    for weight in weights:
        rule = _find_rule(family, weight)
        if rule is not None and SPLIT_AXIS in rule.axes and not rule.if_uneven:
            yield _split_size(rule, weight)


def _name(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more weights"
