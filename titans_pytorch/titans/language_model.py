"""The Titans models over token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.sampling import evaluating, filter_arguments, generate, min_p_filter
from titans_pytorch.titans.backbone import Read, TitansBackbone
from titans_pytorch.titans.config import TitansConfig, Variant
from titans_pytorch.titans.state import TitansState

PREFILL_TOKENS = 4096
"""Tokens of a prompt that are read at once"""


class TitansLanguageModel(Pretrained, nn.Module):
    """Token ids to logits of the next ones.

        model = TitansMAC(256, TitansConfig(dim=256, depth=4))
        model.loss(torch.randint(0, 256, (2, 1025))).backward()
        logits, state = model(ids)                               # (b n 256)
        logits, state = model(more_ids, state)                   # goes on at any token
        tokens = model.sample(prompt, 512)                       # (b 512 - prompt)

    num_tokens: size of the vocabulary
    """

    variant: ClassVar[Variant]

    def __init__(self, num_tokens: int, config: TitansConfig) -> None:
        super().__init__()
        value_checks.check_whole(num_tokens=num_tokens)
        self.num_tokens = num_tokens
        self.backbone = TitansBackbone(self.variant, config)
        self.token_emb = nn.Embedding(num_tokens, config.dim)
        self.to_logits = nn.Linear(config.dim, num_tokens, bias=False)

    @property
    def config(self) -> TitansConfig:
        return self.backbone.config

    def forward(self, ids: Tensor, state: TitansState | None = None) -> Read:
        """ids: (b n) -> logits (b n num_tokens), and what the next piece needs"""
        tensor_checks.check_ids("ids", ids, self.num_tokens, 1)
        hidden, state = self.backbone(self.token_emb(ids), state)
        return Read(self.to_logits(hidden), state)

    def loss(self, ids: Tensor, state: TitansState | None = None) -> Tensor:
        """Mean cross-entropy of each token but the first, given those before.  ids: (b n)"""
        return self.loss_and_state(ids, state)[0]

    def loss_and_state(self, ids: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """The same, and the state for the piece that begins with the last token."""
        tensor_checks.check_ids("ids", ids, self.num_tokens, 2)
        logits, state = self(ids[:, :-1], state)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().long()), state

    @torch.no_grad()
    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_fn: Callable[..., Tensor] = min_p_filter,
        filter_kwargs: Mapping[str, Any] | None = None,
        *,
        use_cache: bool = True,
        state: TitansState | None = None,
        stop_token: int | None = None,
        generator: Generator | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Continue a batch of prompts (b n) to `seq_len` tokens, prompt included.  -> the tokens after it (b seq_len-n)

        temperature: 0 is greedy; filter_fn: (logits, **filter_kwargs) -> logits with removed tokens at -inf, by
        default min-p with min_p=0.1; use_cache: False reads everything again for each token, to the same end;
        state: of tokens that were read before the prompt (and do not count); stop_token: after which a row only
        repeats it, and where all rows have it sampling ends; generator: makes samples reproducible
        """
        tensor_checks.check_ids("prompt", prompt, self.num_tokens, 1)
        value_checks.check_at_least("seq_len", seq_len, prompt.shape[1], "the length of the prompt")
        with evaluating(self):
            return generate(
                Continuation(self, state) if use_cache else Rereading(self, state),
                prompt,
                seq_len - prompt.shape[1],
                temperature=temperature,
                filter_fn=filter_fn,
                filter_kwargs=filter_arguments(filter_fn, filter_kwargs),
                stop_token=stop_token,
                generator=generator,
                show_progress=show_progress,
            )


class Continuation:
    """New tokens (b n) in, logits of the token after them (b num_tokens) out."""

    def __init__(self, model: TitansLanguageModel, state: TitansState | None) -> None:
        self.model, self.state = model, state

    def __call__(self, ids: Tensor) -> Tensor:
        for piece in ids.split(PREFILL_TOKENS, dim=1):
            hidden, self.state = self.model.backbone(self.model.token_emb(piece), self.state)
        return self.model.to_logits(hidden[:, -1])


class Rereading:
    """The same, from all tokens again each time."""

    def __init__(self, model: TitansLanguageModel, state: TitansState | None) -> None:
        self.model, self.state = model, state
        self.read: list[Tensor] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.read.append(ids)
        hidden, _ = self.model.backbone(self.model.token_emb(torch.cat(self.read, dim=1)), self.state)
        return self.model.to_logits(hidden[:, -1])


class TitansMAC(TitansLanguageModel):
    """Memory as context: attention over segments, to which the memory adds what it knew before them."""

    variant = "mac"


class TitansMAG(TitansLanguageModel):
    """Memory as gate: sliding-window attention and memory side by side."""

    variant = "mag"


class TitansMAL(TitansLanguageModel):
    """Memory as layer: sliding-window attention over what the memory says."""

    variant = "mal"


class TitansLMM(TitansLanguageModel):
    """The long-term memory alone, without attention."""

    variant = "lmm"
