"""The long-term memory by itself, without attention."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.public_names import register_state
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.mixers.mixer import Mixer
from titans_pytorch.tnt_memory import TNTState


@register_state
class LMMState(NamedTuple):
    """What a block of LMM keeps: its memory."""

    memory: NeuralMemState | TNTState | None = None


class MemoryAlone(Mixer):
    """No attention; without the memory, nothing."""

    State = LMMState

    def __init__(self, config: TitansConfig) -> None:
        if not config.memory:
            config = replace(config, num_persistent=0)
        super().__init__(config)

    def forward(self, x: Tensor, start: int, state: LMMState | None) -> tuple[Tensor, LMMState]:
        if self.memory is None:
            return torch.zeros_like(x), LMMState()
        memory = self.begin(x) if state is None else state.memory
        read, memory = self.memory(x, state=memory)  # eqs. (13-15)
        return read, LMMState(memory)

    def begin(self, x: Tensor) -> NeuralMemState | TNTState | None:
        persistent = self.persistent_tokens(x.shape[0])
        return None if persistent is None else self.remember(persistent)[1]  # eq. (19)
