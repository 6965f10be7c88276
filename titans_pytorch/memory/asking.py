"""A memory that is only read: one set of weights for all tokens, or those of every chunk."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from titans_pytorch.checks import tensor_checks
from titans_pytorch.fast_weights.blocks.dense import DenseBlock
from titans_pytorch.fast_weights.blocks.still import StillBlock
from titans_pytorch.fast_weights.interface import Carry
from titans_pytorch.memory.core import MemoryCore
from titans_pytorch.memory.rows import outside_inference
from titans_pytorch.memory.state import QueryTail
from titans_pytorch.memory.still import read_block


class AskedMemory(MemoryCore):
    """What a `NeuralMemory` answers without storing anything."""

    def retrieve_memories(self, seq: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Only read.  seq: (b n dim), the first token being that of a fresh stream -> (b n dim)

        Args:
            seq: (b n dim)
            weights: one memory (b·h ...) for all tokens, or as `updates` (b·h N+1 ...) that of each chunk
        """
        name, form = next(iter(self.fast_forms().items()))
        weights = dict(tensor_checks.checked_trajectory("weights", weights, self.parameter_names))
        if weights[name].ndim < form.ndim + 2:
            return self.ask(seq, weights)[0]
        self.check_not_projected()
        seq, num_chunks = self.checked_tokens(seq), weights[name].shape[1] - 1
        self.check_weights(weights, seq.shape[0], num_chunks + 1)
        last_group = (seq.shape[1] - 1 + self.layout.first) // self.layout.retrieve_chunk
        tensor_checks.check_enough_chunks(num_chunks, self.layout.weight_index(last_group))
        weights = {name: outside_inference(weight) for name, weight in weights.items()}
        return read_block(self, seq, DenseBlock(weights, Carry({}, {}, {}, {})), None)[0]

    def ask(
        self, tokens: Tensor, weights: Mapping[str, Tensor], tail: QueryTail | None = None
    ) -> tuple[Tensor, QueryTail]:
        """Read one memory, whatever was stored since: M*(q) of eq. 15.  tokens: (b n dim) -> (b n dim), the next tail

        Args:
            tokens: (b n dim)
            weights: (b·h ...), as `state.current`
            tail: what the call before returned, so that pieces of any length give what one call gives; None: the first
                tokens of a stream
        """
        self.check_not_projected()
        tokens = self.checked_tokens(tokens)
        self.check_weights(dict(weights), tokens.shape[0])
        weights = {name: outside_inference(weight) for name, weight in weights.items()}
        return read_block(self, tokens, StillBlock(Carry(weights, weights, {}, {})), tail)

    def check_not_projected(self) -> None:
        """Refuse a memory whose queries are projected on the keys of what is stored meanwhile."""
        if self.sharding.key_span is not None:
            raise ValueError(f"what is only read must have qk_projection=None, got {self.sharding.key_span!r}")

    def checked_tokens(self, seq: Tensor) -> Tensor:
        """Tokens to be read, (b n dim) or one (b dim).  -> (b n dim)"""
        tensor_checks.check_sequence("seq", seq, views=None, dim=self.dim, dtype=self.dtype)
        return seq if seq.ndim == 3 else seq.unsqueeze(1)

    def check_weights(self, weights: Mapping[str, Tensor], batch: int, *chunks: int) -> None:
        """Weights that this module could have made."""
        tensor_checks.check_weights("weights", weights, self.weight_shapes(batch, *chunks), self.weight_dtype)
