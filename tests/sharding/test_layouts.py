"""sharding/layouts.py on the weights of real, tiny backbones, against tables worked out by hand."""

import json
import math

import pytest

from runner.preset.families import FAMILIES, model_shape
from sharding.layouts import NORM, RULES, TOO_SMALL, Rule, Weight, lay_out, replicated_reasons
from tests.support.stored import made_once

# Path, shape, and the dim that a group of two splits. `*` stands for the number of each layer.
GEMMA = [
    ("token_embedding/embeddings", (60, 24), 0),
    ("decoder_block_*/pre_attention_norm/scale", (24,), None),
    ("decoder_block_*/post_attention_norm/scale", (24,), None),
    ("decoder_block_*/attention/query/kernel", (6, 24, 8), 0),
    ("decoder_block_*/attention/key/kernel", (2, 24, 8), 0),
    ("decoder_block_*/attention/value/kernel", (2, 24, 8), 0),
    ("decoder_block_*/attention/attention_output/kernel", (6, 8, 24), 0),
    ("decoder_block_*/pre_ffw_norm/scale", (24,), None),
    ("decoder_block_*/post_ffw_norm/scale", (24,), None),
    ("decoder_block_*/ffw_gating/kernel", (24, 48), 1),
    ("decoder_block_*/ffw_gating_2/kernel", (24, 48), 1),
    ("decoder_block_*/ffw_linear/kernel", (48, 24), 0),
    ("final_normalization/scale", (24,), None),
]
FFW_GEMMA_3 = {
    "decoder_block_*/ffw_gating/kernel": (24, 96),
    "decoder_block_*/ffw_gating_2/kernel": (24, 96),
    "decoder_block_*/ffw_linear/kernel": (96, 24),
}
GEMMA_3 = [
    *((path, FFW_GEMMA_3.get(path, shape), dim) for path, shape, dim in GEMMA),
    ("decoder_block_*/attention/query_norm/scale", (8,), None),
    ("decoder_block_*/attention/key_norm/scale", (8,), None),
]
TIED_LLAMA = [
    ("token_embedding/embeddings", (60, 24), 0),
    ("transformer_layer_*/self_attention/query/kernel", (24, 6, 4), 1),
    ("transformer_layer_*/self_attention/key/kernel", (24, 2, 4), 1),
    ("transformer_layer_*/self_attention/value/kernel", (24, 2, 4), 1),
    ("transformer_layer_*/self_attention/attention_output/kernel", (6, 4, 24), 0),
    ("transformer_layer_*/self_attention_layernorm/scale", (24,), None),
    ("transformer_layer_*/feedforward_intermediate_dense/kernel", (24, 96), 1),
    ("transformer_layer_*/feedforward_gate_dense/kernel", (24, 96), 1),
    ("transformer_layer_*/feedforward_output_dense/kernel", (96, 24), 0),
    ("transformer_layer_*/feedforward_layernorm/scale", (24,), None),
    ("sequence_output_layernorm/scale", (24,), None),
]
LLAMA = [*TIED_LLAMA, ("token_embedding/reverse_embeddings", (24, 60), 1)]
QWEN = [
    *TIED_LLAMA,
    ("transformer_layer_*/self_attention/query/bias", (6, 4), 0),
    ("transformer_layer_*/self_attention/key/bias", (2, 4), 0),
    ("transformer_layer_*/self_attention/value/bias", (2, 4), 0),
]
QWEN_3 = [
    *((path, tuple(8 if size == 4 else size for size in s), dim) for path, s, dim in TIED_LLAMA),
    ("transformer_layer_*/self_attention/query_dense_layernorm/scale", (8,), None),
    ("transformer_layer_*/self_attention/key_dense_layernorm/scale", (8,), None),
]
TABLES = {
    "GemmaBackbone": GEMMA,
    "Gemma3Backbone": GEMMA_3,
    "LlamaBackbone": LLAMA,
    "Llama3Backbone": LLAMA,
    "MistralBackbone": LLAMA,
    "QwenBackbone": QWEN,
    "Qwen3Backbone": QWEN_3,
}


def weights_of(family, layers=2):
    """The table of a family, written out for its layers: path -> (weight, split dim)."""
    return {
        path.replace("*", str(layer)): (Weight(path.replace("*", str(layer)), shape), dim)
        for path, shape, dim in TABLES[family]
        for layer in range(layers)
    }


def key_value_heads(weights, heads):
    """The same weights with another number of key and value heads."""
    return [
        Weight(w.path, tuple(heads if size == 2 else size for size in w.shape)) for w in weights
    ]


@pytest.fixture(scope="module")
def built(stored, run_script):
    """What KerasHub builds: family -> its config and its weights."""
    path = stored / "weights" / "weights.json"
    with made_once(path.parent) as folder:
        if folder is not None:
            run_script("list_weights.py", folder / path.name)
    return {
        family: (model["config"], [Weight(path, tuple(shape)) for path, shape in model["weights"]])
        for family, model in json.loads(path.read_text()).items()
    }


def test_each_decoder_that_loads_has_rules():
    assert set(RULES) == set(TABLES)
    assert set(RULES) == {name for name, family in FAMILIES.items() if family.shares_seam}


@pytest.mark.parametrize("family", TABLES)
def test_a_group_of_two_splits_every_real_weight_as_the_table_says(built, family):
    weights = built[family][1]
    table = weights_of(family)
    assert {w.path: w.shape for w in weights} == {path: w.shape for path, (w, _) in table.items()}
    layouts = lay_out(family, weights, 2)
    assert [layout.path for layout in layouts] == [weight.path for weight in weights]
    for layout, weight in zip(layouts, weights, strict=True):
        dim = table[weight.path][1]
        expected = tuple("model" if place == dim else None for place in range(len(weight.shape)))
        assert layout.axes == expected
        assert layout.rule
        assert layout.reason == ("" if dim is not None else NORM)


@pytest.mark.parametrize("family", TABLES)
def test_a_group_of_three_keeps_two_key_value_heads_whole(built, family):
    weights = built[family][1]
    layouts = lay_out(family, weights, 3)
    for two, three in zip(lay_out(family, weights, 2), layouts, strict=True):
        if "/key/" in two.path or "/value/" in two.path:
            assert "model" in two.axes
            assert set(three.axes) == {None}
            assert "key/value heads (2) is not divisible by the 3 devices" in three.reason
        else:
            assert three == two


@pytest.mark.parametrize("family", TABLES)
def test_every_rule_claims_a_real_weight(built, family):
    weights = built[family][1]
    claimed = {layout.rule for layout in lay_out(family, weights, 2)}
    unused = {rule.pattern for rule in RULES[family]} - claimed
    # Qwen's backbones have no second embedding when it is tied, as in most presets.
    tied = family in ("QwenBackbone", "Qwen3Backbone")
    assert unused == ({"token_embedding/reverse_embeddings"} if tied else set())


@pytest.mark.parametrize("family", TABLES)
def test_costs_count_the_parameters_of_a_real_layer(built, family):
    config, weights = built[family]
    kernels = [math.prod(w.shape) for w in weights if "_0/" in w.path and w.path.endswith("kernel")]
    shape = model_shape(family, config)
    assert shape.layer_parameters == sum(kernels)
    output = next(w for w in weights if w.path.endswith("attention_output/kernel"))
    assert (shape.num_query_heads, shape.head_dim, shape.hidden_dim) == output.shape


def test_one_key_value_head_lies_whole_on_both_cards():
    """Gemma 2B: every device computes the one head, query heads are still split."""
    weights = key_value_heads([w for w, _ in weights_of("GemmaBackbone").values()], 1)
    layouts = {layout.path: layout for layout in lay_out("GemmaBackbone", weights, 2)}
    key = layouts["decoder_block_1/attention/key/kernel"]
    assert key.axes == (None, None, None)
    assert "key/value heads (1) is not divisible by the 2 devices" in key.reason
    assert layouts["decoder_block_1/attention/query/kernel"].axes == ("model", None, None)
    assert replicated_reasons(tuple(layouts.values())) == (
        "Every device holds a whole copy of decoder_block_0/pre_attention_norm/scale and 8 more "
        f"weights: {NORM}.",
        "Every device holds a whole copy of decoder_block_0/attention/key/kernel and 3 more "
        f"weights: {key.reason}.",
    )


def test_small_weights_of_no_rule_are_replicated_by_size():
    state = Weight("decoder_block_0/dropout/seed_generator/seed_generator_state", (2,))
    (layout,) = lay_out("GemmaBackbone", [state], 2)
    assert (layout.axes, layout.rule, layout.reason) == ((None,), "", TOO_SMALL)
    assert replicated_reasons([layout]) == (
        f"Every device holds a whole copy of {state.path}: {TOO_SMALL}.",
    )


@pytest.mark.parametrize(
    "path",
    [
        "decoder_block_0/attention/query/lora_kernel_a",
        "gemma/decoder_block_0/ffw_linear/kernel",
        "decoder_block_0/ffw_linear/kernel/more",
        "decoder_block_x/ffw_linear/kernel",
    ],
)
def test_a_large_weight_that_no_rule_claims_whole_is_an_error(path):
    message = rf"one layout rule of GemmaBackbone must match {path};.*none for shape=\(48, 24\)"
    with pytest.raises(ValueError, match=message):
        lay_out("GemmaBackbone", [Weight(path, (48, 24))], 2)


@pytest.mark.parametrize(("path", "shape"), [("a/kernel", (4, 4)), ("a/scale", (4,))])
def test_a_weight_that_two_rules_claim_is_an_error(monkeypatch, path, shape):
    axes = ("model", None)[: len(shape)]
    rules = (Rule(r"a/.*", axes), Rule(r".*/(kernel|scale)", axes))
    monkeypatch.setitem(RULES, "GemmaBackbone", rules)
    message = rf"must match {path};.*Received: 'a/\.\*', '\.\*/\(kernel\|scale\)' for "
    with pytest.raises(ValueError, match=message):
        lay_out("GemmaBackbone", [Weight(path, shape)], 2)


def test_another_number_of_dims_is_an_error():
    """As int4 kernels have, which are packed into two dims."""
    packed = Weight("decoder_block_0/attention/query/kernel", (24, 16))
    with pytest.raises(ValueError, match=rf"{packed.path} is for 3 dims.*shape=\(24, 16\)"):
        lay_out("GemmaBackbone", [packed], 2)


@pytest.mark.parametrize(
    ("path", "dim"),
    [
        ("token_embedding/embeddings", 0),
        ("token_embedding/reverse_embeddings", 1),
        ("transformer_layer_0/self_attention/query/kernel", 1),
        ("transformer_layer_0/self_attention/query/bias", 0),
        ("transformer_layer_0/self_attention/attention_output/kernel", 0),
        ("transformer_layer_1/feedforward_gate_dense/kernel", 1),
        ("transformer_layer_1/feedforward_output_dense/kernel", 0),
    ],
)
def test_a_dim_that_must_be_split_and_does_not_divide_is_an_error(path, dim):
    table = weights_of("LlamaBackbone") | weights_of("QwenBackbone")
    weights = [weight for weight, _ in table.values()]
    assert lay_out("QwenBackbone", weights, 6)
    odd = [
        Weight(w.path, (*w.shape[:dim], 9, *w.shape[dim + 1 :])) if w.path == path else w
        for w in weights
    ]
    message = (
        rf"Dim {dim} of {path} cannot be split .*QwenBackbone: 1, 3\. "
        r"Received: group_size=2, shape="
    )
    with pytest.raises(ValueError, match=message):
        lay_out("QwenBackbone", odd, 2)
    assert lay_out("QwenBackbone", odd, 3)


def test_unknown_families_and_empty_groups():
    with pytest.raises(ValueError, match=r"Expected one of Gemma3Backbone, .*'BertBackbone'"):
        lay_out("BertBackbone", [], 2)
    with pytest.raises(ValueError, match="Received: group_size=0"):
        lay_out("GemmaBackbone", [], 0)
    assert lay_out("GemmaBackbone", [], 2) == ()
