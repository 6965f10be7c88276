"""One layer of the transformer: a memory that reads and writes, attention over a window, a feed-forward network."""

from __future__ import annotations

from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.layers.feed_forward import feed_forward
from titans_pytorch.mac.ahead import NOTHING_AHEAD, LayerAhead
from titans_pytorch.mac.cache import LayerCache
from titans_pytorch.mac.config import MACConfig
from titans_pytorch.mac.gradients import mixed
from titans_pytorch.mac.residual_streams import Branch, make_connection, open_branch
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory

SLOTS = ("memory_connection", "attention_connection", "ff_connection", "view_selector", "memory", "attention", "ff")
"""Parts of a layer in the order of published checkpoints, where their numbers name parameters; some are None"""


def slot(name: str) -> Any:
    """The part of a layer that stands in this place, which is None in a layer that has no such part."""
    number = str(SLOTS.index(name))
    return property(lambda layer: layer._modules[number])


class ViewSelector(nn.Sequential):
    """Makes queries, keys and values of a memory from all that earlier layers saw, each by a softmax of its own."""

    def __init__(self, dim: int, num_candidates: int) -> None:
        super().__init__(nn.RMSNorm(dim), nn.Linear(dim, 3 * num_candidates))

    def views(self, candidates: list[Tensor]) -> Tensor:
        """candidates: (b n d) each, the first being the layer's own input -> (3 b n d)"""
        weights = rearrange(self(candidates[0]), "b n (views k) -> b n views k", views=3).softmax(dim=-1)
        return mixed(weights, candidates).permute(2, 0, 1, 3)


class Passed(NamedTuple):
    """What layers hand on beside the streams, all for the same tokens."""

    values: Tensor | None = None  # (b h n d)  of the first attention
    memory: NeuralMemState | None = None  # of the last memory so far
    seen: tuple[Tensor, ...] | None = None  # (b n d) each  what attentions and feed-forwards saw and said; None: unused

    def has_seen(self, *tokens: Tensor) -> Passed:
        """More for later memories to be given, without what it is a part of: (b n d) each."""
        return self if self.seen is None else self._replace(seen=(*self.seen, *(x.contiguous() for x in tokens)))


class MACLayer(nn.ModuleList):
    """A memory (in some layers), attention and a feed-forward network, each with its connection to the streams."""

    memory_connection: nn.Module = slot("memory_connection")
    attention_connection: nn.Module = slot("attention_connection")
    ff_connection: nn.Module = slot("ff_connection")
    view_selector: ViewSelector | None = slot("view_selector")
    memory: NeuralMemory | None = slot("memory")
    attention: SegmentedAttention = slot("attention")
    ff: nn.Sequential = slot("ff")

    def __init__(self, config: MACConfig, number: int) -> None:
        """number: of the layer, from 1"""
        super().__init__()
        self.gates_attention, self.is_mixed_in = config.neural_mem_gate_attn_output, config.is_mixed_in(number)
        self.is_viewed = config.is_viewed(number)
        parts: dict[str, nn.Module] = {}  # in the order in which a seed's random numbers are drawn
        if config.has_memory(number):
            if config.has_views(number):
                parts["view_selector"] = ViewSelector(config.dim, num_candidates=4 * (number - 1) + 1)
            parts["memory"] = make_memory(config, number)
        streams, dim = config.num_residual_streams, config.dim
        # Which stream a branch reads first is its number's, as in the paper, so that a seed fixes all there is.
        nth = 3 * number
        if config.has_memory(number):
            parts["memory_connection"] = make_connection(streams, dim, nth, writes=not self.gates_attention)
        parts["attention_connection"] = make_connection(streams, dim, nth + 1)
        parts["ff_connection"] = make_connection(streams, dim, nth + 2)
        parts["attention"] = make_attention(config, number)
        parts["ff"] = feed_forward(dim, config.ff_width)
        for i, name in enumerate(SLOTS):
            self.add_module(str(i), parts.get(name))

    def forward(
        self,
        streams: Tensor,
        passed: Passed,
        cache: LayerCache | None,
        disable_flex_attn: bool = False,
        ahead: LayerAhead = NOTHING_AHEAD,
    ) -> tuple[Tensor, Passed, LayerCache]:
        """streams: (b n s d) -> same, what the next layer is handed, what the next piece is"""
        gates, state = None, None
        if self.memory is not None:
            branch = open_branch(self.memory_connection, streams, ahead.memory_connection)
            before = None if cache is None else cache.memory
            streams, gates, state = self.remember(self.memory, branch, passed, before)
            passed = passed._replace(memory=state if self.is_mixed_in else None)
        if not self.is_viewed:
            passed = passed._replace(seen=None)

        branch = open_branch(self.attention_connection, streams, ahead.attention_connection)
        attended, (values, key_values) = self.attention(
            branch.input,
            value_residual=passed.values,
            disable_flex_attn=disable_flex_attn,
            output_gating=gates,
            cache=None if cache is None else cache.attention,
            turns=ahead.turns,
        )
        streams = branch.add(attended)
        passed = passed._replace(values=values if passed.values is None else passed.values)
        passed = passed.has_seen(branch.input, attended)
        branch = open_branch(self.ff_connection, streams, ahead.ff_connection)
        answer = self.ff(branch.input)
        after = LayerCache(key_values, None if state is None else state.at_rest())
        return branch.add(answer), passed.has_seen(branch.input, answer), after

    def remember(
        self, memory: NeuralMemory, branch: Branch, passed: Passed, state: NeuralMemState | None
    ) -> tuple[Tensor, Tensor | None, NeuralMemState]:
        """Store and read; what is read joins the streams or gates the attention.  -> streams, gates, state"""
        seq = branch.input
        if self.view_selector is not None:
            seq = self.view_selector.views([branch.input, *(passed.seen or ())])
        accepts = memory.to_learned_weight_residual_mix is not None
        prev_weights = passed.memory if accepts else None
        retrieved, state = memory(seq, state=state, prev_weights=prev_weights)
        return *self.placed(branch, retrieved), state

    def placed(self, branch: Branch, retrieved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where what is read goes: the streams, or gates of attention.  retrieved: (b n d) -> streams, gates"""
        if self.gates_attention:
            return branch.streams, retrieved.sigmoid()
        return branch.add(retrieved), None


def make_memory(config: MACConfig, number: int) -> NeuralMemory:
    """The memory of the layer with this number."""
    return NeuralMemory(
        dim=config.dim,
        chunk_size=config.memory_chunk,
        batch_size=config.neural_memory_batch_size,
        model=config.neural_memory_model,
        qkv_receives_diff_views=config.has_views(number),
        accept_weight_residual=config.mixes_weights(number),
        **(config.neural_memory_kwargs or {}),
    )


def make_attention(config: MACConfig, number: int) -> SegmentedAttention:
    """The attention of the layer with this number; all but the first mix in the values of the first."""
    return SegmentedAttention(
        config.dim,
        config.segment_len,
        num_persist_mem_tokens=config.num_persist_mem_tokens,
        num_longterm_mem_tokens=config.num_longterm_mem_tokens,
        dim_head=config.dim_head,
        heads=config.heads,
        sliding=config.sliding_window_attn,
        accept_value_residual=number > 1,
        use_flex_attn=config.use_flex_attn,
    )
