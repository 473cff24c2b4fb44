"""A preset's tokenizer.json, preprocessor.json and assets -> how it turns text into tokens.

Reads only JSON; `data/tokenization.py` opens the vocabulary and tokenizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.errors import DataError, shown
from runner.preset.families import BYTE_PAIRS, SENTENCE_PIECES, TOKENIZERS, WORD_PIECES, Tokenizer
from runner.preset.json_files import read_json, settings_of

# Keys of a tokenizer's config that would change tokens and are not supported.
UNSUPPORTED_OPTIONS = (
    *("sequence_length", "add_bos", "add_eos"),
    *("bos_token", "eos_token", "misc_special_tokens"),
)
ASSETS = Path("assets", "tokenizer")
VOCABULARIES = {
    SENTENCE_PIECES: "vocabulary.spm",
    BYTE_PAIRS: "vocabulary.json",
    WORD_PIECES: "vocabulary.txt",
}


@dataclass(frozen=True, slots=True)
class BytePairOptions:
    """What byte-level BPE needs besides its vocabulary.

    unsplittable_tokens: strings that become one token wherever they occur in a text. splits_words:
    merges stay within words, as GPT-2 defines them.
    """

    merges: Path
    unsplittable_tokens: tuple[str, ...]
    add_prefix_space: bool
    splits_words: bool = False


@dataclass(frozen=True, slots=True)
class WordPieceOptions:
    """What WordPiece needs besides its vocabulary.

    unsplittable_tokens: as for `BytePairOptions`; empty unless the preset asks for them.
    """

    lowercase: bool
    strip_accents: bool
    split_on_cjk: bool
    suffix_indicator: str
    unknown_token: str
    unsplittable_tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """How a preset turns text into tokens.

    is_segment: packed as by KerasHub's `TextClassifierPreprocessor`, else by
    `CausalLMPreprocessor`. sequence_length: of the preset's own preprocessor, None if not set.
    """

    class_name: str
    vocabulary: Path
    start_token: str | None
    end_token: str
    pad_token: str | None
    add_start: bool
    add_end: bool
    byte_pairs: BytePairOptions | None = None
    word_pieces: WordPieceOptions | None = None
    is_segment: bool = False
    sequence_length: int | None = None


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Return how the preset directory `path` turns text into tokens.

    Raises:
        DataError: a file is missing or damaged, or sets an option that is not supported.
    """
    file = path / "tokenizer.json"
    content = read_json(file)
    class_name = str(content.get("class_name"))
    if class_name not in TOKENIZERS:
        raise DataError(
            f"{file} must name one of {', '.join(sorted(TOKENIZERS))}. "
            f"Received: class_name={class_name!r}"
        )
    known, config = TOKENIZERS[class_name], settings_of(file, content)
    for key in UNSUPPORTED_OPTIONS:
        if config.get(key):
            raise DataError(
                f"{file} must not set {key}, which this runner does not support. "
                f"Received: {key}={shown(config[key])}"
            )
    options: dict[str, Any] = {}
    preprocessor = path / "preprocessor.json"
    if preprocessor.is_file():
        options = settings_of(preprocessor, read_json(preprocessor))
    length = options.get("sequence_length")
    return TokenizerFiles(
        class_name=class_name,
        vocabulary=_asset(path, VOCABULARIES[known.kind]),
        start_token=known.start,
        end_token=known.end,
        pad_token=known.pad,
        # A classifier's preprocessor has no such options.
        add_start=known.start is not None and bool(options.get("add_start_token", True)),
        add_end=bool(options.get("add_end_token", True)),
        byte_pairs=_byte_pairs(path, known, config) if known.kind == BYTE_PAIRS else None,
        word_pieces=_word_pieces(file, known, config) if known.kind == WORD_PIECES else None,
        is_segment=known.is_segment,
        sequence_length=length if type(length) is int and length > 0 else None,
    )


def _byte_pairs(path: Path, known: Tokenizer, config: dict[str, Any]) -> BytePairOptions:
    unsplittable = _tokens(path / "tokenizer.json", config, "unsplittable_tokens")
    if unsplittable is None:
        unsplittable = known.special_tokens
    return BytePairOptions(
        merges=_asset(path, "merges.txt"),
        unsplittable_tokens=tuple(unsplittable),
        add_prefix_space=bool(config.get("add_prefix_space", False)),
        splits_words=known.splits_words,
    )


def _word_pieces(file: Path, known: Tokenizer, config: dict[str, Any]) -> WordPieceOptions:
    if not config.get("split", True):
        raise DataError(
            f"{file} must split texts into words, since rows are whole texts. Received: split=false"
        )
    suffix, unknown = config.get("suffix_indicator", "##"), config.get("oov_token", "[UNK]")
    for key, value in {"suffix_indicator": suffix, "oov_token": unknown}.items():
        if not isinstance(value, str) or not value:
            raise DataError(
                f"{file} must set {key} to a non-empty string. Received: {shown(value)}"
            )
    found: list[str] = []
    if config.get("special_tokens_in_strings"):
        found = known.special_tokens + (_tokens(file, config, "special_tokens") or [])
    return WordPieceOptions(
        lowercase=bool(config.get("lowercase", False)),
        strip_accents=bool(config.get("strip_accents", False)),
        split_on_cjk=bool(config.get("split_on_cjk", True)),
        suffix_indicator=suffix,
        unknown_token=unknown,
        unsplittable_tokens=tuple(found),
    )


def _tokens(file: Path, config: dict[str, Any], key: str) -> list[str] | None:
    tokens = config.get(key)
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(
        isinstance(token, str) and token for token in tokens
    ):
        raise DataError(f"{file} must set {key} to a list of tokens. Received: {shown(tokens)}")
    return tokens


def _asset(path: Path, name: str) -> Path:
    asset = path / ASSETS / name
    if not asset.is_file():
        raise DataError(f"The preset is missing a file of its tokenizer. Expected: {asset}")
    return asset
