"""The four ways to use the memory: as context (MAC), as gate (MAG), as layer (MAL), and by itself (LMM).

A mixer maps the next tokens of a sequence (b n dim), already normed, to (b n dim), and its state to the next one.
Equations are numbered as in arXiv 2501.00663; what the paper leaves open is in docs/paper.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.attention.masks import context_mask, window_mask
from titans_pytorch.attention.rotary import turned
from titans_pytorch.attention.windowed import attend
from titans_pytorch.layers.norm import RMSNorm
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.attention import Attention, attend_sliding
from titans_pytorch.titans.config import TitansConfig, Variant
from titans_pytorch.titans.gate import Gate
from titans_pytorch.titans.memory import lookback_of, make_memory
from titans_pytorch.titans.state import LayerState, SegmentState


class Mixer(nn.Module):
    """Persistent tokens, and a memory unless that is switched off."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.persistent = (
            nn.Parameter(torch.randn(config.num_persistent, config.dim)) if config.num_persistent else None
        )
        self.memory = make_memory(config) if config.memory else None

    def forward(self, x: Tensor, start: int, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x: (b n dim), the first token being number `start` of the sequence; state: None if a sequence begins"""
        raise NotImplementedError

    @property
    def parts(self) -> frozenset[str]:
        """Names of what every state of this mixer holds."""
        return frozenset(() if self.memory is None else ("memory",))

    @property
    def is_idle(self) -> bool:
        """Whether it does nothing at all."""
        return self.memory is None

    def persistent_tokens(self, batch: int) -> Tensor | None:
        """(b P dim)"""
        return None if self.persistent is None else self.persistent.expand(batch, -1, -1)

    def remember(self, first: Tensor) -> tuple[Tensor, NeuralMemState | None]:
        """What is read for the first tokens of a sequence, and the memory after them; without one, the tokens."""
        return (first, None) if self.memory is None else self.memory(first)


class AttentionMixer(Mixer):
    """With attention over a window, and over the persistent tokens."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.attention = Attention(config.dim, config.heads)

    @property
    def parts(self) -> frozenset[str]:
        return super().parts | frozenset(() if self.persistent is None else ("prefix",))

    @property
    def is_idle(self) -> bool:
        return False

    def slide(
        self, x: Tensor, start: int, prefix: KeyValues | None, recent: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """Attention over the last `window` tokens and the prefix.  -> (b n dim), what the next token sees"""
        turns = self.attention.turns(start, x.shape[1])
        tokens = joined(recent, self.attention.keys_values(x, turns))
        y = attend_sliding(self.attention.queries(x), turns, tokens, prefix, self.window)
        return self.attention.out(y), tokens.last(self.window - 1)


class MemoryAsContext(AttentionMixer):
    """Attention inside segments, over what the memory knew before the segment and the segment itself."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.context_norm = RMSNorm(config.dim) if config.memory else nn.Identity()
        self.keeps_input = config.layer_residual and config.memory
        self.gate = Gate(config.dim, config.gate) if config.memory else None
        self.lookback = 0 if self.memory is None else lookback_of(self.memory)

    @property
    def parts(self) -> frozenset[str]:
        return super().parts | frozenset(() if self.memory is None else ("segment",))

    def forward(self, x: Tensor, start: int, state: LayerState | None) -> tuple[Tensor, LayerState]:
        state = self.begin(x) if state is None else state
        outputs, done, count = [], 0, x.shape[1]
        while done < count:
            offset = (start + done) % self.window
            stop = min(done + self.window - offset, count)
            output, state = self.in_segment(x[:, done:stop], start + done, state)
            outputs.append(output)
            done = stop
        return torch.cat(outputs, dim=1), state

    def begin(self, x: Tensor) -> LayerState:
        batch, persistent = x.shape[0], self.persistent_tokens(x.shape[0])
        prefix = None
        if persistent is not None:
            prefix = self.attention.keys_values(persistent, self.attention.turns(0, persistent.shape[1]))
        if self.memory is None:
            return LayerState(prefix=prefix)
        memory = self.memory.init_state(batch)
        return LayerState(memory, prefix, None, SegmentState(None, memory.states[0], None))

    def in_segment(self, x: Tensor, start: int, state: LayerState) -> tuple[Tensor, LayerState]:
        """The next tokens of one segment."""
        attention, count = self.attention, x.shape[1]
        num_persistent = 0 if state.prefix is None else state.prefix.length
        offset = start % self.window
        place = num_persistent + offset  # in S~, which is a sequence by itself: [persistent | h | segment]
        turns = attention.turns(place + self.window, count)
        recent = joined(state.recent, attention.keys_values(x, turns))
        context, segment = None, state.segment
        if self.memory is not None and segment is not None:
            h, segment = self.read_before(self.memory, x, segment)  # eq. (21)
            context = joined(segment.context, attention.keys_values(h, attention.turns(place, count)))
            segment = segment._replace(context=context)
        mask = self.mask(count, offset + count, num_persistent, context is not None, x.device)
        keys_values = joined(state.prefix, context, recent)  # eq. (22)
        q = attention.queries(x)
        y = attention.out(attend(turned(q, q.shape[-1], *turns), *keys_values, mask))  # eq. (23)
        output, memory = y, state.memory
        if self.memory is not None and self.gate is not None:
            y = y.to(x.dtype)  # half precision under autocast
            y = x + y if self.keeps_input else y
            read, memory = self.memory(y, state=memory)  # eq. (24)
            output = self.gate(y, read)  # eq. (25)
        if offset + count < self.window:
            return output, LayerState(memory, state.prefix, recent, segment)
        if memory is not None and segment is not None:
            segment = SegmentState(None, memory.states[0], segment.tail)
        return output, LayerState(memory, state.prefix, None, segment)

    def mask(
        self, num_queries: int, num_tokens: int, num_persistent: int, has_context: bool, device: torch.device
    ) -> Tensor | None:
        """Who sees whom in a segment so far; None for a single token, which sees all of it.  -> (i j)"""
        if num_queries == 1:
            return None
        if has_context:
            return context_mask(num_queries, num_tokens, num_persistent, device)
        return window_mask(num_queries, num_tokens, num_persistent, self.window, True, device)

    def read_before(self, memory: NeuralMemory, x: Tensor, segment: SegmentState) -> tuple[Tensor, SegmentState]:
        """What the memory knew of these tokens before their segment.  -> h (b n dim), where the segment is then"""
        tail = segment.tail
        seen = x if tail is None else torch.cat((tail, x), dim=1)
        h = memory.retrieve_memories(seen, segment.before)[:, seen.shape[1] - x.shape[1] :]
        tail = seen[:, -self.lookback :].clone() if self.lookback else None
        return self.context_norm(h), segment._replace(tail=tail)


class MemoryAsGate(AttentionMixer):
    """Attention and memory side by side, over the same tokens."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.gate = Gate(config.dim, config.gate) if config.memory else None

    def forward(self, x: Tensor, start: int, state: LayerState | None) -> tuple[Tensor, LayerState]:
        state = self.begin(x) if state is None else state
        y, recent = self.slide(x, start, state.prefix, state.recent)  # eq. (27)
        if self.memory is None or self.gate is None:
            return y, LayerState(None, state.prefix, recent)
        read, memory = self.memory(x, state=state.memory)
        return self.gate(y, read), LayerState(memory, state.prefix, recent)  # eq. (28)

    def begin(self, x: Tensor) -> LayerState:
        persistent = self.persistent_tokens(x.shape[0])
        if persistent is None:
            return LayerState()
        _, memory = self.remember(persistent)  # eq. (26)
        return LayerState(memory, self.attention.keys_values(persistent, None))


class MemoryAsLayer(AttentionMixer):
    """Attention over what the memory says."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.keeps_input = config.layer_residual and config.memory
        self.norm = RMSNorm(config.dim) if config.memory else None

    def forward(self, x: Tensor, start: int, state: LayerState | None) -> tuple[Tensor, LayerState]:
        state = self.begin(x) if state is None else state
        y, memory = x, state.memory
        if self.memory is not None:
            y, memory = self.memory(x, state=memory)  # eq. (30)
        o, recent = self.slide(self.normed(y, x), start, state.prefix, state.recent)  # eq. (31)
        return y + o if self.keeps_input else o, LayerState(memory, state.prefix, recent)

    def begin(self, x: Tensor) -> LayerState:
        persistent = self.persistent_tokens(x.shape[0])
        if persistent is None:
            return LayerState()
        read, memory = self.remember(persistent)  # eq. (29)
        return LayerState(memory, self.attention.keys_values(self.normed(read, persistent), None))

    def normed(self, read: Tensor, x: Tensor) -> Tensor:
        """What attention is given for tokens x."""
        if self.norm is None:
            return read
        return self.norm(read + x if self.keeps_input else read)


class MemoryAlone(Mixer):
    """No attention; without the memory, nothing."""

    def __init__(self, config: TitansConfig) -> None:
        if not config.memory:
            config = replace(config, num_persistent=0)
        super().__init__(config)

    def forward(self, x: Tensor, start: int, state: LayerState | None) -> tuple[Tensor, LayerState]:
        if self.memory is None:
            return torch.zeros_like(x), LayerState()
        memory = self.begin(x) if state is None else state.memory
        read, memory = self.memory(x, state=memory)  # eqs. (13-15)
        return read, LayerState(memory)

    def begin(self, x: Tensor) -> NeuralMemState | None:
        persistent = self.persistent_tokens(x.shape[0])
        return None if persistent is None else self.remember(persistent)[1]  # eq. (19)


MIXERS: dict[Variant, type[Mixer]] = {
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
    "lmm": MemoryAlone,
}
