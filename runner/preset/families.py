"""The supported backbone families and their tokenizers, one entry each.

`docs/architecture.md` explains how to add a family, `docs/models.md` shows all of them as a table.
Imports neither Keras nor JAX.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.common.poolings import DECODER, ENCODER, poolings_of
from sharding.costs import ModelShape, encoder, gated, gated_halves
from sharding.layouts import RULES

# How a tokenizer splits texts.
SENTENCE_PIECES, BYTE_PAIRS, WORD_PIECES = "sentence-pieces", "byte-pairs", "word-pieces"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """How a KerasHub tokenizer splits a text, and the tokens that its preprocessor adds.

    kind: SENTENCE_PIECES, BYTE_PAIRS or WORD_PIECES.
    start: None if the family has none. pad: None if padding has the id 0, whatever its token.
    others: more special tokens to recognize in texts. Byte-level BPE always recognizes them,
    WordPiece only if the preset says so.
    is_segment: packed by `TextClassifierPreprocessor`, which always keeps the end token; else by
    `CausalLMPreprocessor`, which packs one extra position and drops the last.
    splits_words: byte-level BPE merges only within words.
    """

    kind: str
    start: str | None
    end: str
    pad: str | None = None
    others: tuple[str, ...] = ()
    is_segment: bool = False
    splits_words: bool = False

    @property
    def special_tokens(self) -> list[str]:
        """All of its special tokens."""
        added = (self.start, self.end, self.pad, *self.others)
        return [token for token in added if token is not None]


# KerasHub's tokenizer class -> its tokens, as it passes them to `_add_special_token`.
TOKENIZERS = {
    "GemmaTokenizer": Tokenizer(SENTENCE_PIECES, "<bos>", "<eos>", "<pad>"),
    "Gemma3Tokenizer": Tokenizer(SENTENCE_PIECES, "<bos>", "<eos>", "<pad>"),
    "LlamaTokenizer": Tokenizer(SENTENCE_PIECES, "<s>", "</s>"),
    "MistralTokenizer": Tokenizer(SENTENCE_PIECES, "<s>", "</s>"),
    "Llama3Tokenizer": Tokenizer(
        BYTE_PAIRS,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        others=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "QwenTokenizer": Tokenizer(BYTE_PAIRS, None, "<|endoftext|>"),
    "Qwen3Tokenizer": Tokenizer(BYTE_PAIRS, None, "<|im_end|>", "<|endoftext|>"),
    "BertTokenizer": Tokenizer(
        WORD_PIECES, "[CLS]", "[SEP]", "[PAD]", others=("[MASK]",), is_segment=True
    ),
    "RobertaTokenizer": Tokenizer(
        *(BYTE_PAIRS, "<s>", "</s>", "<pad>"),
        others=("<mask>",),
        is_segment=True,
        splits_words=True,
    ),
    "DebertaV3Tokenizer": Tokenizer(SENTENCE_PIECES, "[CLS]", "[SEP]", "[PAD]", is_segment=True),
}


@dataclass(frozen=True, slots=True)
class Classifier:
    """A family's KerasHub `TextClassifier`: the head in a whole task preset.

    pooling: a key of `poolings.POOLINGS`. dense: the activation of the layer between pooling and
    logits, a key of `program.ACTIVATIONS`; None if there is no such layer.
    """

    class_name: str
    pooling: str
    dense: str | None = None


DECODER_POOLINGS = poolings_of(DECODER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the runner knows about a backbone family.

    shape: reads the dimensions from a config. tokenizer: a key of `TOKENIZERS`. checkpoints: the
    Hugging Face model types that KerasHub converts to it. shares_seam: its attention layers hand
    over queries, keys and values (`attention.py`), so the masked half need not be computed.
    has_stages: a layer needs only hidden states and mask from earlier layers, so the backbone can
    be cut into pipeline stages. has_positions: it has one embedding per position, so rows are
    limited to the config's max_sequence_length. classifier: its TextClassifier, if it has one.
    """

    shape: Callable[[Mapping[str, Any]], ModelShape]
    tokenizer: str
    poolings: tuple[str, ...] = DECODER_POOLINGS
    checkpoints: tuple[str, ...] = ()
    shares_seam: bool = True
    has_stages: bool = True
    has_positions: bool = False
    classifier: Classifier | None = None


def _encoder(
    tokenizer: str,
    classifier: Classifier,
    *,
    checkpoints: tuple[str, ...] = (),
    has_stages: bool = True,
    has_positions: bool = True,
) -> Family:
    return Family(
        shape=encoder,
        tokenizer=tokenizer,
        poolings=poolings_of(ENCODER, own=classifier.pooling),
        checkpoints=checkpoints,
        shares_seam=False,
        has_stages=has_stages,
        has_positions=has_positions,
        classifier=classifier,
    )


# By KerasHub's backbone class.
FAMILIES: dict[str, Family] = {
    "GemmaBackbone": Family(
        shape=gated_halves, tokenizer="GemmaTokenizer", checkpoints=("gemma", "gemma2")
    ),
    "Gemma3Backbone": Family(
        shape=gated, tokenizer="Gemma3Tokenizer", checkpoints=("gemma3_text",)
    ),
    "LlamaBackbone": Family(shape=gated, tokenizer="LlamaTokenizer"),
    "Llama3Backbone": Family(shape=gated, tokenizer="Llama3Tokenizer", checkpoints=("llama",)),
    "MistralBackbone": Family(shape=gated, tokenizer="MistralTokenizer", checkpoints=("mistral",)),
    "QwenBackbone": Family(shape=gated, tokenizer="QwenTokenizer", checkpoints=("qwen2",)),
    "Qwen3Backbone": Family(shape=gated, tokenizer="Qwen3Tokenizer", checkpoints=("qwen3",)),
    "BertBackbone": _encoder(
        "BertTokenizer", Classifier("BertTextClassifier", "pooler"), checkpoints=("bert",)
    ),
    "RobertaBackbone": _encoder(
        "RobertaTokenizer",
        Classifier("RobertaTextClassifier", "first", dense="tanh"),
        checkpoints=("roberta",),
    ),
    # Each layer also needs the embedded distances, computed from the first layer's input.
    "DebertaV3Backbone": _encoder(
        "DebertaV3Tokenizer",
        Classifier("DebertaV3TextClassifier", "first", dense="gelu"),
        has_stages=False,
        has_positions=False,
    ),
}
# Gemma 3 config keys that make the backbone also take images or return a pooled vector.
MORE_THAN_TEXT = ("vision_encoder", "is_embedding_model")


def strategies(class_name: str) -> tuple[str, ...]:
    """Return the strategies that can split a replica of this family over several workers."""
    found = ["pipeline"] if FAMILIES[class_name].has_stages else []
    return (*found, "tensor") if class_name in RULES else tuple(found)


def family_of_checkpoint(model_type: str) -> str | None:
    """Return the backbone class for a Hugging Face model type, None if KerasHub converts none."""
    return next(
        (name for name, family in FAMILIES.items() if model_type in family.checkpoints), None
    )


def model_shape(class_name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the dimensions of the backbone that a KerasHub config.json describes.

    Raises:
        ValueError: the class is not in `FAMILIES`, a key is missing, or the backbone takes images
            or returns a pooled vector.
    """
    if class_name not in FAMILIES:
        raise ValueError(
            f"Expected a text backbone, one of {', '.join(sorted(FAMILIES))}. "
            f"Received: class_name={class_name!r}"
        )
    for key in MORE_THAN_TEXT:
        if config.get(key):
            raise ValueError(
                f"Expected a {class_name} from token ids to hidden states only, as in the presets "
                f"whose names end in _text. Received: a config with {key}"
            )
    try:
        return FAMILIES[class_name].shape(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"The config of {class_name} has a missing or invalid value: {error}."
        ) from error
