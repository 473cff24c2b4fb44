"""A test set -> examples -> texts -> tokens that fit the model; for run, plan and prepare.

Knows the order of the steps; `dataset.py`, `prompts.py` and `tokenization.py` do the work.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from runner.common.errors import DataError
from runner.common.records import Examples, TokenTable
from runner.config.run_config import PrepareConfig, RunConfig
from runner.data.dataset import read_examples
from runner.data.prompts import render_prompts
from runner.data.tokenization import tokenize
from runner.preset.reader import Preset


def read_rows(test_set: Path, config: RunConfig | PrepareConfig) -> tuple[Examples, list[str]]:
    """Return the rows of a file and their texts.

    Raises:
        DataError: the file is not a valid test set, or a cell does not match --text-format.
    """
    examples = read_examples(test_set, config.task)
    return examples, render(examples, config)


def render(examples: Examples, config: RunConfig | PrepareConfig) -> list[str]:
    """Return one text per row, by the task's template and --text-format.

    Raises:
        DataError: a cell does not match --text-format.
    """
    return render_prompts(examples, text_format=config.text_format, task=config.task)


def to_tokens(
    texts: Sequence[str],
    preset: Preset,
    *,
    sequence_length: int,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> TokenTable:
    """Return the token ids of each text, truncated to `sequence_length`.

    Args:
        on_progress: called with the number of rows done so far.

    Raises:
        DataError: the tokenizer is damaged, or does not belong to the backbone.
    """
    tokens = tokenize(
        texts, preset.tokenizer, sequence_length=sequence_length, on_progress=on_progress
    )
    largest = int(tokens.values.max(initial=tokens.pad_id))
    if largest >= preset.shape.vocabulary_size:
        raise DataError(
            f"{preset.tokenizer.vocabulary} does not belong to the backbone: expected token "
            f"ids below {preset.shape.vocabulary_size}. Received: {largest}"
        )
    return tokens
