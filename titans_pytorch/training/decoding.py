"""A model goes on with a text, through its exact state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.sampling import draw, evaluating, min_p_filter
from titans_pytorch.training.text import Ids


@torch.no_grad()
def continued(
    model: CausalLM[Any], prompt: Ids, count: int, *, temperature: float = 1.0, seed: int = 0, min_p: float = 0.05
) -> Iterator[int]:
    """`count` tokens after a prompt (n), one by one as they are drawn."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.tolist()], device=device)
    with evaluating(model):
        for drawn in draw(
            model.decoder(None),
            ids,
            count,
            temperature=temperature,
            filter_fn=min_p_filter,
            filter_kwargs=dict(min_p=min_p),
            generator=Generator(device).manual_seed(seed),
        ):
            yield int(drawn)
