"""glibc's malloc, for a process that loads weights and then computes on a CPU.

XLA takes a batch's work space from malloc and frees it at the batch's end: 77 MB at 2,048 tokens
through layers of 512. Whether those pages stay with the process is up to malloc's limits. Nothing
happens with another libc.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# In a worker's environment, before its first thread: glibc reads it once.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
# glibc's own number of blocks, and its largest limit between a heap and a block.
MOST_MAPPED, LARGEST_THRESHOLD = 65536, 32 << 20


def use_one_heap() -> None:
    """Let threads that start from now on share the process' first heap.

    The others' heaps end at 64 MB; what is larger is mapped anew each time, whatever the limits.
    """
    _set(M_ARENA_MAX, 1)


@contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Within, memory of a megabyte or more goes back to the system as soon as it is freed.

    glibc otherwise raises its limit to the size of the first tensor read, keeps the next ones in
    its heaps and leaves holes: a fifth of the weights' size, measured on 512 MB.
    """
    _set(M_MMAP_MAX, MOST_MAPPED)
    _set(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # glibc's own limits are gone once one is set, and a batch took 1.12 times as long to fault
        # its work space in again.
        _set(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        _set(M_TRIM_THRESHOLD, 1 << 30)


def keep_work_space() -> None:
    """From now on, no memory goes back to the system: it is there for the next batch.

    Without, work space above `LARGEST_THRESHOLD` is mapped anew for each batch, 19,000 page faults
    at 77 MB. Where threads have heaps of their own, it changes nothing.
    """
    _set(M_MMAP_MAX, 0)


def let_go() -> None:
    """Undo `use_one_heap` and `keep_work_space`, in a process that goes on to do other things."""
    _set(M_ARENA_MAX, 0)
    _set(M_MMAP_MAX, MOST_MAPPED)


def _set(limit: int, value: int) -> None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(limit, value)
