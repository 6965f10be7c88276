"""The published package's transformer around the memory, which is not the MAC of the paper: that one is `TitansMAC`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Generator, Tensor, nn
from typing_extensions import Unpack

from titans_pytorch.attention.flex import create_mac_block_mask, flex_attention
from titans_pytorch.attention.key_values import KeyValueCache
from titans_pytorch.attention.segmented import AttnIntermediates, SegmentedAttention
from titans_pytorch.causal_lm import BatchOptions, CausalLM
from titans_pytorch.checks import tensor_checks
from titans_pytorch.decoding import RowModel
from titans_pytorch.layers.calling import Call, plainly
from titans_pytorch.mac.ahead import Ahead
from titans_pytorch.mac.axial import AxialPositions, Factors
from titans_pytorch.mac.by_rows import MACByRows, why_not_stack_by_rows
from titans_pytorch.mac.cache import MACCache
from titans_pytorch.mac.config import MACConfig
from titans_pytorch.mac.layer import MACLayer
from titans_pytorch.mac.lengthened import Lengthened
from titans_pytorch.mac.residual_streams import make_expansion
from titans_pytorch.mac.stack import Stack
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.ragged import RaggedState
from titans_pytorch.sampling import min_p_filter

__all__ = [
    "AttnIntermediates",
    "KeyValueCache",
    "MACCache",
    "MemoryAsContextTransformer",
    "SegmentedAttention",
    "create_mac_block_mask",
    "flex_attention",
    "min_p_filter",
]


class LossBreakdown(NamedTuple):
    """The parts that a loss is the sum of."""

    next_token: Tensor


class BatchAndLabels(BatchOptions, total=False):
    """What `forward` takes beside, as it says."""

    labels: Tensor | None


Answer = Tensor | tuple[Tensor, LossBreakdown]


class MemoryAsContextTransformer(Pretrained, CausalLM[MACCache]):
    """A language model that attends to a window and remembers what is behind it, in the published package's design.

    It is NOT the paper's "memory as context" (MAC), in spite of its name: here a memory's answer is added to the
    residual streams or gates the attention. The paper's MAC, whose attention sees that answer, is `TitansMAC`.

        model = MemoryAsContextTransformer(num_tokens=256, dim=256, depth=2, segment_len=128)
        loss = model(torch.randint(0, 256, (1, 1024)), return_loss=True)
        logits, cache = model(ids, return_cache=True)            # (b n 256)
        logits, cache = model(more_ids, cache=cache, return_cache=True)   # goes on at any token
        tokens = model.sample(prompt, 512, use_cache=True)       # (b 512 - prompt)

    Args:
        num_tokens: size of the vocabulary
        dim: features of a token
        depth: layers
        segment_len: tokens between inserted long-term tokens; with them, the window of attention
        neural_memory_segment_len: tokens in a chunk of the memory; None: a window
        neural_mem_gate_attn_output: what is read gates the output of attention, instead of joining the streams
        neural_memory_add_value_residual: not supported
        num_longterm_mem_tokens: learned tokens inserted after each segment
        num_persist_mem_tokens: learned keys and values that all tokens see
        neural_memory_batch_size: tokens after which memories take surprises at their current weights
        neural_memory_qkv_receives_diff_views: memories see mixes of all that earlier layers saw
        dim_head: width of a head of attention
        heads: of attention
        ff_mult: width of feed-forward networks over dim, see ff_hidden
        num_residual_streams: hyper-connection streams
        neural_memory_model: what memories consist of; every one has its own copy
        neural_memory_kwargs: further arguments of `NeuralMemory`
        neural_memory_layers: numbers, from 1, of the layers with a memory; None: all
        use_flex_attn: FlexAttention for whole sequences on CUDA
        sliding_window_attn: every token sees the window before it, not only its own
        neural_mem_weight_residual: surprises are taken with weights of the previous memory mixed in
        token_emb: instead of `nn.Embedding(num_tokens, dim)`, any module from ids to (b n dim)
        ff_hidden: hidden features of feed-forward networks; None: 2/3 ff_mult dim
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        segment_len: int,
        neural_memory_segment_len: int | None = None,
        neural_mem_gate_attn_output: bool = False,
        neural_memory_add_value_residual: bool = False,
        num_longterm_mem_tokens: int = 0,
        num_persist_mem_tokens: int = 0,
        neural_memory_batch_size: int | None = None,
        neural_memory_qkv_receives_diff_views: bool = False,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        num_residual_streams: int = 4,
        neural_memory_model: nn.Module | str | None = None,
        neural_memory_kwargs: Mapping[str, Any] | None = None,
        neural_memory_layers: Sequence[int] | None = None,
        use_flex_attn: bool = False,
        sliding_window_attn: bool = False,
        neural_mem_weight_residual: bool = False,
        token_emb: nn.Module | None = None,
        ff_hidden: int | None = None,
    ) -> None:
        super().__init__()
        if token_emb is not None and not isinstance(token_emb, nn.Module):
            raise TypeError(f"token_emb must be an nn.Module, got {type(token_emb).__name__}")
        self.config = MACConfig(
            num_tokens=num_tokens,
            dim=dim,
            depth=depth,
            segment_len=segment_len,
            neural_memory_segment_len=neural_memory_segment_len,
            neural_mem_gate_attn_output=neural_mem_gate_attn_output,
            neural_memory_add_value_residual=neural_memory_add_value_residual,
            num_longterm_mem_tokens=num_longterm_mem_tokens,
            num_persist_mem_tokens=num_persist_mem_tokens,
            neural_memory_batch_size=neural_memory_batch_size,
            neural_memory_qkv_receives_diff_views=neural_memory_qkv_receives_diff_views,
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
            num_residual_streams=num_residual_streams,
            neural_memory_model=neural_memory_model,
            neural_memory_kwargs=neural_memory_kwargs,
            neural_memory_layers=neural_memory_layers,
            use_flex_attn=use_flex_attn,
            sliding_window_attn=sliding_window_attn,
            neural_mem_weight_residual=neural_mem_weight_residual,
            ff_hidden=ff_hidden,
        )
        self.num_tokens, self.dim = num_tokens, dim
        self.lengthened = Lengthened(segment_len, num_longterm_mem_tokens)
        self.longterm_mems = nn.Parameter(torch.empty(num_longterm_mem_tokens, dim))
        self.reset_parameters()
        self.has_own_embedding = token_emb is not None
        self.token_emb = nn.Embedding(num_tokens, dim) if token_emb is None else token_emb
        self.axial_pos_emb = AxialPositions(dim, self.config.memory_chunk)
        self.expand_streams = make_expansion(num_residual_streams, dim)
        self.layers = nn.ModuleList(MACLayer(self.config, number) for number in range(1, depth + 1))
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def reset_parameters(self) -> None:
        """Only what it owns itself, the long-term tokens."""
        nn.init.normal_(self.longterm_mems, std=0.02)

    @overload
    def forward(
        self,
        ids: Tensor | None = ...,
        return_loss: bool = ...,
        return_loss_breakdown: Literal[False] = ...,
        disable_flex_attn: bool = ...,
        cache: MACCache | RaggedState | None = ...,
        return_cache: Literal[False] = ...,
        factorized_pos_emb: Factors | None = ...,
        **given: Unpack[BatchAndLabels],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        ids: Tensor | None = ...,
        return_loss: bool = ...,
        return_loss_breakdown: Literal[False] = ...,
        disable_flex_attn: bool = ...,
        cache: MACCache | RaggedState | None = ...,
        *,
        return_cache: Literal[True],
        factorized_pos_emb: Factors | None = ...,
        **given: Unpack[BatchAndLabels],
    ) -> tuple[Tensor, Any]: ...

    @overload
    def forward(
        self,
        ids: Tensor | None = ...,
        *,
        return_loss: Literal[True],
        return_loss_breakdown: Literal[True],
        disable_flex_attn: bool = ...,
        cache: MACCache | RaggedState | None = ...,
        return_cache: Literal[False] = ...,
        factorized_pos_emb: Factors | None = ...,
        **given: Unpack[BatchAndLabels],
    ) -> tuple[Tensor, LossBreakdown]: ...

    @overload
    def forward(
        self,
        ids: Tensor | None = ...,
        return_loss: bool = ...,
        return_loss_breakdown: bool = ...,
        disable_flex_attn: bool = ...,
        cache: MACCache | RaggedState | None = ...,
        return_cache: bool = ...,
        factorized_pos_emb: Factors | None = ...,
        **given: Unpack[BatchAndLabels],
    ) -> Answer | tuple[Answer, Any]: ...

    def forward(
        self,
        ids: Tensor | None = None,
        return_loss: bool = False,
        return_loss_breakdown: bool = False,
        disable_flex_attn: bool = False,
        cache: MACCache | RaggedState | None = None,
        return_cache: bool = False,
        factorized_pos_emb: Factors | None = None,
        **given: Unpack[BatchAndLabels],
    ) -> Answer | tuple[Answer, Any]:
        """Logits or the loss of a sequence, or of its next piece.

        Args:
            ids: (b n)
            return_loss: the cross-entropy of each token but the first, given those before
            return_loss_breakdown: with it, also its parts by name
            disable_flex_attn: take the dense path although use_flex_attn is on
            cache: what the piece before returned; None: a sequence begins
            return_cache: return what the next piece needs; with a loss that is the one that begins with the last token
            factorized_pos_emb: `axial_pos_emb.factors(length)`, computed before

        Other Parameters:
            labels: (b n), with return_loss: what tokens should have been, -100 for those that do not count; None: ids
            embeds: (b n dim), instead of ids
            attention_mask: (b n), False or 0 for padding anywhere in a row: it leaves no trace, and outputs there are 0
            document_ids: (b n), another document begins where the number changes, and is read as if it were alone
            cu_seqlens: (k + 1), the borders between documents of a single row, from 0 to n

        Returns: logits (b n num_tokens), or the loss, or (loss, parts); with return_cache (that, cache)
        """
        if return_loss_breakdown and not return_loss:
            raise ValueError("return_loss_breakdown needs return_loss=True, got False")
        labels, beside = given.pop("labels", None), cast(BatchOptions, given)
        if labels is not None and not return_loss:
            raise ValueError("labels need return_loss=True, got False")
        reading: dict[str, Any] = dict(disable_flex_attn=disable_flex_attn, factorized_pos_emb=factorized_pos_emb)
        if return_loss and not return_cache:
            only, next_cache = self.loss(ids, cache, labels=labels, **beside, **reading), None
        elif return_loss:
            only, next_cache = self.loss_and_state(ids, cache, labels=labels, given=beside, **reading)
        elif return_cache:
            only, next_cache = self.logits_and_state(ids, cache, given=beside, **reading)
        else:
            only, next_cache = self.logits_alone(ids, cache, given=beside, **reading), None
        answer: Answer = (only, LossBreakdown(only)) if return_loss_breakdown else only
        return (answer, next_cache) if return_cache else answer

    def hidden_states(
        self,
        ids: Tensor,
        state: MACCache | None = None,
        disable_flex_attn: bool = False,
        factorized_pos_emb: Factors | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Tensor, MACCache]:
        """All layers.  ids: (b n) -> (b n dim) before the last norm, and what the next piece needs

        ahead: what was worked out before for all tokens that follow
        """
        embedded = self.token_emb(ids)
        tensor_checks.check_shape("what token_emb gives", embedded, (*ids.shape[:2], self.dim))
        return self.hidden_of(embedded, state, disable_flex_attn, factorized_pos_emb, ahead)

    def hidden_of(  # type: ignore[override]
        self,
        x: Tensor,
        state: MACCache | None = None,
        disable_flex_attn: bool = False,
        factorized_pos_emb: Factors | None = None,
        ahead: Ahead | None = None,
        call: Call = plainly,
    ) -> tuple[Tensor, MACCache]:
        """`hidden_states` of tokens that are embedded.  x: (b n dim)

        call: how a layer is called, (layer, *arguments) -> streams (b n' s dim), which have the long-term tokens
        between them, and what the layer hands on
        """
        if state is not None:
            self.stack.check_cache(state, x.shape[0])
        return self.stack.read(
            x, state, disable_flex_attn=disable_flex_attn, factors=factorized_pos_emb, ahead=ahead, call=call
        )

    @property
    def stack(self) -> Stack:
        """What every way to read tokens goes through."""
        layers = cast(Sequence[MACLayer], self.layers)
        return Stack(
            self.lengthened,
            self.longterm_mems,
            self.axial_pos_emb,
            self.expand_streams,
            layers,
            self.norm,
            gives_views=self.config.neural_memory_qkv_receives_diff_views,
        )

    def by_rows(self, compiles: bool = False) -> RowModel | None:
        """What decodes rows at positions of their own as one batch; None: `why_by_groups` says why not."""
        return None if self.why_by_groups else MACByRows(self.stack, self.token_emb, self.to_logits, compiles)

    def why_not_by_rows(self) -> str:
        ours, own = MemoryAsContextTransformer, ("hidden_states", "hidden_of", "logits")
        is_own = all(getattr(type(self), name) is getattr(ours, name) for name in own)
        return why_not_stack_by_rows(self.stack) if is_own else "reads tokens in a way of its own"

    def logits(self, hidden: Tensor) -> Tensor:
        """(... dim), before the last norm -> (... num_tokens)"""
        return self.to_logits(self.norm(hidden))

    def reader(self, state: MACCache | None, num_tokens: int | None) -> Callable[..., tuple[Tensor, MACCache]]:
        """`hidden_states` with what is the same for all tokens to come; with gradients, every call has its own."""
        if torch.is_grad_enabled():
            return self.hidden_states
        return partial(self.hidden_states, ahead=Ahead(self.layers, self.axial_pos_emb))

    @torch.no_grad()
    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.5,
        filter_fn: Callable[..., Tensor] = min_p_filter,
        filter_kwargs: Mapping[str, Any] | None = None,
        show_progress: bool = True,
        use_cache: bool = False,
        *,
        stop_token: int | None = None,
        generator: Generator | None = None,
        cache: MACCache | RaggedState | None = None,
        attention_mask: Tensor | None = None,
        compile: bool = False,
    ) -> Tensor:
        """Continue a batch of prompts (b n) to `seq_len` tokens, prompt included.  -> the tokens after it (b seq_len-n)

        Args:
            prompt: (b n) token ids
            seq_len: tokens in the end, those of the prompt included
            temperature: 0 is greedy
            filter_fn: (logits, **filter_kwargs) -> logits with removed tokens at -inf; by default min-p
            filter_kwargs: further arguments of it; of min-p, min_p=0.1
            show_progress: show a bar
            use_cache: the same tokens, much faster
            stop_token: after which a row only repeats it; where all rows have it sampling ends
            generator: makes samples reproducible
            cache: of tokens that were fed before the prompt, which do not count
            attention_mask: (b n), False or 0 for padding of the prompt, wherever it is
            compile: with use_cache, decode with steps that `torch.compile` makes, in graphs that serve every token
        """
        return self.continued(
            prompt,
            seq_len,
            cache,
            uses_state=use_cache or cache is not None,
            compiles=compile,
            attention_mask=attention_mask,
            temperature=temperature,
            filter_fn=filter_fn,
            filter_kwargs=filter_kwargs,
            stop_token=stop_token,
            generator=generator,
            show_progress=show_progress,
        )

    # ---- what comes in

    def check_ids(self, name: str, ids: Tensor, at_least: int = 1) -> None:
        """Refuse what are not ids of this vocabulary; an embedding of the user's knows itself what it takes."""
        in_range = None if self.has_own_embedding else self.num_tokens
        tensor_checks.check_ids(name, ids, in_range, at_least)
