"""Sequences of different lengths in one batch: padded, or several documents in a row, each as if it were alone."""

from titans_pytorch.ragged.marks import Marks, marks_of
from titans_pytorch.ragged.reading import read_marked, read_without_state
from titans_pytorch.ragged.state import RaggedState

__all__ = ["Marks", "RaggedState", "marks_of", "read_marked", "read_without_state"]
