"""Settings of glibc's malloc for a process that loads weights and then computes on a CPU.

XLA allocates a batch's workspace with malloc and frees it after the batch: 77 MB for 2,048 tokens
in layers of 512. Malloc's limits determine whether the process keeps those pages. With another
libc, nothing is done. Does not know what is computed.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# A worker's environment must have it from the start: glibc reads it once.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
# glibc's default maximum number of mapped blocks, and the highest threshold for mapping one.
MOST_MAPPED, LARGEST_THRESHOLD = 65536, 32 << 20


def use_one_heap() -> None:
    """Make threads that start from now on share the process' first heap.

    Other heaps hold at most 64 MB; larger blocks are mapped anew each time, whatever the limits.
    """
    _set(M_ARENA_MAX, 1)


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Return blocks of 1 MB or more to the system as soon as they are freed.

    Otherwise glibc raises its threshold to the size of the first tensor, puts the next ones into
    heaps and leaves holes: a fifth of the weights' size, measured with 512 MB.
    """
    _set(M_MMAP_MAX, MOST_MAPPED)
    _set(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # Setting a limit disables glibc's own adjustment. With its defaults a batch took 1.12 times
        # as long, since it faulted its workspace in again.
        _set(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        _set(M_TRIM_THRESHOLD, 1 << 30)


def keep_work_space() -> None:
    """Keep freed memory for the next batch from now on.

    Otherwise a workspace above `LARGEST_THRESHOLD` is mapped anew for each batch: 19,000 page
    faults for 77 MB. This has no effect if threads have heaps of their own.
    """
    _set(M_MMAP_MAX, 0)


def let_go() -> None:
    """Undo `use_one_heap` and `keep_work_space`, in a process that has other work to do."""
    _set(M_ARENA_MAX, 0)
    _set(M_MMAP_MAX, MOST_MAPPED)


def _set(limit: int, value: int) -> None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(limit, value)
