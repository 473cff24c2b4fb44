"""Presets that are whole KerasHub TextClassifiers, and checkpoints of Hugging Face transformers."""

import json
import shutil

import h5py
import numpy as np
import pytest

from runner.common.errors import ConfigError, DataError
from runner.config.run_config import RunConfig
from runner.config.task import CONTEST, Task
from runner.preset.classifiers import TASK, TASK_WEIGHTS, read_classifier
from runner.preset.reader import read_preset
from runner.preset.resolve import check_head, settle
from tests.conftest import ROOT, TOLERANCE

# Of the preprocessors in plain_answers.py, which nobody names on the command line.
OWN_LENGTH = 40


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def expected_of(plain, name):
    """What the classifier's own `predict` says; RoBERTa's ends in softmax, the others in logits."""
    said = plain.answers(f"{name}_classifier")["predict"]
    return said if name == "roberta" else softmax(said)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("bert", ("--mode", "single")),
        *(
            pytest.param(name, flags, marks=SLOW)
            for name, flags in {
                "roberta": ("--mode", "single"),
                "deberta": ("--mode", "data-parallel", "--num-workers", "2"),
            }.items()
        ),
        pytest.param("bert", ("--mode", "model-parallel"), marks=SLOW),
    ],
)
def test_a_run_equals_predict_of_the_whole_classifier(plain, predict, name, flags):
    preset = plain.model(f"{name}_classifier") / "preset"
    answer = predict("--preset", str(preset), "--input", str(plain.rows), *flags)
    expected = expected_of(plain, name)
    assert expected.std(axis=0).max() > 0.05, "all rows are alike: equality means little"
    assert np.abs(answer.probabilities - expected).max() < TOLERANCE
    assert answer.report["config"]["sequence_length"] == OWN_LENGTH
    assert answer.report["config"]["pooling"] == ("pooler" if name == "bert" else "first")


def config(**named):
    return RunConfig(preset=ROOT, **named)


def test_what_the_person_asks_for_goes_before_the_classifiers_own(plain):
    preset = read_preset(plain.model("roberta_classifier") / "preset")
    settled = settle(config(sequence_length=64), preset)
    assert (settled.pooling, settled.sequence_length) == ("first", 64)
    own_head = settle(config(head_kernel=ROOT, head_bias=ROOT, pooling="mean"), preset)
    assert (own_head.pooling, own_head.sequence_length) == ("mean", 128)
    with pytest.raises(ConfigError, match="trained with --pooling first; omit the flag"):
        settle(config(pooling="mean"), preset)


@pytest.fixture
def copy(plain, tmp_path):
    """A classifier preset that may be changed."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(plain.model(f"{name}_classifier") / "preset", folder)
        return folder

    return make


def change_task(folder, **values):
    content = json.loads((folder / TASK).read_text())
    content["config"] |= values
    (folder / TASK).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 5}, r"must have 3 classes.*Received: num_classes=5"),
        ({"num_classes": "3"}, "must set num_classes to a positive integer"),
        ({"activation": "relu"}, "must set activation to one of linear, softmax, sigmoid.*relu"),
    ],
)
def test_classifiers_that_cannot_be_followed(copy, values, message):
    folder = copy("bert")
    change_task(folder, **values)
    with pytest.raises(DataError, match=message):
        check_head(read_preset(folder), None, None, CONTEST)


def test_a_sigmoid_wants_a_task_of_its_kind(copy):
    folder = copy("bert")
    change_task(folder, activation="sigmoid")
    with pytest.raises(
        ConfigError, match=r"has the activation sigmoid, so \[task\] must set head to it"
    ):
        check_head(read_preset(folder), None, None, CONTEST)
    labels = {"label_columns": ("a", "b", "c"), "head": "sigmoid"}
    task = Task(text_columns=("text",), template="{text}", **labels)
    check_head(read_preset(folder), None, None, task)


@pytest.mark.parametrize(("name", "message"), [("bert", "damaged"), ("roberta", "damaged")])
def test_damaged_task_weights(copy, name, message):
    folder = copy(name)
    (folder / TASK_WEIGHTS).write_bytes((folder / TASK_WEIGHTS).read_bytes()[:900])
    with pytest.raises(DataError, match=message):
        check_head(read_preset(folder), None, None, CONTEST)


def test_task_weights_of_another_model(copy):
    folder = copy("roberta")
    with h5py.File(folder / TASK_WEIGHTS, "r+") as file:
        kernel = file["layers/dense/vars/0"][()]
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = kernel[:-1]
    with pytest.raises(DataError, match="does not fit its backbone"):
        check_head(read_preset(folder), None, None, CONTEST)
    with h5py.File(folder / TASK_WEIGHTS, "r+") as file:
        kernel[0, 0] = np.nan
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = kernel
    with pytest.raises(DataError, match="must hold finite weights"):
        check_head(read_preset(folder), None, None, CONTEST)


def test_other_tasks_bring_no_head(copy):
    folder = copy("bert")
    content = json.loads((folder / TASK).read_text())
    (folder / TASK).write_text(json.dumps(content | {"class_name": "BertMaskedLM"}))
    assert read_classifier(folder, "BertBackbone") is None
    assert read_classifier(folder, "GemmaBackbone") is None
    with pytest.raises(ConfigError, match=r"--preset needs a head.*or a preset that is a whole"):
        check_head(read_preset(folder), None, None, CONTEST)
    (folder / TASK).write_text(json.dumps(content | {"class_name": "BertClassifier"}))
    assert read_classifier(folder, "BertBackbone") is not None


@pytest.mark.slow
def test_a_prepared_classifier_keeps_its_head(cli, plain, predict, tmp_path):
    source, made = plain.model("bert_classifier") / "preset", tmp_path / "int8"
    files = ("--preset", str(source), "--output", str(made), "--input", str(plain.rows))
    done = cli("prepare", *files, "--quantization", "int8")
    assert done.returncode == 0, done.stderr
    assert "first 8 rows" in done.stdout
    flags = ("--mode", "single", "--input", str(plain.rows))
    prepared = predict("--preset", str(made), *flags)
    on_the_fly = predict("--preset", str(source), *flags, "--quantization", "int8")
    assert np.array_equal(prepared.probabilities, on_the_fly.probabilities)
    assert 1e-6 < np.abs(prepared.probabilities - expected_of(plain, "bert")).max() < 0.1


def bert_checkpoint(folder, vocabulary):
    """Write a small random BERT as transformers saves one."""
    from safetensors.numpy import save_file

    layers, heads, hidden, between = 2, 4, 32, 64
    words = vocabulary.read_text().splitlines()
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(words),
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden,
        "intermediate_size": between, "max_position_embeddings": 96, "type_vocab_size": 2,
    }  # fmt: skip
    shapes = {
        "embeddings.word_embeddings.weight": (len(words), hidden),
        "embeddings.position_embeddings.weight": (96, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    for number in range(layers):
        for name, shape in {
            **{f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")},
            "attention.output.dense": (hidden, hidden),
            "attention.output.LayerNorm": (hidden,),
            "intermediate.dense": (between, hidden),
            "output.dense": (hidden, between),
            "output.LayerNorm": (hidden,),
        }.items():
            shapes[f"encoder.layer.{number}.{name}.weight"] = shape
            shapes[f"encoder.layer.{number}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(3)
    folder.mkdir()
    tensors = {name: rng.normal(0, 0.3, shape).astype("float32") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return tensors


def test_a_checkpoint_is_pointed_to_prepare(cli, plain, tmp_path):
    words = plain.model("bert") / "preset" / "assets" / "tokenizer" / "vocabulary.txt"
    bert_checkpoint(tmp_path / "hf", words)
    with pytest.raises(DataError, match=r"is a Hugging Face checkpoint.*run.py prepare --preset"):
        read_preset(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(DataError, match=r"cannot convert.*gemma, gemma2.*'whisper'"):
        read_preset(tmp_path / "hf")


@pytest.mark.slow
def test_a_checkpoint_is_converted(cli, plain, predict, tmp_path):
    """The converted weights lie where they should, and a run of them is that of plain NumPy."""
    words = plain.model("bert") / "preset" / "assets" / "tokenizer" / "vocabulary.txt"
    tensors = bert_checkpoint(tmp_path / "hf", words)
    flags = ("--preset", str(tmp_path / "hf"), "--output", str(tmp_path / "made"))
    done = cli("prepare", *flags, "--quantization", "none")
    assert done.returncode == 0, done.stderr
    preset = read_preset(tmp_path / "made")
    assert (preset.class_name, preset.max_positions) == ("BertBackbone", 96)
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(32, 3)).astype("float32"), np.zeros(3, "float32")
    np.save(tmp_path / "k.npy", kernel)
    np.save(tmp_path / "b.npy", bias)
    head = ("--head-kernel", str(tmp_path / "k.npy"), "--head-bias", str(tmp_path / "b.npy"))
    answer = predict(
        *("--preset", str(tmp_path / "made"), *head, "--input", str(plain.rows)),
        *("--mode", "single", "--pooling", "mean", "--sequence-length", "64"),
    )
    from runner.data.tokenization import tokenize

    tokens = tokenize(plain.texts, preset.tokenizer, sequence_length=64)
    for row, start in enumerate(tokens.offsets[:-1]):
        ids = tokens.values[start : tokens.offsets[row + 1]]
        hidden = bert_in_numpy(tensors, ids, layers=2, heads=4)
        expected = softmax((hidden.mean(axis=0) @ kernel + bias)[None])[0]
        assert np.abs(answer.probabilities[row] - expected).max() < TOLERANCE


def bert_in_numpy(tensors, ids, *, layers, heads):
    """Hidden states of one row after Devlin et al. 2018, in float64."""
    weights = {name: array.astype(np.float64) for name, array in tensors.items()}

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for number in range(layers):
        prefix = f"encoder.layer.{number}"
        query, key, value = (
            dense(x, f"{prefix}.attention.self.{part}").reshape(len(ids), heads, -1)
            for part in ("query", "key", "value")
        )
        logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
        weighted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weighted /= weighted.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weighted, value).reshape(len(ids), -1)
        attended = dense(attended, f"{prefix}.attention.output.dense")
        x = norm(x + attended, f"{prefix}.attention.output.LayerNorm")
        y = dense(x, f"{prefix}.intermediate.dense")
        # The tanh form of GELU, which KerasHub's BERT has.
        y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = norm(x + dense(y, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
    return x
