"""What glibc's malloc does with large blocks, seen by page faults in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from runner.model.cpu_allocator import ENVIRONMENT

ALLOCATE = """
import resource, sys, threading
import numpy as np
from runner.model import cpu_allocator as allocator

where, *steps = sys.argv[1:]

def faults():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(10_000_000)  # 80 MB, as a batch's work space
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(taken)

def act():
    with allocator.large_blocks_go_back():
        pass
    for step in steps:
        getattr(allocator, step)()
    faults()

if "use_one_heap" in steps:
    allocator.use_one_heap()
if where == "thread":
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
else:
    act()
"""
# 19,531 pages; in huge ones, which NumPy asks for, 600 faults were seen.
FEW = 100

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="limits are glibc's"),
]


@pytest.mark.parametrize(
    ("steps", "where", "environment", "stays"),
    [
        ([], "main", {}, False),
        (["keep_work_space"], "main", {}, True),
        (["use_one_heap", "keep_work_space"], "thread", {}, True),
        (["keep_work_space"], "thread", ENVIRONMENT, True),
        (["use_one_heap", "keep_work_space", "let_go"], "main", {}, False),
    ],
)
def test_work_space_stays_from_batch_to_batch(steps, where, environment, stays):
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE, where, *steps],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < FEW) == stays
