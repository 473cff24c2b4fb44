"""Files that tests make once: presets, reference answers, compiled programs.

They are kept in the user's cache from one session to the next, in a folder named by all that they
depend on: the versions of the libraries, the processor and the scripts that make them. Whatever
differs gets a folder of its own; folders that nobody has used for two weeks are removed.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "keras", "keras-hub", "numpy", "ray", "tensorflow", "tokenizers")
SCRIPTS = (
    *(
        "list_weights.py",
        "make_presets.py",
        "models.py",
        "odd_texts.py",
        "plain_answers.py",
        "preprocess.py",
        "reference.py",
    ),
    "../../runner/demo.py",
)
UNUSED_S = 14 * 24 * 3600.0
MOST_BYTES = 4 << 30


@cache
def stored_folder() -> Path:
    """Return the folder of what depends on these versions, this processor and these scripts."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arena-runner-tests"
    base.mkdir(parents=True, exist_ok=True)
    folder = base / _key()
    with locked(base / "lock"):
        _remove_unused(base, folder)
        folder.mkdir(exist_ok=True)
        os.utime(folder)
    return folder


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to fill, which becomes `folder` if nothing fails; None if it is there.

    Other processes that ask for it wait until it is made.
    """
    if folder.is_dir():
        yield None
        return
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        aside = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        aside.rename(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, by a file."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in PACKAGES:
        digest.update(f"{name} {version(name)}\n".encode())
    digest.update(_processor().encode())
    for name in SCRIPTS:
        digest.update((TESTS / name).read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Compiled programs are for one kind of processor."""
    try:
        found = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[0] if found else platform.processor()


def _remove_unused(base: Path, ours: Path) -> None:
    for folder in base.iterdir():
        if not folder.is_dir():
            continue
        is_old = time.time() - folder.stat().st_mtime > UNUSED_S
        if (is_old and folder != ours) or _bytes(folder) > MOST_BYTES:
            shutil.rmtree(folder, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
