"""python plain_answers.py make DIR; python plain_answers.py answer TEXTS.json LENGTH MODEL OUT.npz

`make` writes small encoder presets and classifiers into DIR, which holds texts.json and odd.json,
and NAME.tokens.npz for each encoder: its tokens of all odd texts. `answer` says what plain Keras
answers for a model: `predict` with one row at a time, each padded to the full length, after
KerasHub's own preprocessors; a table of probabilities for each pooling, or what a whole classifier
says. Shares no code with the runner, and is run as a process of its own.
"""

import json
import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

M = keras_hub.models
ENCODER = {
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 48,
    "intermediate_dim": 96,
    "max_sequence_length": 128,
}
ENCODERS = ("bert", "bert_accents", "roberta", "deberta")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_pieces(texts: list[str]) -> list[str]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([text.lower() for text in texts], trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def byte_pairs(texts: list[str]) -> tuple[dict[str, int], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def sentence_pieces(path: Path, texts: list[str]) -> bytes:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=400, minloglevel=2,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]",
            eos_piece="[SEP]", unk_piece="[UNK]", hard_vocab_limit=False,
        )  # fmt: skip
    return path.read_bytes()


def encoders(folder: Path, texts: list[str]) -> dict[str, tuple]:
    """Name -> backbone, preprocessor and the class of its classifier."""
    words = word_pieces(texts)
    vocabulary, merges = byte_pairs(texts)
    proto = sentence_pieces(folder / "deberta.spm", texts)
    bert = M.BertTokenizer(words, lowercase=True)
    accents = M.BertTokenizer(
        words, lowercase=True, strip_accents=True, special_tokens_in_strings=True
    )
    roberta, deberta = M.RobertaTokenizer(vocabulary, merges), M.DebertaV3Tokenizer(proto)
    families = {
        "bert": ("Bert", bert, ENCODER),
        "bert_accents": ("Bert", accents, ENCODER | {"num_layers": 1}),
        "roberta": ("Roberta", roberta, ENCODER),
        "deberta": ("DebertaV3", deberta, ENCODER | {"bucket_size": 16}),
    }
    made = {}
    for name, (family, tokenizer, config) in families.items():
        backbone = getattr(M, f"{family}Backbone")(
            vocabulary_size=tokenizer.vocabulary_size(), **config
        )
        preprocessor = getattr(M, f"{family}TextClassifierPreprocessor")(
            tokenizer, sequence_length=40
        )
        made[name] = backbone, preprocessor, getattr(M, f"{family}TextClassifier")
    return made


def save_encoders(folder: Path, texts: list[str]) -> None:
    rng = np.random.default_rng(5)
    for name, (backbone, preprocessor, make_classifier) in encoders(folder, texts).items():
        # Larger than initializers make them, or all rows would look alike.
        for variable in backbone.variables:
            if variable.path.endswith(("kernel", "bias", "embeddings", "rel_embedding")):
                scale = 0.3 if len(variable.shape) > 1 else 0.1
                variable.assign(rng.normal(0, scale, variable.shape))
        (folder / name).mkdir()
        preset = str(folder / name / "preset")
        backbone.save_to_preset(preset)
        preprocessor.save_to_preset(preset)
        hidden = backbone.hidden_dim
        np.save(folder / name / "kernel.npy", rng.normal(0, 0.15, (hidden, 3)).astype("float32"))
        np.save(folder / name / "bias.npy", rng.normal(0, 0.1, 3).astype("float32"))
        if name == "bert_accents":
            continue
        activation = "softmax" if name == "roberta" else None
        classifier = make_classifier(
            backbone, num_classes=3, preprocessor=preprocessor, activation=activation
        )
        for variable in classifier.output_dense.variables:
            variable.assign(rng.normal(0, 0.5, variable.shape))
        (folder / f"{name}_classifier").mkdir()
        classifier.save_to_preset(str(folder / f"{name}_classifier" / "preset"))
        if name == "roberta":
            backbone.enable_lora(4)
            for variable in backbone.trainable_variables:
                variable.assign(rng.normal(0, 0.2, variable.shape))
            backbone.save_lora_weights(str(folder / name / "model.lora.h5"))


def preprocessor_of(preset: str, length: int):
    """From texts to arrays, as `fit` and `predict` of a classifier do: inside of tf.data."""
    import tensorflow as tf

    if "TextClassifierPreprocessor" in (Path(preset) / "preprocessor.json").read_text():
        layer = M.TextClassifierPreprocessor.from_preset(preset, sequence_length=length)
        return lambda texts: next(
            iter(tf.data.Dataset.from_tensor_slices(texts).batch(len(texts)).map(layer))
        )
    layer = M.CausalLMPreprocessor.from_preset(preset, sequence_length=length)
    if isinstance(layer, M.Gemma3CausalLMPreprocessor):
        return lambda texts: layer({"prompts": texts, "responses": [""] * len(texts)})[0]
    return lambda texts: layer(texts)[0]


def tokens_of(preset: str, texts: list[str], length: int) -> dict[str, np.ndarray]:
    batch = preprocessor_of(preset, length)(texts)
    return {name: np.asarray(batch[name]) for name in ("token_ids", "padding_mask")}


def answer(folder: Path, texts: list[str], length: int) -> dict[str, np.ndarray]:
    """Return what `predict` says of one row at a time."""
    preset = str(folder / "preset")
    if not (folder / "kernel.npy").is_file():
        classifier = M.TextClassifier.from_preset(preset)
        return {"predict": classifier.predict(texts, batch_size=1, verbose=0)}
    backbone = M.Backbone.from_preset(preset, dtype="float32")
    if (folder / "model.lora.h5").is_file():
        backbone.load_lora_weights(str(folder / "model.lora.h5"))
    kernel, bias = np.load(folder / "kernel.npy"), np.load(folder / "bias.npy")
    batch = preprocessor_of(preset, length)(texts)
    batch = {name: np.asarray(array, np.int32) for name, array in batch.items()}
    output = backbone.predict(batch, batch_size=1, verbose=0)
    output = output if isinstance(output, dict) else {"sequence_output": output}
    answers: dict[str, list[np.ndarray]] = {}
    for row in range(len(texts)):
        hidden = output["sequence_output"][row]
        real = batch["padding_mask"][row].astype(bool)
        pooled = {
            "padded-mean": hidden.mean(axis=0),
            "mean": hidden[real].mean(axis=0),
            "last": hidden[real][-1],
            "first": hidden[0],
        }
        if "pooled_output" in output:
            pooled["pooler"] = output["pooled_output"][row]
        for pooling, vector in pooled.items():
            exponents = np.exp(vector @ kernel + bias)
            answers.setdefault(pooling, []).append(exponents / exponents.sum())
    return {name: np.array(rows) for name, rows in answers.items()}


def make(folder: Path) -> None:
    save_encoders(folder, json.loads((folder / "texts.json").read_text()))
    odd = json.loads((folder / "odd.json").read_text())
    for name in ENCODERS:
        preset = str(folder / name / "preset")
        np.savez(folder / f"{name}.tokens.npz", **tokens_of(preset, odd, 64))


if __name__ == "__main__":
    keras.utils.set_random_seed(4)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        said = answer(Path(sys.argv[4]), json.loads(Path(sys.argv[2]).read_text())[:12],
                      int(sys.argv[3]))  # fmt: skip
        np.savez(sys.argv[5], **said)
