"""What happens to memory that a training process has freed.

Every step frees what it made, and the next one makes as much again. The C library of most Linux systems hands large
pieces back to the system in between, which then gives them anew, page by page; that can take longer than filling them.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # numbers of options of mallopt(3)
NEVER = -1


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees, to use it again.  -> whether the C library can be told so"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, NEVER)) and bool(mallopt(MMAP_MAX, 0))
