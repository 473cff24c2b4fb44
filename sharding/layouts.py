"""A backbone's weights -> how each lies over the one-dimensional mesh of a tensor-parallel group.

The mesh has axes ("batch", "model") of shape (1, group size), so a layout only says which dim of a
weight is split over "model". Pure: knows paths and shapes, and nothing of Keras or JAX.

Heads and feed-forward columns are split (Megatron-LM, Shoeybi et al. 2019, section 3): a block
then adds up partial results twice, after attention_output and after the last feed-forward matmul.
The choices for Gemma are those of KerasHub's `GemmaBackbone.get_layout_map`. Its maps for Llama
and Qwen split the hidden dim of the query, key and value kernels, which needs a sum for each of
the three, and leave `reverse_embeddings` whole; here both are split as for Gemma.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SPLIT_AXIS = "model"
# From this many dims on, a weight that no rule claims is an error; below, it is replicated. By
# dims and not by elements, so that small models are held to what large ones are.
MIN_CLAIMED_DIMS = 2


@dataclass(frozen=True, slots=True)
class Weight:
    """A variable of a backbone: its path as Keras spells it, and its shape."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How one weight lies over its group.

    axes: one mesh axis or None for each dim; ("model", None, None) splits dim 0.
    rule: the pattern that claimed the weight, "" if none did and it is replicated by size.
    reason: "" if it is split, else why it is replicated on purpose.
    """

    path: str
    axes: tuple[str | None, ...]
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family's table.

    pattern: a regex that must match the whole path.
    reason: why every device holds the weight whole; "" if a dim is split.
    if_uneven: why it is whole if its dim does not divide by the group size; "" if that is an
    error. `{size}` and `{group_size}` are filled in.
    """

    pattern: str
    axes: tuple[str | None, ...]
    reason: str = ""
    if_uneven: str = ""


TOO_SMALL = "a weight of one dim is too small to be worth splitting"
NORM = "a norm needs its whole scale on every device, and that is a few kilobytes"
FEW_HEADS = (
    "the number of key/value heads, {size}, does not divide by the {group_size} devices, so each "
    "computes all of them"
)

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
    Rule(r"decoder_block_\d+/(pre|post)_(attention|ffw)_norm/scale", (None,), reason=NORM),
    Rule(r"final_normalization/scale", (None,), reason=NORM),
)

# Gemma 3: the paths of Gemma, and one scale of the head dim for all query and all key heads.
#
# decoder_block_0/attention/query_norm/scale              (256,)
# decoder_block_0/attention/key_norm/scale                (256,)
_GEMMA_3 = (
    *_GEMMA,
    Rule(r"decoder_block_\d+/attention/(query|key)_norm/scale", (None,), reason=NORM),
)

# Llama 3 8B; 32 query heads, 8 key/value heads, hidden 4096, head dim 128. Kernels of query, key
# and value have the hidden dim first, unlike Gemma's.
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
    Rule(
        r"transformer_layer_\d+/self_attention/attention_output/kernel",
        (SPLIT_AXIS, None, None),
    ),
    Rule(
        r"transformer_layer_\d+/feedforward_(intermediate|gate)_dense/kernel",
        (None, SPLIT_AXIS),
    ),
    Rule(r"transformer_layer_\d+/feedforward_output_dense/kernel", (SPLIT_AXIS, None)),
    Rule(
        r"transformer_layer_\d+/(self_attention|feedforward)_layernorm/scale",
        (None,),
        reason=NORM,
    ),
    Rule(r"sequence_output_layernorm/scale", (None,), reason=NORM),
)

# Qwen 2 and 2.5 (7B: 28 query heads, 4 key/value heads, head dim 128): the paths of Llama, and
# biases that lie with the heads of their kernels.
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

# Qwen 3: the paths of Llama, and one scale of the head dim for all query and all key heads.
#
# transformer_layer_0/self_attention/query_dense_layernorm/scale  (128,)
# transformer_layer_0/self_attention/key_dense_layernorm/scale    (128,)
_QWEN_3 = (
    *_LLAMA,
    Rule(
        r"transformer_layer_\d+/self_attention/(query|key)_dense_layernorm/scale",
        (None,),
        reason=NORM,
    ),
)

# KerasHub class name -> its rules. Each weight is claimed by exactly one.
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
        group_size: devices that hold one replica together.

    Raises:
        ValueError: the family is unknown, the group has no device, a weight of
            `MIN_CLAIMED_DIMS` or more dims is claimed by no rule, any weight is claimed by several
            or has another number of dims than its rule, or a dim that must be split does not
            divide by the group size.
    """
    if family not in RULES:
        raise ValueError(
            f"There are no layout rules for this backbone. Expected one of "
            f"{', '.join(sorted(RULES))}. Received: family={family!r}"
        )
    if group_size < 1:
        raise ValueError(f"A group needs a device or more. Received: group_size={group_size}")
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
    """Return a sentence for each distinct reason why weights lie whole on every device."""
    paths: dict[str, list[str]] = {}
    for layout in layouts:
        if layout.reason:
            paths.setdefault(layout.reason, []).append(layout.path)
    return tuple(
        f"On every device lies a whole copy of {_name(claimed)}: {reason}."
        for reason, claimed in paths.items()
    )


def _find_rule(family: str, weight: Weight) -> Rule | None:
    """Return the one rule that claims a weight, None for a small weight that none claims."""
    rules = [rule for rule in RULES[family] if re.fullmatch(rule.pattern, weight.path)]
    if len(rules) > 1 or (not rules and len(weight.shape) >= MIN_CLAIMED_DIMS):
        claimants = ", ".join(repr(rule.pattern) for rule in rules) or "none"
        raise ValueError(
            f"Layout rules of {family} that claim {weight.path}: {claimants}. Expected exactly "
            f"one, or the weight would lie whole on every device unasked. "
            f"Received: shape={weight.shape}"
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
    """Say which dim does not divide, and which group sizes divide all of the backbone's."""
    common = math.gcd(*_sizes_to_divide(family, weights))
    fitting = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    return (
        f"Dim {rule.axes.index(SPLIT_AXIS)} of {weight.path} is split over the group and does not "
        f"divide by its size. Expected one of the group sizes that divide every weight of this "
        f"{family}: {fitting}. Received: group_size={group_size}, shape={weight.shape}"
    )


def _sizes_to_divide(family: str, weights: Sequence[Weight]) -> Iterator[int]:
    for weight in weights:
        rule = _find_rule(family, weight)
        if rule is not None and SPLIT_AXIS in rule.axes and not rule.if_uneven:
            yield _split_size(rule, weight)


def _name(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more weights"
