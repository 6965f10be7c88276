"""One token for each of many rows as one batch, although every row is at a position of its own.

What differs between rows are small numbers: where each stands in its window, whose chunk or segment ends, whose base is
renewed. They are tensors of a step (`due`), which a function of tensors alone then computes (`row_model`).
"""

from titans_pytorch.decoding.batch import RowBatch
from titans_pytorch.decoding.due import Cadence, Due, TokenStep
from titans_pytorch.decoding.row_model import RowModel, have_hooks

__all__ = ["Cadence", "Due", "RowBatch", "RowModel", "TokenStep", "have_hooks"]
