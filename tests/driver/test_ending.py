"""How a run ends that is inside something which does not return."""

from types import SimpleNamespace

import numpy as np
import pytest

from runner.common.errors import EXIT_DEADLINE
from runner.common.records import Examples
from runner.driver.deadline import Deadline
from runner.driver.ending import end_without
from runner.driver.setting import Rows
from runner.report.gather import Outcome
from runner.results.table import PREDICTED, Merger


@pytest.mark.parametrize("in_journal", [0, 1])
def test_the_guard_may_act_before_there_is_a_journal(tmp_path, in_journal):
    """With --on-deadline fail it says what is safe, though starting Ray has not come to an end."""
    notes, path = [], tmp_path / "s.csv.journal"
    table = Merger(["a", "b"], 3)
    if in_journal:
        table.add([0], np.full((1, 3), 1 / 3), how=PREDICTED, lengths=[4])
    outcome = Outcome(rows=2)
    if in_journal:
        outcome.in_journal = [0]
    setting = SimpleNamespace(
        logs=SimpleNamespace(release=lambda: None),
        progress=SimpleNamespace(note=lambda text, **_: notes.append(text)),
        deadline=Deadline(30.0, "fail"),
        config=SimpleNamespace(journal_path=path, fallback_probabilities=None),
        now=lambda: 30.0,
        is_over=lambda: True,
    )
    rows = Rows(Examples(("a", "b"), {}), ["", ""], table)
    assert end_without(setting, rows, outcome, dict) == EXIT_DEADLINE
    safe = f"1 of 2 rows are safe in {path}" if in_journal else "No row is done yet"
    assert safe in notes[-1]
    assert f"{2 - in_journal} of 2 rows not predicted" in notes[-1]
