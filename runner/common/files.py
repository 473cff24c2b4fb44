"""Content -> files and folders that appear complete, by a rename; and the cache folder.

Does not know what is in them.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.common.errors import ConfigError

# Temporary files have the process id in their name. If no such process runs here, and the file has
# not been written to for this long, no process on another machine is writing it either.
ASIDE = re.compile(r"\.(\d+)\.(?:partial|rehearsal)")
LEFT_AFTER_S = 120.0


def check_writable(flag: str, path: Path) -> None:
    """Check that an output file can be written, without leaving one, and remove temporary files of
    killed processes.

    Raises:
        ConfigError: the folder is missing or not writable, or the path is not that of a file.
    """
    folder = path.resolve().parent
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise ConfigError(f"{flag} must name a file. Received: {path}, a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        # Renaming would replace it; root could lose /dev/null.
        raise ConfigError(f"{flag} must name a file. Received: {path}, not a regular file")
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag} must be in a folder that exists. Received: {path}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".partial"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} must be in a writable folder. Received: {path} ({error.strerror or error})"
        ) from None
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove temporary files that dead processes left beside an output file."""
    own = tuple(f"{dots}{path.stem}." for dots in (".", ".."))  # a rehearsal has its own
    with suppress(OSError):
        for entry in os.scandir(path.resolve().parent):
            number = ASIDE.search(entry.name)
            if (
                number is not None
                and entry.name.startswith(own)
                and time.time() - entry.stat().st_mtime > LEFT_AFTER_S
                and _is_gone(int(number[1]))
            ):
                os.unlink(entry.path)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write a file so that readers see either the old content or all of the new.

    Args:
        private: whether only its owner may read it.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    aside = _aside(path)
    # A killed process with the same id may have left a file with another mode.
    aside.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(aside, flags, 0o600 if private else 0o666)
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `path` at the end, or removed after an error.

    Raises:
        OSError: it cannot be made, or `path` exists and is not an empty folder.
    """
    aside = _aside(path.resolve())
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def cache_folder() -> Path:
    """Return the folder that keeps the demo and compiled programs between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arena-runner"


def compilation_cache() -> str:
    """Return the folder for compiled programs."""
    return str(cache_folder() / "xla")
