"""Rows without an answer -> the fallback; the table -> a submission, however a run ends.

Does not know how rows are predicted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runner.common.errors import (
    EXIT_DEADLINE,
    ArenaRunnerError,
    DeadlineError,
    WorkerError,
    list_ids,
)
from runner.data.submission import write_submission
from runner.driver.setting import Rows, Setting
from runner.report.facts import say_summary
from runner.report.gather import Outcome
from runner.results.journal import Journal
from runner.results.ledger import Ledger
from runner.results.table import FILLED

# A message shows at most this many numbers of a row.
MOST_NAMED = 8


@contextmanager
def open_ledger(setting: Setting, rows: Rows, outcome: Outcome, dtype: str) -> Iterator[Ledger]:
    """Resume the journal or start one; errors within say which rows are safe in it."""
    config, job = setting.config, setting.job
    fingerprint = job.fingerprint(config, dtype, rows.examples.ids, rows.texts)
    outcome.fingerprint = fingerprint.digest
    journal = Journal.open(
        config.journal_path,
        fingerprint=fingerprint,
        ids=rows.examples.ids,
        classes=job.width(config.task),
        resume=config.resume,
        head=config.task.head,
    )
    outcome.in_journal = journal
    ledger = Ledger(rows.table, journal)
    try:
        for note in journal.notes:
            setting.progress.note(note)
        outcome.resumed = ledger.take_up()
        yield ledger
    except KeyboardInterrupt:
        said = how_to_resume(setting, outcome)
        raise KeyboardInterrupt(f"interrupted. {said}") from None
    except (WorkerError, DeadlineError) as error:
        raise type(error)(f"{error}\n{how_to_resume(setting, outcome)}") from error
    except OSError as error:
        journal.check()
        said = how_to_resume(setting, outcome)
        raise ArenaRunnerError(f"{type(error).__name__}: {error}\n{said}") from error
    finally:
        journal.close(keep_empty=False)


def fill(setting: Setting, rows: Rows, ledger: Ledger | None) -> None:
    """Give rows without an answer the fallback, or end the run with an error.

    Args:
        ledger: None if the calling thread must not write to it; then only the table takes them.

    Raises:
        DeadlineError: the time is over and --on-deadline is fail.
        WorkerError: no row has an answer although there was time.
    """
    table, count = rows.table, len(rows.examples)
    missing, over = table.missing(), setting.is_over()
    unfinished = table.unfinished()
    if over and unfinished and setting.deadline.policy == "fail":
        raise DeadlineError(
            f"The time limit passed with {len(unfinished):,} of {count:,} rows not "
            "predicted; --on-deadline fail writes no submission."
        )
    if not missing:
        return
    if not over and len(missing) == count:
        raise WorkerError(
            f"No row has an answer: all {len(missing):,} came out as NaN or infinity, or could "
            "not be computed. If the dtype is float16, try --dtype bfloat16 or float32; else "
            "look at the weights and the head."
        )
    fallback = setting.config.fallback_probabilities
    values = np.asarray(fallback) if fallback is not None else table.mean()
    filled, none = np.tile(values, (len(missing), 1)), [0] * len(missing)
    if ledger is not None:
        ledger.add(missing, filled, how=FILLED, lengths=none)
    else:
        table.add(missing, filled, how=FILLED, lengths=none, again=True)
    said = f"have no answer from the model and get the fallback {_some(values)}"
    if over:
        setting.deadline.note(setting.now(), f"{len(missing):,} rows {said}")
    named = list_ids(rows.examples.ids, missing)
    setting.progress.note(f"warning: {len(missing):,} rows ({named}) {said}")


def write(setting: Setting, rows: Rows, outcome: Outcome) -> None:
    """Write the submission as it is now, and record when."""
    with setting.timed("merge"):
        write_submission(
            setting.config.output,
            rows.examples.ids,
            rows.table.finish(),
            task=setting.config.task,
            kept=rows.examples.kept,
        )
    outcome.stands_s = setting.now()


def end_without(
    setting: Setting, rows: Rows, outcome: Outcome, report: Callable[[], dict[str, Any]]
) -> int:
    """Write the submission although the main thread hangs, and return the exit code. The guard's
    thread calls this, and then ends the process.

    Args:
        report: writes the report so far, and returns it.
    """
    setting.logs.release()
    where = "the run had not finished and was ended"
    setting.progress.note(f"deadline: {setting.deadline.note(setting.now(), where)}")
    try:
        fill(setting, rows, None)
    except DeadlineError as error:
        said = how_to_resume(setting, outcome)
        setting.progress.note(f"error: {error}\n{said}", event="end")
        return EXIT_DEADLINE
    write(setting, rows, outcome)
    print(say_summary(report(), setting.config))
    return 0


def how_to_resume(setting: Setting, outcome: Outcome) -> str:
    """Return a sentence about what is safe in the journal, if there is one yet."""
    if not len(outcome.in_journal):
        return "No row is done yet; the same command goes on from the start."
    return (
        f"{len(outcome.in_journal):,} of {outcome.rows:,} rows are safe in "
        f"{setting.config.journal_path}; the same command goes on from there."
    )


def _some(values: np.ndarray) -> str:
    """Return the first numbers of a row as text: an embedding has thousands."""
    named = ", ".join(f"{value:.4f}" for value in values[:MOST_NAMED])
    return named + (", ..." if len(values) > MOST_NAMED else "")
