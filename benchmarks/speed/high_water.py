"""The high-water mark of a process's memory; imports nothing, so that workers of any environment can use it."""

from __future__ import annotations

import resource
import sys


def high_water() -> int:
    """Bytes that this process has held at most since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
