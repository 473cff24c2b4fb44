"""python -m tests.support.planted_faults: show that the default tests catch faults.

Puts them into a copy of the code, one after another.

A fault is a line of the code and what stands in its place. The tests that should see it are run
first; a fault that they do not catch is said, and ends the command with exit code 1.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import copy_project


@dataclass(frozen=True)
class Fault:
    """what: in words. path: of the file. old, new: its text, and the fault. tests: what sees it."""

    what: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "a masked mean that takes one position of padding",
        "runner/common/poolings.py",
        "None, :, None] < lengths[:, None, None]",
        "None, :, None] <= lengths[:, None, None]",
        ("tests/runs/test_equalities.py",),
    ),
    Fault(
        "the last token is the one before it",
        "runner/common/poolings.py",
        "xp.maximum(lengths - 1, 0)]",
        "xp.maximum(lengths - 2, 0)]",
        ("tests/runs/test_equalities.py",),
    ),
    Fault(
        "ids in another order than their rows",
        "runner/data/submission.py",
        "{task.id_column: keys, **copied}",
        "{task.id_column: keys[::-1], **copied}",
        ("tests/config/test_task.py", "tests/data/test_stages.py"),
    ),
    Fault(
        "an answer that goes to the row before",
        "runner/results/table.py",
        "self._probabilities[place] = probabilities",
        "self._probabilities[np.asarray(place) - 1] = probabilities",
        ("tests/data/test_stages.py", "tests/executors/test_dispatch.py"),
    ),
    Fault(
        "a deadline without a margin",
        "runner/driver/deadline.py",
        "self.margin_s = MARGIN_S + share + MARGIN_FACTOR * seconds",
        "self.margin_s = 0.0",
        ("tests/driver/test_deadline.py",),
    ),
    Fault(
        "a journal that is not brought to the disk",
        "runner/results/journal_file.py",
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = OFF",
        ("tests/results/test_journal.py",),
    ),
    Fault(
        "a copy of a lost journal that is not brought to the disk",
        "runner/results/journal.py",
        "os.fsync(descriptor)",
        "pass",
        ("tests/results/test_journal.py",),
    ),
    Fault(
        "quantization scales of the wrong channels",
        "runner/model/quantization.py",
        "np.concatenate(scales, axis=along)",
        "np.concatenate(scales[::-1], axis=along)",
        ("tests/model/test_quantization.py",),
    ),
    Fault(
        "the end token of a row that was cut is lost",
        "runner/common/records.py",
        "tokens[: len(rows)][whole > length, -1] = self.end_id",
        "pass",
        ("tests/data/test_stages.py", "tests/preset/test_text_classifier.py"),
    ),
    Fault(
        "responses swapped in the texts and not in the answers",
        "runner/driver/swap_pass.py",
        "setting.config.task.swapped_labels",
        "list(range(len(setting.config.task.swapped_labels)))",
        ("tests/runs/test_extra_passes.py", "tests/executors/test_dispatch.py"),
    ),
    Fault(
        "a row that kills every worker is never given up",
        "sharding/backlog.py",
        "MOST_SETBACKS_OF_A_ROW if is_one else MOST_SETBACKS",
        "10**9 if is_one else MOST_SETBACKS",
        ("tests/executors/test_recovery_in_modes.py",),
    ),
    Fault(
        "attention that forgets its window",
        "runner/model/attention.py",
        "window=window",
        "window=None",
        ("tests/model/test_attention.py", "tests/runs/test_equalities.py"),
    ),
    Fault(
        "LoRA merged with half its strength",
        "runner/model/weights.py",
        "update += values",
        "update = update / 2 + values",
        ("tests/runs/test_equalities.py",),
    ),
)


def main() -> int:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder) / "copy")
        for fault in FAULTS:
            path = copy / fault.path
            sound = path.read_text()
            assert sound.count(fault.old) >= 1, f"{fault.path} has no line {fault.old!r}"
            path.write_text(sound.replace(fault.old, fault.new, 1))
            began = time.monotonic()
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
            done = subprocess.run(
                [*command, *fault.tests], cwd=copy, capture_output=True, text=True
            )
            path.write_text(sound)
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            is_caught = done.returncode == 1 and bool(failed)
            said = failed[0].removeprefix("FAILED ").partition(" - ")[0] if failed else "NOT CAUGHT"
            print(f"{time.monotonic() - began:5.0f} s  {fault.what}: {said}", flush=True)
            if not is_caught:
                missed.append(fault.what)
                print(done.stdout[-2000:], done.stderr[-1000:])
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
