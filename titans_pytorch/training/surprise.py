"""How much every token of a text surprises a model and the memories in it, and what their writes save on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.causal_lm import CausalLM, next_token_loss
from titans_pytorch.memory.recorded import recorded_surprises
from titans_pytorch.memory.writes import writes_off
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
        with recorded_surprises(model) as found:
            bits = token_bits(model, ids)
        with writes_off(model) as num_memories:
            saved = token_bits(model, ids) - bits if num_memories else None
    layers = [of_tokens(model, each.loss, len(text)) for each in found]
    memory = torch.stack([each / each.nanmean() for each in layers]).mean(dim=0) if layers else None
    return TextSurprise(bits, memory, saved)


def token_bits(model: CausalLM[Any], ids: Tensor) -> Tensor:
    """What each token costs.  (1 n) -> (n), nan for the first"""
    logits, _ = model.logits_and_state(ids)
    return F.pad(next_token_loss(logits[:, :-1], ids, per_token=True)[0].cpu() * BITS, (1, 0), value=torch.nan)


def of_tokens(model: nn.Module, losses: Tensor, count: int) -> Tensor:
    """(1 h writes) -> (count); without the tokens that the model has inserted"""
    per_write = losses[0].float().mean(dim=0).cpu()
    lengthened: Any = getattr(model, "lengthened", None)
    positions = count if lengthened is None else lengthened.length(count)
    writes = positions * max(round(len(per_write) / positions), 1)  # some memories write several times per token
    per_token = F.pad(per_write, (0, max(writes - len(per_write), 0)), value=torch.nan)
    per_token = per_token[:writes].view(positions, -1).mean(dim=1)
    return per_token if lengthened is None else lengthened.drop(per_token[None, :, None], 0, count)[0, :, 0]
