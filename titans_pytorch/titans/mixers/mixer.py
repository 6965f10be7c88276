"""What all mixers have: persistent tokens and a memory, and, with attention, a window.

A mixer maps the next tokens of a sequence (b n dim), already normed, to (b n dim), and its state to the next one.
Equations are numbered as in arXiv 2501.00663; what the paper leaves open is in docs/paper.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titans_pytorch.attention.key_values import KeyValues, joined
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.titans.attention import Attention, attend_sliding
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.memory import make_memory
from titans_pytorch.titans.state import LayerState
from titans_pytorch.tnt_memory import TNTState


class Mixer(nn.Module):
    """What mixes the tokens of a block: persistent tokens in front of them, and a memory unless that is switched off.

    A kind of mixer names its `State`, a NamedTuple of tensors (first axis: the batch), key-values and memory states.
    """

    State: ClassVar[Any]

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        num = config.num_persistent
        self.persistent = nn.Parameter(torch.empty(num, config.dim)) if num else None
        Mixer.reset_parameters(self)
        self.memory = make_memory(config) if config.memory else None

    def forward(self, x: Tensor, start: int, state: Any) -> tuple[Tensor, Any]:
        """x: (b n dim), the first token being number `start` of the sequence; state: None if a sequence begins"""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Only what it owns itself, persistent tokens; a kind with more parameters of its own sets these, too."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    @property
    def parts(self) -> frozenset[str]:
        """Names of what every state of this mixer holds, in all of its tokens."""
        return frozenset(() if self.memory is None else ("memory",))

    def own_state(self, state: Any) -> Any:
        """A state of this mixer as it is; one from before mixers had states of their own becomes such a one."""
        if isinstance(state, LayerState):
            return self.State(*(getattr(state, name) for name in self.State._fields))
        return state

    @property
    def is_idle(self) -> bool:
        """Whether it does nothing at all."""
        return self.memory is None

    def persistent_tokens(self, batch: int) -> Tensor | None:
        """(b P dim)"""
        return None if self.persistent is None else self.persistent.expand(batch, -1, -1)

    def remember(self, first: Tensor) -> tuple[Tensor, NeuralMemState | TNTState | None]:
        """What is read for the first tokens of a sequence, and the memory after them; without one, the tokens."""
        return (first, None) if self.memory is None else self.memory(first)


class AttentionMixer(Mixer):
    """A mixer with attention over a window, and over the persistent tokens."""

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
        turns = self.attention.turns(start, x.shape[1], x)
        tokens = joined(recent, self.attention.keys_values(x, turns))
        y = attend_sliding(self.attention.queries(x), turns, tokens, prefix, self.window)
        return self.attention.out(y), tokens.last(self.window - 1)
