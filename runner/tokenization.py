"""Texts -> TokenTable, token for token what the preset's KerasHub preprocessor makes of them.

Needs neither Keras nor TensorFlow: SentencePiece runs natively, on all cores, in the driver.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from runner.errors import DataError
from runner.presets import TokenizerFiles
from runner.records import TokenTable

# Texts a call: large enough that all cores have work, small enough that a count can be shown
# and an interrupt is heard within a second or so.
CHUNK_ROWS = 256


def tokenize(
    texts: Sequence[str],
    files: TokenizerFiles,
    *,
    sequence_length: int,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> TokenTable:
    """Return the token ids of each text, cut to `sequence_length`.

    As `CausalLMPreprocessor` of KerasHub does: start token, tokens, end token are packed into one
    position more than asked for and the last position is dropped, so a text of at least
    `sequence_length - 1` tokens loses its end token.

    Args:
        on_progress: called with the rows done so far.

    Raises:
        DataError: the vocabulary is no SentencePiece model, or lacks the start or end token.
    """
    processor = _load(files.vocabulary)
    start = [_piece_id(processor, files, files.start_token)] if files.add_start else []
    end = [_piece_id(processor, files, files.end_token)] if files.add_end else []
    room = sequence_length + 1 - len(start) - len(end)
    values: list[np.ndarray] = []
    lengths: list[int] = []
    for first in range(0, len(texts), CHUNK_ROWS):
        encoded = processor.encode(list(texts[first : first + CHUNK_ROWS]), num_threads=-1)
        rows = [[*start, *ids[: max(room, 0)], *end][:sequence_length] for ids in encoded]
        lengths += map(len, rows)
        values.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32))
        on_progress(first + len(rows))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return TokenTable(np.concatenate([np.empty(0, np.int32), *values]), offsets)


def _load(vocabulary: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=vocabulary.read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(f"{vocabulary} is no SentencePiece model: {error}") from None


def _piece_id(
    processor: sentencepiece.SentencePieceProcessor, files: TokenizerFiles, piece: str
) -> int:
    number = processor.piece_to_id(piece)
    if processor.id_to_piece(number) != piece:
        raise DataError(
            f"{files.vocabulary} must hold the token {piece}, which {files.class_name} packs "
            "around every text."
        )
    return int(number)
