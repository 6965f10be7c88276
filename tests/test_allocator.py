"""Freed memory that a training process keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from titans_pytorch.training.allocator import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        parts = [torch.zeros(2**24) for _ in range(2)]  # 64 MB each
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = new_pages()
if not keep_freed_memory():
    sys.exit(77)
new_pages()
print(usual, new_pages())
"""


def test_a_step_after_the_first_takes_no_new_memory() -> None:
    """In a process of its own, as what it keeps stays kept."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("not a system whose C library can be told to keep memory")
    assert done.returncode == 0, done.stderr
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 20
