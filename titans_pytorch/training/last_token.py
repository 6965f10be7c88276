"""Answers that are read off what a model made of the last token: MAD's compression (arXiv 2403.17844)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.layers.feed_forward import feed_forward


class LastTokenReader(CausalLM[None]):
    """A model with a small network on top that is trained with it: from the features of the last token and a position
    to the token that was there.

    It answers as a language model does, at every position, but sees nothing of a sequence but its last token.
    """

    def __init__(self, model: CausalLM[Any], num_positions: int) -> None:
        super().__init__()
        self.model, self.num_tokens, dim = model, model.num_tokens, model.to_logits.in_features
        self.norm, self.positions = nn.RMSNorm(dim), nn.Parameter(0.02 * torch.randn(num_positions, dim))
        self.mix, self.to_logits = feed_forward(dim, 2 * dim), nn.Linear(dim, model.num_tokens, bias=False)

    def hidden_states(self, ids: Tensor, state: None = None) -> tuple[Tensor, None]:
        """ids: (b n), whole sequences -> (b n dim)"""
        if ids.shape[1] != len(self.positions):
            raise ValueError(
                f"sequences must be of {len(self.positions)} tokens, as it was made for, got {ids.shape[1]}"
            )
        hidden, _ = self.model.hidden_states(ids)
        mixed = self.norm(hidden[:, -1:]) + self.positions
        return mixed + self.mix(mixed), None
