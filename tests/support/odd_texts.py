"""Texts of which tokenizers disagree: spaces, signs and scripts of all kinds, side by side.

But for NUL: TensorFlow Text ends a text there where it splits by a regex, KerasHub without it does
not, and nor does the runner.
"""

import random

PARTS = (
    *("the", "Quick", "BROWN", "don't", "it's", "'ll", "we'VE", "x" * 120, "1234567", "3.14"),
    *(" ", "  ", "   ", "\n", "\n\n\n", "\t", "\r\n", "\v", "\f", "\x01", "\x85", "\x1f"),
    *("\u00a0", "\u2009", "\u202f", "\u3000", "\u200b", "\ufeff", "\u00ad", "\u2028", "\u1680"),
    *(".", "...", "\u2026", "!?", "'", "$^`|~", "\u00bf", "\u2014", "\u201cq\u201d", "\u3002"),
    *("[CLS]", "[MASK]", "[PAD]x", "<s>", "<mask>", "</s>x", "<ma", "[", "<|endoftext|>"),
    *(
        "\u00dcber",
        "stra\u00dfe",
        "na\u00efve",
        "nai\u0308ve",
        "\u0130I",
        "\ufb01n",
        "\uff21\uff42",
    ),
    *("\u65e5\u672c\u8a9e", "\u304b\u306a", "\ud55c\uad6d\uc5b4", "\U00020001", "\uf900"),
    *(
        "\u041f\u0440\u0438\u0432\u0435\u0442",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u0928\u092e\u0938",
    ),
    *("\u096c", "\u0967\u0968", "\u00b2\u00bd", "\U0001f642", "\U0001f1e9\U0001f1ea", "\u200d"),
    *("\u1e9e", "\u0345", "\u03c2\u03a3", "\u212b", "\u2126", "\u01c5", "\u0301", "\u20ac"),
)


def odd_texts(count: int, seed: int) -> list[str]:
    """Return so many texts, some with any code point at all."""
    rng = random.Random(seed)
    texts = ["", " ", "a", "\n", "<pad>"[:4]]
    while len(texts) < count:
        parts = rng.choices(PARTS, k=rng.randrange(1, 14))
        if rng.random() < 0.3:
            anything = (rng.randrange(1, 0x30000) for _ in range(4))
            parts += [chr(n) for n in anything if not 0xD800 <= n < 0xE000 and chr(n).isprintable()]
            rng.shuffle(parts)
        texts.append("".join(part + rng.choice(("", "", " ")) for part in parts))
    return texts
