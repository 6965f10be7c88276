"""How much every token of a text surprises a model and the memories in it, and what their writes save on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.causal_lm import CausalLM, next_token_loss
from titans_pytorch.memory.writes import writes_off
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.sampling import evaluating
from titans_pytorch.training.evaluation import BITS
from titans_pytorch.training.text import Ids


class TextSurprise(NamedTuple):
    """What was measured for each token; nan where nothing was: the first token, a chunk that is not complete.

    The last two are None where the model has no memory.
    """

    bits: Tensor  # (n) that the model needs for a token, given those before
    memory: Tensor | None  # (n) loss of the memories, mean over layers and heads, each layer over its own mean
    saved: Tensor | None  # (n) bits more that the model needs where its memories store nothing


@torch.no_grad()
def text_surprise(model: CausalLM[Any], text: Ids) -> TextSurprise:
    """Read a text (n), and where there are memories a second time with their writes off."""
    ids = torch.tensor([text.tolist()], device=next(model.parameters()).device)
    with evaluating(model):
        with recorded(model) as records:
            bits = token_bits(model, ids)
        with writes_off(model) as num_memories:
            saved = token_bits(model, ids) - bits if num_memories else None
    layers = [of_tokens(model, losses, len(text)) for losses in records]
    memory = torch.stack([each / each.nanmean() for each in layers]).mean(dim=0) if layers else None
    return TextSurprise(bits, memory, saved)


def token_bits(model: CausalLM[Any], ids: Tensor) -> Tensor:
    """What each token costs.  (1 n) -> (n), nan for the first"""
    logits, _ = model.logits_and_state(ids)
    return F.pad(next_token_loss(logits[:, :-1], ids, per_token=True)[0].cpu() * BITS, (1, 0), value=torch.nan)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what each memory returns as its loss, (b h writes), while the model runs as ever."""
    records: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"return_surprises": True}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        *answer, (loss, _) = output
        records.append(loss.detach())
        return tuple(answer)

    handles = []
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            handles += [module.register_forward_pre_hook(ask, with_kwargs=True)]
            handles += [module.register_forward_hook(keep, with_kwargs=True)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def of_tokens(model: nn.Module, losses: Tensor, count: int) -> Tensor:
    """(1 h writes) -> (count); without the tokens that the model has inserted"""
    per_write = losses[0].float().mean(dim=0).cpu()
    lengthened: Any = getattr(model, "lengthened", None)
    positions = count if lengthened is None else lengthened.length(count)
    writes = positions * max(round(len(per_write) / positions), 1)  # some memories write several times per token
    per_token = F.pad(per_write, (0, max(writes - len(per_write), 0)), value=torch.nan)
    per_token = per_token[:writes].view(positions, -1).mean(dim=1)
    return per_token if lengthened is None else lengthened.drop(per_token[None, :, None], 0, count)[0, :, 0]
