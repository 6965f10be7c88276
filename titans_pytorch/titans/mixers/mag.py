"""Memory as gate: attention and memory side by side, over the same tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.public_names import register_state
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.gate import Gate
from titans_pytorch.titans.mixers.mixer import AttentionMixer
from titans_pytorch.tnt_memory import TNTState


@register_state
class MAGState(NamedTuple):
    """What a block of MAG keeps: its memory, and what attention may still see."""

    memory: NeuralMemState | TNTState | None = None
    prefix: KeyValues | None = None  # of the persistent tokens
    recent: KeyValues | None = None  # of the window before the next token


class MemoryAsGate(AttentionMixer):
    """Attention and memory side by side, over the same tokens."""

    State = MAGState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.gate = Gate(config.dim, config.gate) if config.memory else None

    def forward(self, x: Tensor, start: int, state: MAGState | None) -> tuple[Tensor, MAGState]:
        state = self.begin(x) if state is None else state
        y, recent = self.slide(x, start, state.prefix, state.recent)  # eq. (27)
        if self.memory is None or self.gate is None:
            return y, MAGState(None, state.prefix, recent)
        read, memory = self.memory(x, state=state.memory)
        return self.gate(y, read), MAGState(memory, state.prefix, recent)  # eq. (28)

    def begin(self, x: Tensor) -> MAGState:
        persistent = self.persistent_tokens(x.shape[0])
        if persistent is None:
            return MAGState()
        _, memory = self.remember(persistent)  # eq. (26)
        return MAGState(memory, self.attention.keys_values(persistent, None))
