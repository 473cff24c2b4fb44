"""Texts -> TokenTable, with exactly the tokens of the preset's KerasHub preprocessor.

Needs neither Keras nor TensorFlow: SentencePiece and Hugging Face tokenizers run natively in the
driver, on all cores. `words.py` splits texts into words for WordPiece and RoBERTa.
"""

import functools
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from runner.common.errors import DataError, first_line, shown
from runner.common.records import TokenTable
from runner.data.words import byte_pair_words, bytes_as_letters, word_piece_words
from runner.preset.tokenizer_files import BytePairOptions, TokenizerFiles, WordPieceOptions

# Texts per call: enough to keep all cores busy, few enough to show progress and handle interrupts
# about every second.
CHUNK_ROWS = 256
# Tokens go to the model as int32.
MOST_TOKEN_ID = 2**31 - 1
# Size of the cache of words' tokens.
KEPT_WORDS = 1 << 18
# In WordPiece, a word of more UTF-8 bytes becomes the unknown token.
MOST_WORD_BYTES = 100


class _Tokenizer(Protocol):
    """A vocabulary, and how it splits texts into tokens."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def id_of(self, token: str) -> int | None: ...


def tokenize(
    texts: Sequence[str],
    files: TokenizerFiles,
    *,
    sequence_length: int,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> TokenTable:
    """Return the token ids of each text, truncated to `sequence_length`.

    For decoders, it packs start token, tokens and end token into `sequence_length + 1` positions
    and drops the last, like KerasHub's `CausalLMPreprocessor`. So a text of at least
    `sequence_length - 1` tokens loses its end token. Gemma 3's preprocessor takes a prompt and a
    response: the text is the prompt, the response is empty. For encoders, it truncates the text,
    which is one segment, so that start and end token fit, like `TextClassifierPreprocessor`.

    Args:
        on_progress: called with the number of rows done so far.

    Raises:
        DataError: the vocabulary is damaged, or lacks the start, end or padding token.
    """
    tokenizer = _open(files)
    start = [_id_of(tokenizer, files, files.start_token)] if files.add_start else []
    end = [_id_of(tokenizer, files, files.end_token)] if files.add_end else []
    pad_id = 0 if files.pad_token is None else _id_of(tokenizer, files, files.pad_token)
    room = sequence_length + (not files.is_segment) - len(start) - len(end)
    values: list[np.ndarray] = []
    lengths: list[int] = []
    for first in range(0, len(texts), CHUNK_ROWS):
        encoded = tokenizer.encode(list(texts[first : first + CHUNK_ROWS]))
        rows = [[*start, *ids[: max(room, 0)], *end][:sequence_length] for ids in encoded]
        lengths += map(len, rows)
        values.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32))
        on_progress(first + len(rows))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    table = np.concatenate([np.empty(0, np.int32), *values])
    return TokenTable(table, offsets, pad_id, end[0] if files.is_segment else None)


def _open(files: TokenizerFiles) -> _Tokenizer:
    if files.word_pieces is not None:
        return _word_pieces(files.vocabulary, files.word_pieces)
    if files.byte_pairs is None:
        return _SentencePiece(files.vocabulary)
    if files.byte_pairs.splits_words:
        return _byte_pairs_of_words(files.vocabulary, files.byte_pairs)
    return _BytePairs(files.vocabulary, files.byte_pairs)


class _SentencePiece:
    """A SentencePiece model, like KerasHub's `SentencePieceTokenizer`."""

    def __init__(self, vocabulary: Path) -> None:
        try:
            proto = vocabulary.read_bytes()
            if not proto:  # an empty model would load and give 0 for every piece
                raise ValueError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"{vocabulary} is not a SentencePiece model: {first_line(error)}. Copy it again "
                "from the preset's source."
            ) from None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=-1)

    def id_of(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)
        try:
            found = self._processor.id_to_piece(number)
        except IndexError:
            return None  # a damaged vocabulary may lack even the unknown token
        return number if found == token else None


class _BytePairs:
    """Byte-level BPE, like KerasHub's `BytePairTokenizer` outside of tf.data.

    That class tries to split a text into words first, but passes its regex to `Split` as a plain
    string, which `tokenizers` searches for literally and never finds (keras-hub 0.32). So its
    merges span the whole text between two special tokens, and so do these.
    """

    def __init__(self, vocabulary: Path, options: BytePairOptions) -> None:
        self._ids, model = _read_byte_pairs(vocabulary, options)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.add_special_tokens(list(options.unsplittable_tokens))
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=options.add_prefix_space, use_regex=False
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)


class _OfWords:
    """Tokenizes within words, as byte-level BPE and WordPiece do; caches the tokens of words.

    Args:
        ids: token -> id. split: text -> words. ids_of: word -> ids of its tokens.
    """

    def __init__(
        self,
        ids: dict[str, int],
        split: Callable[[str], list[str]],
        ids_of: Callable[[str], tuple[int, ...]],
    ) -> None:
        self._ids, self._split = ids, split
        self._ids_of = functools.lru_cache(KEPT_WORDS)(ids_of)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[*chain.from_iterable(map(self._ids_of, self._split(text)))] for text in texts]

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)


def _byte_pairs_of_words(vocabulary: Path, options: BytePairOptions) -> _OfWords:
    """Return byte-level BPE within words, like KerasHub's `BytePairTokenizer` inside of tf.data.

    `fit` and `predict` of a TextClassifier tokenize there, and RoBERTa was trained that way.
    Outside of tf.data, the same class does not split words (`_BytePairs`).
    """
    ids, model = _read_byte_pairs(vocabulary, options)
    kept, prefix = options.unsplittable_tokens, " " if options.add_prefix_space else ""
    letters = bytes_as_letters()

    def ids_of(word: str) -> tuple[int, ...]:
        if word in kept:
            return (ids[word],)
        spelled = "".join(letters[byte] for byte in word.encode("utf-8", "surrogatepass"))
        return tuple(token.id for token in model.tokenize(spelled))

    return _OfWords(ids, lambda text: byte_pair_words(prefix + text, kept), ids_of)


def _word_pieces(vocabulary: Path, options: WordPieceOptions) -> _OfWords:
    """Return WordPiece, like KerasHub's `WordPieceTokenizer`."""
    try:
        lines = vocabulary.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{vocabulary} is not a list of tokens: {first_line(error)}. Copy it again from the "
            "preset's source."
        ) from None
    # If a token is repeated, its last line wins.
    ids = {line.rstrip(): number for number, line in enumerate(lines[:-1] or lines)}
    unknown = options.unknown_token
    for token in (unknown, *options.unsplittable_tokens):
        if token not in ids:
            raise DataError(f"{vocabulary} must hold the special token {shown(token)}.")
    model = tokenizers.models.WordPiece(
        vocab=ids,
        unk_token=unknown,
        max_input_chars_per_word=MOST_WORD_BYTES,
        continuing_subword_prefix=options.suffix_indicator,
    )

    def ids_of(word: str) -> tuple[int, ...]:
        if len(word.encode("utf-8", "surrogatepass")) > MOST_WORD_BYTES:
            return (ids[unknown],)
        return tuple(token.id for token in model.tokenize(word))

    return _OfWords(ids, lambda text: word_piece_words(text, options), ids_of)


def _read_byte_pairs(
    vocabulary: Path, options: BytePairOptions
) -> tuple[dict[str, int], tokenizers.models.BPE]:
    """Return the token ids and the merges of a byte-pair encoding."""
    try:
        ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
        with open(options.merges, encoding="utf-8") as file:
            lines = [line.rstrip() for line in file if "#version:" not in line]
        merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
        model = tokenizers.models.BPE(vocab=ids, merges=merges)
    except Exception as error:  # what `tokenizers` raises has no narrower class
        raise DataError(
            f"{vocabulary} and {options.merges} are not a byte-pair encoding: {first_line(error)}"
        ) from None
    if not all(number <= MOST_TOKEN_ID for number in ids.values()):
        raise DataError(
            f"{vocabulary} must hold token ids of at most {MOST_TOKEN_ID}. "
            f"Received: {max(ids.values())}"
        )
    missing = [token for token in options.unsplittable_tokens if token not in ids]
    if missing:
        raise DataError(f"{vocabulary} must hold the special token {shown(missing[0])}.")
    return ids, model


def _id_of(tokenizer: _Tokenizer, files: TokenizerFiles, token: str | None) -> int:
    assert token is not None, "this is a bug: the family does not have a token that is added"
    number = tokenizer.id_of(token)
    if number is None:
        raise DataError(
            f"{files.vocabulary} must hold the token {token}, which {files.class_name} adds to "
            "every text."
        )
    return int(number)
