"""Tokens of encoders, token for token those of KerasHub's own preprocessors inside of tf.data."""

from dataclasses import replace

import numpy as np
import pytest

from runner.common.errors import DataError
from runner.common.records import TokenTable
from runner.data.tokenization import tokenize
from runner.data.words import byte_pair_words, bytes_as_letters, word_piece_words
from runner.preset.reader import read_preset
from runner.preset.tokenizer_files import BytePairOptions, WordPieceOptions
from tests.conftest import PLAIN_LENGTH

PLAIN = WordPieceOptions(
    lowercase=False,
    strip_accents=False,
    split_on_cjk=True,
    suffix_indicator="##",
    unknown_token="[UNK]",
    unsplittable_tokens=(),
)


@pytest.mark.parametrize("name", ["bert", "bert_accents", "roberta", "deberta"])
def test_odd_texts_as_the_presets_preprocessor(plain, name):
    files = read_preset(plain.model(name) / "preset").tokenizer
    table = tokenize(plain.odd, files, sequence_length=PLAIN_LENGTH)
    rows = tuple(range(len(plain.odd)))
    tokens, lengths = table.batch_arrays(rows, len(rows), PLAIN_LENGTH)
    expected = plain.tokens(name)
    for text, ours, theirs in zip(plain.odd, tokens, expected["token_ids"], strict=True):
        assert ours.tolist() == theirs.tolist(), repr(text)
    # KerasHub's mask also hides a padding token that the text itself spells.
    spelled = [row for row, text in enumerate(plain.odd) if "[PAD]" in text]
    if name != "bert_accents":
        spelled = []
    hidden = expected["padding_mask"].sum(axis=1) != lengths
    assert set(np.flatnonzero(hidden)) <= set(spelled)
    assert (lengths == PLAIN_LENGTH).any()
    assert (lengths < PLAIN_LENGTH / 2).any()


def test_words_of_word_piece_by_hand():
    assert word_piece_words("It's $5.\x00\u00a0ok\u200b \u4e2d\u6587", PLAIN) == [
        *("It", "'", "s", "$", "5", ".", "\u00a0ok", "\u4e2d", "\u6587"),
    ]


def test_words_of_byte_pairs_by_hand():
    kept = ("<s>", "<mask>")
    assert byte_pair_words("it's  two\n\n words<mask> 12 ", kept) == [
        *("it", "'s", " ", " two", "\n\n", " words", "<mask>", " 12", " "),
    ]
    assert len(set(bytes_as_letters())) == 256
    assert [bytes_as_letters()[byte] for byte in b"a \n"] == ["a", "\u0120", "\u010a"]


def test_a_row_that_is_cut_keeps_its_end_token():
    """What --time-limit cuts is what a run at that length would have."""
    table = TokenTable(np.arange(1, 9, dtype=np.int32), np.array([0, 5, 8]), 0, end_id=99)
    tokens, lengths = table.batch_arrays((0, 1), 3, 4)
    assert tokens.tolist() == [[1, 2, 3, 99], [6, 7, 8, 0], [0, 0, 0, 0]]
    assert lengths.tolist() == [4, 3, 0]


def test_rows_at_every_length_end_as_a_segment_does(plain):
    files = read_preset(plain.model("bert") / "preset").tokenizer
    whole = tokenize(plain.texts, files, sequence_length=PLAIN_LENGTH)
    for length in (2, 3, 17):
        cut = tokenize(plain.texts, files, sequence_length=length)
        rows = tuple(range(len(plain.texts)))
        expected = cut.batch_arrays(rows, len(rows), length)
        answer = whole.batch_arrays(rows, len(rows), length)
        assert np.array_equal(answer[0], expected[0])
        assert np.array_equal(answer[1], expected[1])


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("word_pieces", "[CLS]\n[SEP]\n[PAD]\n", r"must hold the special token '\[UNK\]'"),
        ("word_pieces", "[UNK]\n[SEP]\n[PAD]\n", r"must hold the token \[CLS\]"),
        ("byte_pairs", '{"<s>": 0}', "must hold the special token"),
    ],
)
def test_vocabularies_without_what_is_packed(plain, tmp_path, kind, content, message):
    name = "bert" if kind == "word_pieces" else "roberta"
    files = read_preset(plain.model(name) / "preset").tokenizer
    (tmp_path / "vocabulary").write_text(content)
    (tmp_path / "merges").write_text("")
    pairs = BytePairOptions(tmp_path / "merges", ("<s>", "</s>"), False, splits_words=True)
    changed = replace(files, vocabulary=tmp_path / "vocabulary")
    if kind == "byte_pairs":
        changed = replace(changed, byte_pairs=pairs)
    with pytest.raises(DataError, match=message):
        tokenize(["x"], changed, sequence_length=8)


def test_a_sentencepiece_model_that_lost_its_pieces(models, tmp_path):
    """Its first bytes are gone, and it still loads."""
    files = read_preset(models["gemma2"].preset).tokenizer
    (tmp_path / "vocabulary").write_bytes(files.vocabulary.read_bytes()[62:])
    with pytest.raises(DataError, match="must hold the token <bos>"):
        tokenize(["x"], replace(files, vocabulary=tmp_path / "vocabulary"), sequence_length=8)
