"""python full_disk.py WAY FOLDER KEPT FLAGS: the command, in a folder that gets full; then on.

Runs `run.py FLAGS` twice: while there is no room, then with `--resume require` and room again.
Writes FOLDER.err, FOLDER.code and FOLDER.files, what the first one said and left, and copies to
KEPT what the second left: a file system that is mounted here is seen by nobody else.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
ROOM = 300_000  # bytes: enough for a journal that is begun
FILE_BYTES = 200 << 10


def own_mounts() -> None:
    """Let this process mount file systems that no other process sees."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def run(flags: list[str], errors: Path | None = None, file_bytes: int | None = None) -> int:
    """Run the command in a child of its own and return its exit code."""
    child = os.fork()
    if not child:
        if file_bytes is not None:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, most))
        if errors is not None:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        from runner.cli import main

        sys.argv[1:] = flags
        sys.exit(main())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(way: str, folder: Path, kept: Path, *flags: str) -> None:
    if way == "tmpfs":
        own_mounts()
        mount(folder, f"size={ROOM}")
    code = run([*flags], folder.with_suffix(".err"), FILE_BYTES if way == "limit" else None)
    folder.with_suffix(".code").write_text(str(code))
    folder.with_suffix(".files").write_text("\n".join(os.listdir(folder)))
    if way == "tmpfs":
        mount(folder, "remount,size=64m")
    code = run([*flags, "--resume", "require"])
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    sys.exit(code)


if __name__ == "__main__":
    way, folder, kept, *flags = sys.argv[1:]
    main(way, Path(folder), Path(kept), *flags)
