"""Time left over -> rows predicted again with their responses swapped, and averaged.

The most uncertain rows come first, since the pass may end at any time. Does not know Ray, JAX or
files.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runner.common.records import BatchResult, Examples, TokenTable
from runner.config.task import CONTEST, Task
from runner.driver.setting import Setting
from runner.executors.executor import Executor
from runner.results.ledger import Ledger
from runner.results.table import FILLED, SWAPPED, Merger
from sharding.backlog import Backlog
from sharding.batches import Batch, Plan
from sharding.rates import Rates

# Rows are divided into this many waves, the most uncertain first; batches are made within a wave.
WAVES = 8
# Seconds between writes of the improved submission.
WRITE_EVERY_S = 60.0


def swap(examples: Examples, task: Task = CONTEST) -> Examples:
    """Return the examples with the task's two columns swapped: the contest's responses."""
    other, columns = task.swapped_columns, examples.columns
    return Examples(examples.ids, {name: columns[other.get(name, name)] for name in columns})


def rows_to_swap(merger: Merger) -> list[int]:
    """Return the rows with a prediction for one order only, the most uncertain first."""
    rows = [row for row, how in enumerate(merger.how) if how not in ("", FILLED, SWAPPED)]
    certainty = merger.probabilities(rows).max(axis=1)
    return [rows[place] for place in np.argsort(certainty, kind="stable")]


def in_waves(rows: Sequence[int], plan: Callable[[Sequence[int]], Plan]) -> Iterator[Batch]:
    """Yield the batches of rows, which come in order of importance."""
    size = max(1, -(-len(rows) // WAVES))
    for start in range(0, len(rows), size):
        yield from plan(sorted(rows[start : start + size])).batches


def predict_swapped(
    setting: Setting,
    executor: Executor,
    ledger: Ledger,
    tokens: TokenTable,
    batches: Sequence[Batch],
    *,
    first_index: int,
    write: Callable[[], None],
) -> None:
    """Average the rows' predictions with those for swapped responses, while there is time.

    Args:
        tokens: of the swapped texts. batches: of these tokens, in the order of work.
        first_index: greater than that of any batch before.
        write: writes the submission as it is.
    """
    cost, labels = setting.job.preset.shape.batch_flops, setting.config.task.swapped_labels
    backlog, rates = Backlog(batches, cost=cost, first_index=first_index), Rates(cost)
    averaged, written_at = 0, time.monotonic()
    results = executor.run(backlog, tokens, rates=rates, ids=ledger.table.ids)
    for result in results:
        if result is not None:
            averaged += _average(result, tokens, labels, ledger)
            setting.progress.phase(
                f"{averaged:,} rows predicted again with their responses swapped, and averaged"
            )
        if time.monotonic() - written_at > WRITE_EVERY_S:
            write()
            written_at = time.monotonic()
        if setting.is_over():
            break
    results.close()


def _average(result: BatchResult, tokens: TokenTable, labels: Sequence[int], ledger: Ledger) -> int:
    """Average the rows of a batch with what they have; return how many there are.

    Args:
        labels: for each label, the place of the one that means the same for swapped responses.
    """
    finite = result.finite
    rows = result.rows_where(finite)
    if not rows:
        return 0
    back = result.probabilities[finite][:, list(labels)]
    mean = (ledger.table.probabilities(rows) + back) / 2
    lengths = np.minimum(tokens.lengths[rows], result.batch.shape.length)
    ledger.add(rows, mean, how=SWAPPED, lengths=lengths, worker=str(result.replica))
    return len(rows)
