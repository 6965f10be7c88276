"""Memory as layer: attention over what the memory says."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.layers.norm import RMSNorm
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.public_names import register_state
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.mixers.mixer import AttentionMixer
from titans_pytorch.tnt_memory import TNTState


@register_state
class MALState(NamedTuple):
    """What a block of MAL keeps: its memory, and what attention may still see."""

    memory: NeuralMemState | TNTState | None = None
    prefix: KeyValues | None = None  # of the persistent tokens
    recent: KeyValues | None = None  # of the window before the next token


class MemoryAsLayer(AttentionMixer):
    """Attention over what the memory says."""

    State = MALState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.keeps_input = config.layer_residual and config.memory
        self.norm = RMSNorm(config.dim) if config.memory else None

    def forward(self, x: Tensor, start: int, state: MALState | None) -> tuple[Tensor, MALState]:
        state = self.begin(x) if state is None else state
        y, memory = x, state.memory
        if self.memory is not None:
            y, memory = self.memory(x, state=memory)  # eq. (30)
        o, recent = self.slide(self.normed(y, x), start, state.prefix, state.recent)  # eq. (31)
        return y + o if self.keeps_input else o, MALState(memory, state.prefix, recent)

    def begin(self, x: Tensor) -> MALState:
        persistent = self.persistent_tokens(x.shape[0])
        if persistent is None:
            return MALState()
        read, memory = self.remember(persistent)  # eq. (29)
        return MALState(memory, self.attention.keys_values(self.normed(read, persistent), None))

    def normed(self, read: Tensor, x: Tensor) -> Tensor:
        """What attention is given for tokens x."""
        if self.norm is None:
            return read
        return self.norm(read + x if self.keeps_input else read)
