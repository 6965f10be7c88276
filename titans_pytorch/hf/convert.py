"""Models of the library as models of transformers, and back; both share their weights, which are never changed."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import nn

from titans_pytorch.hf.config import VARIANTS, MACTransformerConfig, TitansModelConfig
from titans_pytorch.hf.heads import CausalHead, MACTransformerForCausalLM, TitansForCausalLM
from titans_pytorch.hf.models import part
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.titans.language_model import TitansLanguageModel

LibraryModel = TitansLanguageModel | MemoryAsContextTransformer
ELSEWHERE = ("token_emb", "to_logits")
"""Parts of a model of the library that transformers has under names of its own"""


@overload
def from_library(model: TitansLanguageModel, **kwargs: Any) -> TitansForCausalLM: ...


@overload
def from_library(model: MemoryAsContextTransformer, **kwargs: Any) -> MACTransformerForCausalLM: ...


def from_library(model: LibraryModel, **kwargs: Any) -> CausalHead:
    """A model of the library as one of transformers, around the same modules.

        titans = TitansMAG.from_pretrained("ours")
        from_library(titans, eos_token_id=0).save_pretrained("theirs")

    Args:
        model: MAC, MAG, MAL, LMM or a `MemoryAsContextTransformer`
        kwargs: further fields of the configuration, as ids of special tokens
    """
    made: CausalHead
    with torch.device("meta"):  # nothing of what is made here stays
        if isinstance(model, TitansLanguageModel):
            made = TitansForCausalLM(TitansModelConfig.of(model.variant, model.num_tokens, model.config, **kwargs))
            made.model.backbone = model.backbone
        elif isinstance(model, MemoryAsContextTransformer):
            if model.has_own_embedding:
                raise ValueError("model must have its own nn.Embedding, got one with a token_emb that was passed to it")
            made = MACTransformerForCausalLM(MACTransformerConfig.of(model, **kwargs))
            share(model, part(made.model, "transformer"))
        else:
            raise TypeError(f"model must be a Titans model or MemoryAsContextTransformer, got {type(model).__name__}")
    made.model.embed_tokens, made.lm_head = part(model, "token_emb"), model.to_logits
    made.config.dtype = model.to_logits.weight.dtype
    return made.train(model.training)


def to_library(model: CausalHead) -> LibraryModel:
    """A model of transformers as one of the library, around the same modules; a tied head becomes one of its own.

    to_library(AutoModelForCausalLM.from_pretrained("theirs")).save_pretrained("ours")
    """
    made: LibraryModel
    with torch.device("meta"):
        if isinstance(model, TitansForCausalLM):
            made = VARIANTS[model.config.variant](model.config.vocab_size, model.config.titans_config())
            made.backbone = part(model.model, "backbone")
        elif isinstance(model, MACTransformerForCausalLM):
            made = MemoryAsContextTransformer(**model.config.arguments())
            share(part(model.model, "transformer"), made)
        else:
            raise TypeError(
                f"model must be a TitansForCausalLM or MACTransformerForCausalLM, got {type(model).__name__}"
            )
    made.token_emb, made.to_logits = model.model.embed_tokens, model.lm_head
    if made.to_logits.weight is made.token_emb.weight:
        made.to_logits.weight = nn.Parameter(made.to_logits.weight.detach().clone())
    return made.train(model.training)


def share(given: MemoryAsContextTransformer, taker: MemoryAsContextTransformer) -> None:
    """Make all parts of one transformer those of another, but for the embedding and the head."""
    for name, child in given.named_children():
        if name not in ELSEWHERE:
            setattr(taker, name, child)
    for name, parameter in given.named_parameters(recurse=False):
        setattr(taker, name, parameter)
