"""Memory as context: attention inside segments, over what the memory knew before the segment."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.attention.masks import context_mask, window_mask
from titans_pytorch.attention.rotary import turned
from titans_pytorch.attention.windowed import attend
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.layers.norm import RMSNorm
from titans_pytorch.memory.state import NeuralMemState, QueryTail
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.public_names import register_state
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.gate import Gate
from titans_pytorch.titans.mixers.mixer import AttentionMixer
from titans_pytorch.titans.state import SegmentState


@register_state
class Segment(NamedTuple):
    """Where a sequence is in a segment: what was asked of the memory before it, and what it answered so far."""

    context: KeyValues | None  # of what was read for the segment's tokens so far, h; None: no token yet
    before: Weights  # (b·h ...)  the memory before the segment
    tail: QueryTail | None  # what asking goes on with; None: nothing was asked


@register_state
class MACState(NamedTuple):
    """What a block of MAC keeps: its memory, and where it is in its segment."""

    memory: NeuralMemState | None = None
    prefix: KeyValues | None = None  # of the persistent tokens
    recent: KeyValues | None = None  # of the segment so far
    segment: Segment | None = None


class MemoryAsContext(AttentionMixer):
    """Attention inside segments, over what the memory knew before the segment and the segment itself."""

    State = MACState
    memory: NeuralMemory | None  # which can be asked alone

    def __init__(self, config: TitansConfig) -> None:
        if config.memory_local_chunks:
            raise ValueError(
                "variant must be mag, mal or lmm with memory_local_chunks, whose memories are not asked alone, got mac"
            )
        super().__init__(config)
        self.context_norm = RMSNorm(config.dim) if config.memory else nn.Identity()
        self.keeps_input = config.layer_residual and config.memory
        self.gate = Gate(config.dim, config.gate) if config.memory else None

    @property
    def parts(self) -> frozenset[str]:
        return super().parts | frozenset(() if self.memory is None else ("segment",))

    def forward(self, x: Tensor, start: int, state: MACState | None) -> tuple[Tensor, MACState]:
        state = self.begin(x) if state is None else state
        outputs, done, count = [], 0, x.shape[1]
        while done < count:
            offset = (start + done) % self.window
            stop = min(done + self.window - offset, count)
            output, state = self.in_segment(x[:, done:stop], start + done, state)
            outputs.append(output)
            done = stop
        return torch.cat(outputs, dim=1), state

    def begin(self, x: Tensor) -> MACState:
        batch, persistent = x.shape[0], self.persistent_tokens(x.shape[0])
        prefix = None
        if persistent is not None:
            prefix = self.attention.keys_values(persistent, self.attention.turns(0, persistent.shape[1], x))
        if self.memory is None:
            return MACState(prefix=prefix)
        memory = self.memory.init_state(batch)
        return MACState(memory, prefix, None, Segment(None, memory.current, None))

    def in_segment(self, x: Tensor, start: int, state: MACState) -> tuple[Tensor, MACState]:
        """The next tokens of one segment."""
        attention, count = self.attention, x.shape[1]
        num_persistent = 0 if state.prefix is None else state.prefix.length
        offset = start % self.window
        place = num_persistent + offset  # in S~, which is a sequence by itself: [persistent | h | segment]
        turns = attention.turns(place + self.window, count, x)
        recent = joined(state.recent, attention.keys_values(x, turns))
        context, segment = None, state.segment
        if self.memory is not None and segment is not None:
            h, tail = self.memory.ask(x, segment.before, segment.tail)  # eq. (21)
            own = attention.keys_values(self.context_norm(h), attention.turns(place, count, x))
            context = joined(segment.context, own)
            segment = Segment(context, segment.before, tail)
        mask = self.mask(count, offset + count, num_persistent, context is not None, x.device)
        keys_values = joined(state.prefix, context, recent)  # eq. (22)
        q = attention.queries(x)
        y = attention.out(attend(turned(q, *turns), *keys_values, mask))  # eq. (23)
        output, memory = y, state.memory
        if self.memory is not None and self.gate is not None:
            y = y.to(x.dtype)  # half precision under autocast
            y = x + y if self.keeps_input else y
            read, memory = self.memory(y, state=memory)  # eq. (24)
            output = self.gate(y, read)  # eq. (25)
        if offset + count < self.window:
            return output, MACState(memory, state.prefix, recent, segment)
        if memory is not None and segment is not None:
            segment = Segment(None, memory.current, segment.tail)
        return output, MACState(memory, state.prefix, None, segment)

    def mask(
        self, num_queries: int, num_tokens: int, num_persistent: int, has_context: bool, device: torch.device
    ) -> Tensor | None:
        """Who sees whom in a segment so far; None for a single token, which sees all of it.  -> (i j)"""
        if num_queries == 1:
            return None
        if has_context:
            return context_mask(num_queries, num_tokens, num_persistent, device)
        return window_mask(num_queries, num_tokens, num_persistent, self.window, True, device)

    def own_state(self, state: Any) -> Any:
        """A state of this mixer; older files keep the last tokens of a segment instead of what asking goes on with."""
        state = super().own_state(state)
        segment = None if state is None else state.segment
        if isinstance(segment, SegmentState) and self.memory is not None:
            context, before, tokens = segment
            tail = None if tokens is None else self.memory.ask(tokens, before)[1]
            state = state._replace(segment=Segment(context, before, tail))
        return state
