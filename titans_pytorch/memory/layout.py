"""How a memory cuts time into chunks, groups of readers, and batches."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """How a memory cuts time."""

    retrieve_chunk: int
    store_chunk: int
    batch: int | None  # tokens after which the base is renewed
    first: int = 1  # position of a stream's first reader; 0: the token that completes a chunk does not read it

    def weight_index(self, group: int) -> int:
        """After how many chunks the weights are that a group reads."""
        return group * self.retrieve_chunk // self.store_chunk

    def first_group(self, chunks: int) -> int:
        """The first group that reads weights of at least so many chunks."""
        return -(-chunks * self.store_chunk // self.retrieve_chunk)
