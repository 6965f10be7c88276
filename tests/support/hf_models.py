"""The five models as models of transformers, tiny and in float64, beside the model of the library they come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import mac_configurations, titans_configurations
from titans_pytorch.hf import from_library

NAMES = ("mac", "mag", "mal", "lmm", "mac transformer")
NUM_TOKENS = 11
PAD = 0


def library_model(name: str, seed: int = 0) -> Any:
    """A model of the library, with whatever it may keep between pieces."""
    if name != "mac transformer":
        return titans_configurations.build(name, seed=seed).eval()
    options = dict(num_longterm_mem_tokens=1, num_persist_mem_tokens=1, neural_memory_layers=(1, 3), batches=2)
    return mac_configurations.build(neural_memory_segment_len=2, seed=seed, **options).eval()


def both(name: str, seed: int = 0, **fields: Any) -> tuple[Any, Any]:
    """A model of the library, and of transformers around it."""
    model = library_model(name, seed)
    return model, from_library(model, pad_token_id=PAD, **fields)


@torch.no_grad()
def library_logits(model: Any, ids: Tensor) -> Tensor:
    """(b n) -> (b n v)"""
    answer = model(ids)
    return answer[0] if isinstance(answer, tuple) else answer


def library_greedy(model: Any, prompt: Tensor, count: int) -> Tensor:
    """The tokens (b count) that the library continues a prompt with."""
    answer: Tensor = model.sample(prompt, prompt.shape[1] + count, temperature=0, use_cache=True, show_progress=False)
    return answer


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Without the token that is used for padding."""
    return torch.randint(1, NUM_TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows (n) of different lengths as one batch, with its mask."""
    longest = max(len(row) for row in rows)
    padded = [torch.cat((torch.full((longest - len(row),), PAD), row)) for row in rows]
    masks = [torch.arange(longest) >= longest - len(row) for row in rows]
    return dict(input_ids=torch.stack(padded), attention_mask=torch.stack(masks).long())
