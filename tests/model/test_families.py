"""Every family of `runner/preset/families.py` against plain Keras; the matrix in docs/models.md."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import functools

import numpy as np
import pytest

from runner.common.errors import ConfigError
from runner.config.run_config import RunConfig
from runner.data.tokenization import tokenize
from runner.preset.auto import choose_strategy
from runner.preset.families import (
    DECODER_POOLINGS,
    FAMILIES,
    TOKENIZERS,
    family_of_checkpoint,
    model_shape,
    strategies,
)
from runner.preset.reader import read_head, read_preset
from runner.preset.resolve import settle
from sharding.batches import BatchShape
from sharding.memory import values_of
from tests.conftest import PLAIN_LENGTH, ROOT, TOLERANCE

BERT_BASE = {
    "vocabulary_size": 30_522,
    "num_layers": 12,
    "num_heads": 12,
    "hidden_dim": 768,
    "intermediate_dim": 3072,
    "max_sequence_length": 512,
}


@functools.cache
def loaded(folder):
    """Return a preset's facts and its backbone, LoRA merged."""
    from runner.model.loading import load_backbone

    lora = folder / "model.lora.h5"
    preset = read_preset(folder / "preset")
    weights = str(lora) if lora.is_file() else None
    return preset, load_backbone(str(preset.path), weights, dtype="float32")


def predict(folder, texts, pooling):
    """Return probabilities of short rows in one batch and of long ones in another, each padded no
    more than its rows need; for `padded-mean` all to the full length."""
    from runner.model.predictor import Predictor

    preset, backbone = loaded(folder)
    head = read_head(
        folder / "kernel.npy",
        folder / "bias.npy",
        hidden_dim=preset.shape.hidden_dim,
        classes=3,
    )
    predictor = Predictor(backbone, head, pooling=pooling)
    tokens = tokenize(texts, preset.tokenizer, sequence_length=PLAIN_LENGTH)
    answer = np.zeros((len(texts), 3))
    is_long = tokens.lengths > PLAIN_LENGTH // 2
    for rows in (np.flatnonzero(~is_long), np.flatnonzero(is_long)):
        assert len(rows)
        length = int(tokens.lengths[rows].max()) + 3
        length = PLAIN_LENGTH if pooling == "padded-mean" else min(length, PLAIN_LENGTH)
        # A filler row past the real ones, as a plan may have it.
        arrays = tokens.batch_arrays(tuple(rows.tolist()), len(rows) + 1, length)
        answer[rows] = predictor.predict(*arrays)[: len(rows)]
    assert predictor.way == ("chunked" if preset.family.shares_seam else "keras")
    return answer


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        *(("bert", pooling) for pooling in ("mean", "pooler")),
        *(("gemma3", "mean"), ("llama", "padded-mean")),
        *(
            pytest.param(name, pooling, marks=SLOW)
            for name, poolings in {
                "bert": ("padded-mean", "last", "first"),
                "roberta": FAMILIES["RobertaBackbone"].poolings,
                "deberta": FAMILIES["DebertaV3Backbone"].poolings,
                "gemma3": ("padded-mean", "last"),
                "llama": ("mean", "last"),
            }.items()
            for pooling in poolings
        ),
    ],
)
def test_predictor_equals_plain_keras(plain, models, name, pooling):
    folder = models[name].folder if name in models else plain.model(name)
    expected = plain.answers(name)
    answer = predict(folder, plain.texts, pooling)
    assert expected[pooling].std(axis=0).max() > 0.01, "all rows are alike: equality means little"
    assert np.abs(answer - expected[pooling]).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "pooling"),
    [
        ("bert", ("--mode", "data-parallel", "--num-workers", "2"), "mean"),
        ("deberta", ("--mode", "data-parallel", "--num-workers", "2"), "padded-mean"),
        ("bert", ("--mode", "model-parallel"), "pooler"),
        ("roberta", ("--mode", "model-parallel", "--group-size", "3"), "first"),
    ],
)
def test_modes_of_encoders_equal_plain_keras(plain, run_on, name, flags, pooling):
    answer = run_on(name, *flags, "--pooling", pooling, "--max-tokens-per-batch", "128")
    assert np.abs(answer.probabilities - plain.answers(name)[pooling]).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *(("bert", ("--quantization", mode)) for mode in ("int8", "int4")),
        ("deberta", ("--quantization", "int8")),
        *(("roberta", ("--dtype", dtype)) for dtype in ("float16", "bfloat16")),
    ],
)
def test_narrow_encoders_stay_near(plain, run_on, name, flags):
    answer = run_on(name, "--mode", "single", "--pooling", "mean", *flags)
    off = np.abs(answer.probabilities - plain.answers(name)["mean"]).max()
    assert 1e-6 < off < (0.3 if "int4" in flags else 0.1)
    if "--quantization" in flags:
        # Of the first eight rows, and against the runner's own float32.
        assert 1e-6 < answer.report["quantization"]["max_abs_difference"] < off + TOLERANCE


@pytest.fixture
def run_on(plain, predict_command):
    def run(name, *flags):
        folder = plain.model(name)
        head = ("--head-kernel", folder / "kernel.npy", "--head-bias", folder / "bias.npy")
        files = ("--preset", folder / "preset", *head, "--input", plain.rows)
        length = ["--sequence-length", PLAIN_LENGTH]
        if (folder / "model.lora.h5").is_file():
            length += ["--lora-weights", folder / "model.lora.h5"]
        return predict_command(*map(str, (*files, *length, *flags)))

    return run


@pytest.fixture
def predict_command(request):
    return request.getfixturevalue("predict")


def config(**named):
    return RunConfig(preset=ROOT, **named)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("bert", {"sequence_length": 129}, "128 positions. Received: --sequence-length 129"),
        ("bert", {"sequence_length": 1}, "at least 2. Received: --sequence-length 1"),
        ("roberta", {"pooling": "pooler"}, "RobertaBackbone supports.*first. Received"),
        ("gemma3", {"pooling": "first"}, "Gemma3Backbone supports --pooling padded-mean, mean"),
    ],
)
def test_what_does_not_go_with_a_family(plain, models, name, asked, message):
    folder = models[name].folder if name in models else plain.model(name)
    preset = read_preset(folder / "preset")
    with pytest.raises(ConfigError, match=message):
        settle(config(head_kernel=ROOT, head_bias=ROOT, **asked), preset)


@pytest.mark.parametrize(
    ("name", "strategy", "message"),
    [
        ("bert", "tensor", "BertBackbone goes with --strategy pipeline or --mode data-parallel"),
        ("deberta", None, "DebertaV3Backbone goes with --mode data-parallel or single"),
    ],
)
def test_what_a_family_is_not_held_by(plain, name, strategy, message):
    preset = read_preset(plain.model(name) / "preset")
    with pytest.raises(ConfigError, match=message):
        choose_strategy(config(mode="model-parallel", strategy=strategy), preset)


def test_a_length_that_nobody_asked_for_is_no_longer_than_the_positions(plain):
    preset = read_preset(plain.model("bert") / "preset")
    named = {"head_kernel": ROOT, "head_bias": ROOT}
    assert settle(config(**named), preset).sequence_length == 128
    assert settle(config(**named), preset).pooling == "padded-mean"
    deberta = read_preset(plain.model("deberta") / "preset")
    assert settle(config(**named, sequence_length=300), deberta).sequence_length == 300


def test_costs_of_encoders():
    """BERT base: 12 h^2 parameters a layer, and both halves of the attention square."""
    shape = model_shape("BertBackbone", BERT_BASE)
    assert shape.layer_parameters == 12 * 768**2
    assert shape.attention_flops(100) == 12 * 4 * 768 * 100 * 100
    deberta = model_shape("DebertaV3Backbone", BERT_BASE | {"bucket_size": 256})
    assert deberta.flops_per_token == shape.flops_per_token + 12 * 4 * 512 * 768
    one = deberta.batch_flops(BatchShape(1, 8))
    assert one - 8 * deberta.flops_per_token - deberta.attention_flops(8) == 12 * 4 * 512 * 768**2


def test_encoders_hold_the_whole_square_of_scores():
    shape = model_shape("BertBackbone", BERT_BASE)
    half = values_of("float16", "none")
    assert shape.working_bytes_per_token(512, half) >= 12 * 512 * (4 + 2)


def test_every_entry_is_whole():
    for name, family in FAMILIES.items():
        assert family.tokenizer in TOKENIZERS
        assert set(DECODER_POOLINGS) <= set(family.poolings)
        assert all(family_of_checkpoint(kind) == name for kind in family.checkpoints)
        assert (family.classifier is None) == family.shares_seam
        if family.classifier is not None:
            assert family.classifier.pooling in family.poolings
    assert family_of_checkpoint("gpt2") is None


def test_the_matrix_in_the_docs_is_the_table():
    document = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(" `"): line for line in document.splitlines() if "|" in line}
    for name, family in FAMILIES.items():
        held = strategies(name)
        cells = (
            f"`{name}`",
            f"`{family.tokenizer}`",
            *("yes" if strategy in held else "no" for strategy in ("pipeline", "tensor")),
            ", ".join(family.poolings),
            "chunks, tokamax" if family.shares_seam else "Keras' own",
            f"`{family.classifier.class_name}`" if family.classifier else "none in KerasHub",
            ", ".join(f"`{kind}`" for kind in family.checkpoints) or "none",
        )
        assert lines[name] == f"| {' | '.join(cells)} |"
