"""Time left over -> rows predicted again with their responses swapped, and averaged.

The most uncertain rows come first, so that whatever moment ends it, the best has been done. Does
not know Ray, JAX or files.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runner.common.records import BatchResult, Examples, TokenTable
from runner.config.task import CONTEST, Task
from runner.driver.deadline import Deadline
from runner.executors.executor import Executor
from runner.results.ledger import Ledger
from runner.results.table import FILLED, SWAPPED, Merger
from runner.telemetry.progress import Progress
from sharding.backlog import Backlog
from sharding.batches import Batch, BatchShape, Plan
from sharding.rates import Rates

# Rows go in so many groups, the most uncertain first; within one, rows of like length together.
WAVES = 8
# Seconds after which what has been improved is written again.
WRITE_EVERY_S = 60.0


def swap(examples: Examples, task: Task = CONTEST) -> Examples:
    """Return the examples with the task's two columns, the contest's responses, exchanged."""
    other, columns = task.swapped_columns, examples.columns
    return Examples(examples.ids, {name: columns[other.get(name, name)] for name in columns})


def rows_to_swap(merger: Merger) -> list[int]:
    """Return the rows that have an answer of the model for one order, the most uncertain first."""
    rows = [row for row, how in enumerate(merger.how) if how not in ("", FILLED, SWAPPED)]
    certainty = merger.probabilities(rows).max(axis=1)
    return [rows[place] for place in np.argsort(certainty, kind="stable")]


def in_waves(rows: Sequence[int], plan: Callable[[Sequence[int]], Plan]) -> Iterator[Batch]:
    """Yield the batches of rows that come in the order in which they should be done."""
    size = max(1, -(-len(rows) // WAVES))
    for start in range(0, len(rows), size):
        yield from plan(sorted(rows[start : start + size])).batches


def predict_swapped(
    executor: Executor,
    tokens: TokenTable,
    batches: Sequence[Batch],
    *,
    labels: Sequence[int],
    ledger: Ledger,
    deadline: Deadline,
    progress: Progress,
    cost: Callable[[BatchShape], float],
    first_index: int,
    now: Callable[[], float],
    write: Callable[[], None],
) -> int:
    """Average what rows have with what they get with their responses swapped, while there is time.

    Args:
        tokens: of the swapped texts. batches: of these tokens, in the order of work.
        labels: for each label the place of the one that means the same after the exchange.
        first_index: beyond that of any batch before.
        now: seconds since the process started. write: writes the submission as it is.

    Returns:
        How many rows were averaged.
    """
    backlog, rates = Backlog(batches, cost=cost, first_index=first_index), Rates(cost)
    averaged, written_at = 0, time.monotonic()
    results = executor.run(backlog, tokens, rates=rates, ids=ledger.table.ids)
    for result in results:
        if result is not None:
            averaged += _average(result, tokens, labels, ledger)
            progress.phase(
                f"{averaged:,} rows predicted again with their responses swapped, and averaged"
            )
        if time.monotonic() - written_at > WRITE_EVERY_S:
            write()
            written_at = time.monotonic()
        if deadline.is_over(now()):
            break
    results.close()
    return averaged


def _average(
    result: BatchResult,
    tokens: TokenTable,
    labels: Sequence[int],
    ledger: Ledger,
) -> int:
    finite = result.finite
    rows = result.rows_where(finite)
    if not rows:
        return 0
    back = result.probabilities[finite][:, list(labels)]
    mean = (ledger.table.probabilities(rows) + back) / 2
    lengths = np.minimum(tokens.lengths[rows], result.batch.shape.length)
    ledger.add(rows, mean, how=SWAPPED, lengths=lengths, worker=str(result.replica))
    return len(rows)
