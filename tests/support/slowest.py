"""python -m tests.support.slowest: the twenty slowest tests of the last run, with their seconds.

`conftest.py` keeps what each test took, its fixtures included, from one session to the next.
"""

import json
from pathlib import Path

from tests.support.stored import stored_folder

MOST = 20


def durations_path() -> Path:
    return stored_folder().parent / "durations.json"


def read_durations() -> dict[str, float]:
    """Return the seconds of each test when it last ran, by its id; empty if none ever did."""
    path = durations_path()
    found: dict[str, float] = json.loads(path.read_text())["all"] if path.is_file() else {}
    return found


def keep_durations(last: dict[str, float]) -> None:
    """Keep what the tests of a run took."""
    content = {"all": read_durations() | last, "last": last}
    aside = durations_path().with_suffix(".new")
    aside.write_text(json.dumps(content))
    aside.rename(durations_path())


def main() -> None:
    path = durations_path()
    last = json.loads(path.read_text())["last"] if path.is_file() else {}
    slowest = sorted(last.items(), key=lambda item: item[1], reverse=True)[:MOST]
    for name, seconds in slowest:
        print(f"{seconds:6.1f} s  {name}")
    print(
        f"{sum(last.values()):6.1f} s  all {len(last)} tests of the last run, one after the other"
    )


if __name__ == "__main__":
    main()
