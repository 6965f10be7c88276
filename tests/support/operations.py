"""How many operations something takes, as benchmarks count them."""

from benchmarks.operations import Counting, operations

__all__ = ["Counting", "operations"]
