"""CUDA graphs of a training step and of decoding: what the host does for each operation, done once.

A graph repeats operations on the same memory. So shapes are those of the examples, and whatever the host knew while a
step was captured, every number and every position, stays as it was: docs/gpu.md says what follows from that.
"""

from titans_pytorch.cuda_graphs.step import captured
from titans_pytorch.cuda_graphs.stream import CapturedStream

__all__ = ["CapturedStream", "captured"]
