"""Output files that appear whole, and the folder that is kept between runs.

An output's folder is tried before the work; the file is written aside and renamed. Does not know
what is in it.
"""

import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from runner.common.errors import ConfigError

# A file aside of a killed process: its name holds the process' number. One that nobody has written
# to for so many seconds is of no process on another machine either.
ASIDE = re.compile(r"\.(\d+)\.(?:partial|rehearsal)")
LEFT_AFTER_S = 120.0


def check_writable(flag: str, path: Path) -> None:
    """Try the folder of an output file before the work, leaving nothing behind, and remove what a
    killed process left there.

    Raises:
        ConfigError: the folder is missing or takes no file, or the path is itself a folder.
    """
    folder = path.resolve().parent
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise ConfigError(f"{flag} must name a file. Received: {path}, a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        # It would be replaced by a file: /dev/null, for one, by whoever may.
        raise ConfigError(f"{flag} must name a file. Received: {path}, a device or the like")
    if not os.path.isdir(folder):
        raise ConfigError(f"{flag} must lie in a folder that exists. Received: {path}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".partial"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} must lie in a folder that can be written to. Received: {path} "
            f"({error.strerror or error})"
        ) from None
    _sweep(path)


def _sweep(path: Path) -> None:
    """Remove what processes that are gone had written aside of an output file."""
    own = tuple(f"{dots}{path.stem}." for dots in (".", ".."))  # a rehearsal is written aside too
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
    """Write a file so that whoever looks sees the old one or all of the new one.

    Args:
        private: its owner alone may read it, from its first byte on.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # Of a process that was killed and had this number: its mode is not to be inherited.
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


def cache_folder() -> Path:
    """Return the folder for the demo and for compiled programs, kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arena-runner"


def compilation_cache() -> str:
    """Return the folder for compiled programs."""
    return str(cache_folder() / "xla")
