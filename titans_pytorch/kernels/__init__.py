"""Triton kernels for memories M(x) = x + g norm(gelu(x W_1) W_2) whose base is renewed after every chunk.

Nothing in the library imports this package: whoever wants its kernels imports the file that has them, and is told in a
sentence if triton is missing. `has_triton` answers without importing it.
"""

from __future__ import annotations

from importlib.util import find_spec


def has_triton() -> bool:
    """Whether the files of this package can be imported."""
    return find_spec("triton") is not None
