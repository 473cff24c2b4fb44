"""The table of poolings: their functions, whether they see padding, which backbones have them.

A pooling is one entry here; flags, families, the plan and the compiled programs read it. The driver
reads it too, so it imports no framework: each function receives its array library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DECODER, ENCODER = "decoder", "encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One way to turn a row's hidden states into a vector.

    pool: (jax.numpy, float32 (rows, length, hidden), token counts (rows,)) -> (rows, hidden). None:
    the backbone's own layer over its first token.
    sees_padding: padding changes the result, so every row is padded to the sequence length.
    of: the kinds of backbones that have it. If empty, only backbones whose TextClassifier uses it.
    """

    pool: Callable[[Any, Any, Any], Any] | None
    sees_padding: bool = False
    of: tuple[str, ...] = (DECODER, ENCODER)


def mean_over_all_positions(xp: Any, hidden: Any, lengths: Any) -> Any:
    """Mean over all positions, padding included: Keras' GlobalAveragePooling1D without a mask, as
    the notebook's head was trained."""
    return hidden.mean(axis=1)


def mean_over_tokens(xp: Any, hidden: Any, lengths: Any) -> Any:
    """Mean over each row's real tokens."""
    real = xp.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    return xp.where(real, hidden, 0).sum(axis=1) / xp.maximum(lengths, 1)[:, None]


def last_token(xp: Any, hidden: Any, lengths: Any) -> Any:
    """The hidden state of each row's last real token."""
    return hidden[xp.arange(hidden.shape[0]), xp.maximum(lengths - 1, 0)]


def first_token(xp: Any, hidden: Any, lengths: Any) -> Any:
    """The hidden state of each row's first token; in an encoder it attends to the whole row."""
    return hidden[:, 0]


POOLINGS: dict[str, Pooling] = {
    "padded-mean": Pooling(pool=mean_over_all_positions, sees_padding=True),
    "mean": Pooling(pool=mean_over_tokens),
    "last": Pooling(pool=last_token),
    # A decoder's first token attends only to itself.
    "first": Pooling(pool=first_token, of=(ENCODER,)),
    # BERT's own layer.
    "pooler": Pooling(pool=None, of=()),
}


def poolings_of(kind: str, own: str | None = None) -> tuple[str, ...]:
    """Return the poolings of a kind of backbone and of its TextClassifier, in the table's order."""
    return tuple(name for name, one in POOLINGS.items() if kind in one.of or name == own)


def padded_length(pooling: str, longest: int, sequence_length: int) -> int:
    """Return the padded length of rows of at most `longest` tokens, if there are no buckets."""
    return sequence_length if POOLINGS[pooling].sees_padding else max(1, longest)
