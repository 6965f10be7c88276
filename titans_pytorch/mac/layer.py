"""One layer of the transformer: a memory that reads and writes, attention over a window, a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.mac.cache import LayerCache
from titans_pytorch.mac.residual_streams import open_branch
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory


class SiluGate(nn.Module):
    """The first half of the features, gated by the second.  (... 2d) -> (... d)"""

    def forward(self, x: Tensor) -> Tensor:
        x, gates = x.chunk(2, dim=-1)
        return F.silu(gates) * x


def feed_forward(dim: int, mult: float) -> nn.Sequential:
    hidden = int(dim * mult * 2 / 3)
    return nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 2 * hidden), SiluGate(), nn.Linear(hidden, dim))


class ViewSelector(nn.Sequential):
    """Makes queries, keys and values of a memory from all that earlier layers saw, each by a softmax of its own."""

    def __init__(self, dim: int, num_candidates: int) -> None:
        super().__init__(nn.RMSNorm(dim), nn.Linear(dim, 3 * num_candidates))

    def views(self, candidates: list[Tensor]) -> Tensor:
        """candidates: (b n d) each, the first being the layer's own input -> (3 b n d)"""
        weights = rearrange(self(candidates[0]), "b n (views k) -> b n views k", views=3).softmax(dim=-1)
        return (weights @ torch.stack(candidates, dim=2).to(weights.dtype)).permute(2, 0, 1, 3)


class Passed(NamedTuple):
    """What layers hand on beside the streams, all for the same tokens."""

    values: Tensor | None = None  # (b h n d)  of the first attention
    memory: NeuralMemState | None = None  # of the last memory so far
    seen: tuple[Tensor, ...] | None = None  # (b n d) each  what attentions and feed-forwards saw and said; None: unused


class MACLayer(nn.ModuleList):
    """[memory connection, attention connection, ff connection, view selector, memory, attention, ff]

    The order is that of published checkpoints; what a layer does not have is None.
    """

    def __init__(
        self,
        connections: tuple[nn.Module | None, nn.Module, nn.Module],
        selector: ViewSelector | None,
        memory: NeuralMemory | None,
        attention: SegmentedAttention,
        ff: nn.Sequential,
        *,
        gates_attention: bool,
    ) -> None:
        super().__init__()
        parts = (*connections, selector, memory, attention, ff)
        for i, part in enumerate(parts):
            self.add_module(str(i), part)
        self.gates_attention = gates_attention

    @property
    def memory(self) -> NeuralMemory | None:
        found = self[4]
        return found if isinstance(found, NeuralMemory) else None

    def forward(
        self, streams: Tensor, passed: Passed, cache: LayerCache | None, disable_flex_attn: bool = False
    ) -> tuple[Tensor, Passed, LayerCache]:
        """streams: (b n s d) -> same, what the next layer is handed, what the next piece is"""
        attention_connection, ff_connection, attention, ff = self[1], self[2], self[5], self[6]
        gates, state, memory = None, None, self.memory
        if memory is not None:
            streams, gates, state = self.remember(memory, streams, passed, None if cache is None else cache.memory)
            passed = passed._replace(memory=state)

        branch = open_branch(attention_connection, streams)
        attended, (values, key_values) = attention(
            branch.input,
            value_residual=passed.values,
            disable_flex_attn=disable_flex_attn,
            output_gating=gates,
            cache=None if cache is None else cache.attention,
        )
        streams = branch.add(attended)
        ff_branch = open_branch(ff_connection, streams)
        answer = ff(ff_branch.input)
        streams = ff_branch.add(answer)
        passed = Passed(
            values if passed.values is None else passed.values,
            passed.memory,
            None if passed.seen is None else (*passed.seen, branch.input, attended, ff_branch.input, answer),
        )
        return streams, passed, LayerCache(key_values, state)

    def remember(
        self, memory: NeuralMemory, streams: Tensor, passed: Passed, state: NeuralMemState | None
    ) -> tuple[Tensor, Tensor | None, NeuralMemState]:
        """Store and read; what is read joins the streams or gates the attention.  -> streams, gates, state"""
        connection, selector = self[0], self[3]
        branch = open_branch(connection, streams)
        seq = branch.input
        if isinstance(selector, ViewSelector):
            seq = selector.views([branch.input, *(passed.seen or ())])
        accepts = memory.to_learned_weight_residual_mix is not None
        prev_weights = passed.memory if accepts else None
        retrieved, state = memory(seq, state=state, prev_weights=prev_weights)
        if self.gates_attention:
            return streams, retrieved.sigmoid(), state
        return branch.add(retrieved), None, state


@dataclass(frozen=True)
class Parts:
    """How the parts of a layer are made."""

    connect: Callable[..., nn.Module]
    memory: Callable[..., NeuralMemory]
    attention: Callable[..., SegmentedAttention]
    ff: Callable[[], nn.Sequential]
    selector: Callable[[int], ViewSelector]

    def layer(
        self, number: int, *, has_memory: bool, has_views: bool, mixes_weights: bool, gates_attention: bool
    ) -> MACLayer:
        """The layer with this number, from 1."""
        memory, selector, connection = None, None, None
        # Which stream a branch reads first is its number's, as in the paper, so that a seed fixes all there is.
        nth = 3 * number
        if has_memory:
            memory = self.memory(qkv_receives_diff_views=has_views, accept_weight_residual=mixes_weights)
            selector = self.selector(4 * (number - 1) + 1) if has_views else None
            connection = self.connect(layer_index=nth, add_branch_out_to_residual=not gates_attention)
        connections = (connection, self.connect(layer_index=nth + 1), self.connect(layer_index=nth + 2))
        attention = self.attention(accept_value_residual=number > 1)
        return MACLayer(connections, selector, memory, attention, self.ff(), gates_attention=gates_attention)
