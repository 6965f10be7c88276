"""The Titans models over token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from titans_pytorch.causal_lm import BatchOptions, CausalLM
from titans_pytorch.checks import value_checks
from titans_pytorch.decoding import RowModel
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.ragged import RaggedState
from titans_pytorch.sampling import min_p_filter
from titans_pytorch.titans.backbone import Read, TitansBackbone
from titans_pytorch.titans.by_rows import TitansByRows, why_not_by_rows
from titans_pytorch.titans.config import TitansConfig, Variant
from titans_pytorch.titans.state import TitansState


class TitansLanguageModel(Pretrained, CausalLM[TitansState]):
    """Token ids to logits of the next ones.

        model = TitansMAC(256, TitansConfig(dim=256, depth=4))
        model.loss(torch.randint(0, 256, (2, 1025))).backward()
        logits, state = model(ids)                               # (b n 256)
        logits, state = model(more_ids, state)                   # goes on at any token
        tokens = model.sample(prompt, 512)                       # (b 512 - prompt)

    Args:
        num_tokens: size of the vocabulary
        config: what the blocks are made of
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
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.backbone.blocks

    @property
    def config(self) -> TitansConfig:
        return self.backbone.config

    def forward(
        self,
        ids: Tensor | None = None,
        state: TitansState | RaggedState | None = None,
        *,
        embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Read:
        """Logits of the token after each, of a sequence or of its next piece.

        Args:
            ids: (b n)
            state: what the piece before returned; None: sequences begin
            embeds: (b n dim), instead of ids
            attention_mask: (b n), False or 0 for padding anywhere in a row: it leaves no trace, and outputs there are 0
            document_ids: (b n), another document begins where the number changes, and is read as if it were alone
            cu_seqlens: (k + 1), the borders between documents of a single row, from 0 to n

        Returns: logits (b n num_tokens), and what the next piece needs: a `RaggedState` where rows differ in length
        """
        given: BatchOptions = {
            "embeds": embeds,
            "attention_mask": attention_mask,
            "document_ids": document_ids,
            "cu_seqlens": cu_seqlens,
        }
        return Read(*self.logits_and_state(ids, state, given=given))

    def hidden_states(self, ids: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """All blocks.  ids: (b n) -> (b n dim), normed, and what the next piece needs"""
        return self.hidden_of(self.token_emb(ids), state)

    def hidden_of(self, x: Tensor, state: TitansState | None = None, **reading: Any) -> tuple[Tensor, TitansState]:
        """`hidden_states` of tokens that are embedded.  x: (b n dim)"""
        return self.backbone.read(x, state)

    def by_rows(self, compiles: bool = False) -> RowModel | None:
        """What decodes rows at positions of their own as one batch; None: `why_by_groups` says why not."""
        return None if self.why_by_groups else TitansByRows(self.backbone, self.token_emb, self.logits, compiles)

    def why_not_by_rows(self) -> str:
        ours = TitansLanguageModel
        is_own = all(getattr(type(self), name) is getattr(ours, name) for name in ("hidden_states", "hidden_of"))
        return why_not_by_rows(self.backbone) if is_own else "reads tokens in a way of its own"

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
        state: TitansState | RaggedState | None = None,
        attention_mask: Tensor | None = None,
        stop_token: int | None = None,
        generator: Generator | None = None,
        show_progress: bool = False,
        compile: bool = False,
    ) -> Tensor:
        """Continue a batch of prompts (b n) to `seq_len` tokens, prompt included.  -> the tokens after it (b seq_len-n)

        Args:
            prompt: (b n) token ids
            seq_len: tokens in the end, those of the prompt included
            temperature: 0 is greedy
            filter_fn: (logits, **filter_kwargs) -> logits with removed tokens at -inf; by default min-p
            filter_kwargs: further arguments of it; of min-p, min_p=0.1
            use_cache: False reads everything again for each token, to the same end
            state: of tokens that were read before the prompt, which do not count
            attention_mask: (b n), False or 0 for padding of the prompt, wherever it is
            stop_token: after which a row only repeats it; where all rows have it sampling ends
            generator: makes samples reproducible
            show_progress: show a bar
            compile: decode with steps that `torch.compile` makes, in graphs that serve every token, and later calls
        """
        return self.continued(
            prompt,
            seq_len,
            state,
            uses_state=use_cache,
            compiles=compile,
            attention_mask=attention_mask,
            temperature=temperature,
            filter_fn=filter_fn,
            filter_kwargs=filter_kwargs,
            stop_token=stop_token,
            generator=generator,
            show_progress=show_progress,
        )


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
