"""A text -> its words, as KerasHub splits them before it finds tokens in each.

KerasHub has the rules of BERT's and GPT-2's original code as RE2 patterns (TensorFlow Text). These
are the same rules for the `regex` package. In RE2, \\s matches only ASCII spaces. Does not know
vocabularies.
"""

import functools
import unicodedata

import regex

from runner.preset.tokenizer_files import WordPieceOptions

SPACE = regex.compile(r"[ \t\n\r\f]|\p{Cc}|\p{Cf}")
# All ASCII characters but letters, digits and spaces, including those that Unicode calls symbols.
PUNCTUATION = r"[!-/]|[:-@]|[\[-`]|[{-~]|\p{P}"
# https://github.com/google-research/bert/blob/master/tokenization.py, _is_chinese_char
CJK = (
    r"[\u4E00-\u9FFF]|[\u3400-\u4DBF]|[\U00020000-\U0002A6DF]|[\U0002A700-\U0002B73F]"
    r"|[\U0002B740-\U0002B81F]|[\U0002B820-\U0002CEAF]|[\uF900-\uFAFF]|[\U0002F800-\U0002FA1F]"
)
# What NFKC_Casefold also removes: Unicode's Default_Ignorable_Code_Point.
IGNORABLE = regex.compile(
    r"[\u00AD\u034F\u061C\u115F-\u1160\u17B4-\u17B5\u180B-\u180F\u200B-\u200F\u202A-\u202E"
    r"\u2060-\u206F\u3164\uFE00-\uFE0F\uFEFF\uFFA0\uFFF0-\uFFF8\U0001BCA0-\U0001BCA3"
    r"\U0001D173-\U0001D17A\U000E0000-\U000E0FFF]"
)
# RE2 has no lookahead, so KerasHub marks a space that belongs to the next word with this digit.
# Texts that contain the digit lose it, in KerasHub and therefore here.
MARK = "\u096c"
WIDE_SPACES = r"\u00A0\u2009\u202F\u3000"
BEFORE_A_WORD = regex.compile(rf"( )([^ \t\n\r\f{WIDE_SPACES}])")
AT_THE_END = regex.compile(rf"([ \t\n\r\f]{WIDE_SPACES})\Z")
GPT_2_WORDS = regex.compile(
    rf"'s|'t|'re|'ve|'m|'ll|'d|[ \t\n\r\f{WIDE_SPACES}]+[\n\r\t\f{MARK}{WIDE_SPACES}]"
    rf"| ?\p{{L}}+| ?\p{{N}}+| ?[^ \t\n\r\f\p{{L}}\p{{N}}{WIDE_SPACES}]+"
)
LAST_SPACES = f" \t\r\f\v{MARK}\u00a0\u2009\u202f\u3000"


def word_piece_words(text: str, options: WordPieceOptions) -> list[str]:
    """Return the words of a text; each punctuation mark and CJK character is its own word."""
    if options.strip_accents:
        decomposed = unicodedata.normalize("NFD", text)
        text = "".join(sign for sign in decomposed if unicodedata.category(sign) != "Mn")
    kept = options.unsplittable_tokens
    pieces = _pieces(_delimiters(options.split_on_cjk, kept), text)
    words = [piece for piece in pieces if not SPACE.fullmatch(piece)]
    if not options.lowercase:
        return words
    return [word if word in kept else _fold(word) for word in words]


@functools.cache
def _delimiters(split_on_cjk: bool, kept: tuple[str, ...]) -> regex.Pattern:
    parts = [*map(regex.escape, kept), SPACE.pattern, PUNCTUATION]
    return regex.compile("|".join([*parts, *([CJK] if split_on_cjk else [])]))


@functools.lru_cache(1 << 18)
def _fold(word: str) -> str:
    """Return a word's NFKC_Casefold, like `tf_text.case_fold_utf8`."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())
    return IGNORABLE.sub("", folded)


def byte_pair_words(text: str, kept: tuple[str, ...]) -> list[str]:
    """Return the words of a text, each with the space before it; tokens in `kept` stay whole.

    The steps are those of KerasHub's `split_strings_for_bpe`.
    """
    text = BEFORE_A_WORD.sub(rf"{MARK}\1\2", text)
    text = AT_THE_END.sub(rf"\1{MARK}", text)
    words: list[str] = []
    for piece in _kept_pattern(kept).split(text) if kept else [text]:
        if piece in kept:
            words.append(piece)
            continue
        for word in _pieces(GPT_2_WORDS, piece):
            # A space that ends a word becomes its own word.
            parts = (word[:-1], word[-1]) if word[-1] in LAST_SPACES else (word,)
            words += [part for part in parts if part and part != MARK]
    return words


@functools.cache
def _kept_pattern(kept: tuple[str, ...]) -> regex.Pattern:
    return regex.compile(f"({'|'.join(map(regex.escape, kept))})")


def _pieces(pattern: regex.Pattern, text: str) -> list[str]:
    """Return the matches and the text between them, in order, like `tf_text.regex_split`."""
    pieces, at = [], 0
    for match in pattern.finditer(text):
        pieces += [text[at : match.start()], match.group()]
        at = match.end()
    return [piece for piece in (*pieces, text[at:]) if piece]


@functools.cache
def bytes_as_letters() -> tuple[str, ...]:
    """Return the letter for each of the 256 bytes in a byte-level vocabulary, by GPT-2's map."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    plain |= set(range(ord("®"), ord("ÿ") + 1))
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))
