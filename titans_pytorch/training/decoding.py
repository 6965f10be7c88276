"""A model goes on with a text, through its exact cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from titans_pytorch.sampling import draw, min_p_filter

PIECE = 16_384
"""Bytes of a prompt that are read at once"""


class Reader:
    """New tokens in, logits of the token after them out.  (b n) -> (b v)"""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache: Any = None

    def __call__(self, ids: Tensor) -> Tensor:
        for piece in ids.split(PIECE, dim=1):
            logits, self.cache = self.model(piece, cache=self.cache, return_cache=True)
        last: Tensor = logits[:, -1]
        return last


@torch.no_grad()
def continued(
    model: nn.Module, prompt: bytes, count: int, *, temperature: float = 1.0, seed: int = 0, min_p: float = 0.05
) -> Iterator[int]:
    """`count` bytes after a prompt, one by one as they are drawn."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    generator = Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for drawn in draw(
            Reader(model),
            ids,
            count,
            temperature=temperature,
            filter_fn=min_p_filter,
            filter_kwargs=dict(min_p=min_p),
            generator=generator,
        ):
            yield int(drawn)
    finally:
        model.train(was_training)
