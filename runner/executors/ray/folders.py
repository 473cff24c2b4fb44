"""The private folder of a run, in which Ray keeps its sockets and files. Does not know Ray."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

# What Ray appends to its folder's path for a socket, and the longest path of a socket.
LONGEST_SOCKET = "/session_2026-11-24_12-00-00_123456_4194304/sockets/plasma_store"
MAX_SOCKET_PATH_BYTES = 103
# A file in the folder of a run, locked while its driver lives.
LOCK = "arena-runner.lock"


def make_private_folder() -> tuple[Path, int]:
    """Return a new folder that only the owner can enter, and its open lock.

    Removes folders whose driver was killed: nobody holds their lock.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if len(os.fsencode(base / "arena-12345678" / "r")) + len(LONGEST_SOCKET) > (
        MAX_SOCKET_PATH_BYTES
    ):
        base = Path("/tmp")
    for stale in base.glob(f"arena-*/{LOCK}"):
        _remove_if_stale(stale)
    # Take the lock before the folder gets a name that the loop above would find.
    fresh = Path(tempfile.mkdtemp(prefix=".arena-", dir=base))
    lock = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return fresh.rename(base / fresh.name.removeprefix(".")), lock


def _remove_if_stale(path: Path) -> None:
    folder = path.parent
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
