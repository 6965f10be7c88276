"""What a `MemoryAsContextTransformer` is made of, as data: its published arguments, checked, and what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from titans_pytorch.checks import value_checks
from titans_pytorch.layers.feed_forward import hidden_width

SET_BY_THE_TRANSFORMER = (
    "dim",
    "chunk_size",
    "batch_size",
    "model",
    "qkv_receives_diff_views",
    "accept_weight_residual",
)


@dataclass(frozen=True, kw_only=True)
class MACConfig:
    """The arguments of `MemoryAsContextTransformer`, which says what they mean and what they are by default."""

    num_tokens: int
    dim: int
    depth: int
    segment_len: int
    neural_memory_segment_len: int | None
    neural_mem_gate_attn_output: bool
    neural_memory_add_value_residual: bool
    num_longterm_mem_tokens: int
    num_persist_mem_tokens: int
    neural_memory_batch_size: int | None
    neural_memory_qkv_receives_diff_views: bool
    dim_head: int
    heads: int
    ff_mult: float
    num_residual_streams: int
    neural_memory_model: nn.Module | str | None
    neural_memory_kwargs: Mapping[str, Any] | None
    neural_memory_layers: Sequence[int] | None
    use_flex_attn: bool
    sliding_window_attn: bool
    neural_mem_weight_residual: bool
    ff_hidden: int | None

    def __post_init__(self) -> None:
        value_checks.check_whole(
            num_tokens=self.num_tokens, dim=self.dim, depth=self.depth, segment_len=self.segment_len
        )
        value_checks.check_whole(neural_memory_segment_len=self.neural_memory_segment_len)
        value_checks.check_whole(num_residual_streams=self.num_residual_streams, ff_hidden=self.ff_hidden)
        value_checks.check_counts(num_longterm_mem_tokens=self.num_longterm_mem_tokens)
        value_checks.check_positive(ff_mult=self.ff_mult)
        if given := self.neural_memory_add_value_residual:
            raise ValueError(f"neural_memory_add_value_residual is not supported, got {given!r}, allowed is False")
        value_checks.check_layers("neural_memory_layers", self.neural_memory_layers, self.depth)
        value_checks.check_reserved("neural_memory_kwargs", self.neural_memory_kwargs, SET_BY_THE_TRANSFORMER)

    @property
    def memory_chunk(self) -> int:
        """Tokens in a chunk of the memory: as given, or a window."""
        return self.neural_memory_segment_len or self.segment_len + self.num_longterm_mem_tokens

    @property
    def ff_width(self) -> int:
        """Hidden features of a feed-forward network."""
        return hidden_width(self.dim, self.ff_mult) if self.ff_hidden is None else self.ff_hidden

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Numbers, from 1, of the layers with a memory."""
        return value_checks.check_layers("neural_memory_layers", self.neural_memory_layers, self.depth)

    def has_memory(self, number: int) -> bool:
        """Whether the layer with this number, from 1, has a memory."""
        return number in self.memory_layers

    def has_views(self, number: int) -> bool:
        """Whether its memory sees mixes of what earlier layers saw, of which the first has none."""
        return self.neural_memory_qkv_receives_diff_views and number > 1

    def is_viewed(self, number: int) -> bool:
        """Whether a memory after this layer sees mixes of what this layer and those before it saw."""
        return self.neural_memory_qkv_receives_diff_views and number < max(self.memory_layers, default=number)

    def mixes_weights(self, number: int) -> bool:
        """Whether its memory mixes in the weights of the memory before it, of which the first has none."""
        return self.neural_mem_weight_residual and number != min(self.memory_layers, default=None)

    def is_mixed_in(self, number: int) -> bool:
        """Whether a memory after this layer's mixes in its weights."""
        return self.neural_mem_weight_residual and number < max(self.memory_layers, default=number)
