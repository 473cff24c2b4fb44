"""What a pooling is: its function, whether it sees padding, and which backbones have it.

All that is known of a pooling is one entry here: flags, families, the plan and the compiled program
read it. Names no framework, since the driver reads it too: a function is given its array library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DECODER, ENCODER = "decoder", "encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One way to make a vector of a row's hidden states.

    pool: (jax.numpy, float32 (rows, length, hidden), token counts (rows,)) -> (rows, hidden). None:
    a layer of the backbone's own, on top of its first token.
    sees_padding: padding changes the result, so every row is padded to the sequence length.
    of: the kinds of backbones that have it; of none, those have it whose TextClassifier names it.
    """

    pool: Callable[[Any, Any, Any], Any] | None
    sees_padding: bool = False
    of: tuple[str, ...] = (DECODER, ENCODER)


def mean_over_all_positions(xp: Any, hidden: Any, lengths: Any) -> Any:
    """GlobalAveragePooling1D without a mask, as the notebook's head was trained."""
    return hidden.mean(axis=1)


def mean_over_tokens(xp: Any, hidden: Any, lengths: Any) -> Any:
    """Mean over the real tokens of each row; padding changes nothing."""
    real = xp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return xp.where(real, hidden, 0).sum(axis=1) / xp.maximum(lengths, 1)[:, None]


def last_token(xp: Any, hidden: Any, lengths: Any) -> Any:
    """The hidden state of each row's last real token; padding changes nothing."""
    return hidden[xp.arange(hidden.shape[0]), xp.maximum(lengths - 1, 0)]


def first_token(xp: Any, hidden: Any, lengths: Any) -> Any:
    """The hidden state of each row's first token, which in an encoder has seen the whole row."""
    return hidden[:, 0]


POOLINGS: dict[str, Pooling] = {
    "padded-mean": Pooling(pool=mean_over_all_positions, sees_padding=True),
    "mean": Pooling(pool=mean_over_tokens),
    "last": Pooling(pool=last_token),
    # The first token of a decoder sees itself alone; the last of an encoder is its end token.
    "first": Pooling(pool=first_token, of=(ENCODER,)),
    # BERT's own layer.
    "pooler": Pooling(pool=None, of=()),
}


def poolings_of(kind: str, own: str | None = None) -> tuple[str, ...]:
    """Return the poolings of a kind of backbone and of its TextClassifier, as the table orders."""
    return tuple(name for name, one in POOLINGS.items() if kind in one.of or name == own)


def padded_length(pooling: str, longest: int, sequence_length: int) -> int:
    """Return what rows of at most `longest` tokens are padded to when no bucket is chosen."""
    return sequence_length if POOLINGS[pooling].sees_padding else max(1, longest)
