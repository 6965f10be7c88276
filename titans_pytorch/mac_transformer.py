"""The transformer around the memory: memory as context (MAC) of arXiv 2501.00663."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.flex import create_mac_block_mask, flex_attention
from titans_pytorch.attention.key_values import KeyValueCache
from titans_pytorch.attention.segmented import AttnIntermediates, SegmentedAttention
from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.mac.cache import LayerCache, MACCache
from titans_pytorch.mac.layer import Parts, Passed, ViewSelector, feed_forward
from titans_pytorch.mac.positions import AxialPositions, Lengthened
from titans_pytorch.mac.residual_streams import SINKHORN_ITERATIONS, expand
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.sampling import evaluating, filter_arguments, generate, min_p_filter

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

PREFILL_TOKENS = 16384
"""Tokens of a prompt that are read at once"""

SET_BY_THE_TRANSFORMER = (
    "dim",
    "chunk_size",
    "batch_size",
    "model",
    "qkv_receives_diff_views",
    "accept_weight_residual",
)


class LossBreakdown(NamedTuple):
    """The parts that a loss is the sum of."""

    next_token: Tensor


class MemoryAsContextTransformer(Pretrained, nn.Module):
    """A language model that attends to a window and remembers what is behind it.

        model = MemoryAsContextTransformer(num_tokens=256, dim=256, depth=2, segment_len=128)
        loss = model(torch.randint(0, 256, (1, 1024)), return_loss=True)
        logits, cache = model(ids, return_cache=True)            # (b n 256)
        logits, cache = model(more_ids, cache=cache, return_cache=True)   # goes on at any token
        tokens = model.sample(prompt, 512, use_cache=True)       # (b 512 - prompt)

    Args:
        num_tokens: size of the vocabulary
        dim, depth: features of a token, layers
        segment_len: tokens between inserted long-term tokens; with them, the window of attention
        neural_memory_segment_len: tokens in a chunk of the memory; None: a window
        neural_mem_gate_attn_output: what is read gates the output of attention, instead of joining the streams
        neural_memory_add_value_residual: not supported
        num_longterm_mem_tokens: learned tokens inserted after each segment
        num_persist_mem_tokens: learned keys and values that all tokens see
        neural_memory_batch_size: tokens after which memories take surprises at their current weights
        neural_memory_qkv_receives_diff_views: memories see mixes of all that earlier layers saw
        dim_head, heads: of attention
        ff_mult: width of feed-forward networks
        num_residual_streams: hyper-connection streams
        neural_memory_model: what memories consist of; every one has its own copy
        neural_memory_kwargs: further arguments of `NeuralMemory`
        neural_memory_layers: numbers, from 1, of the layers with a memory; None: all
        use_flex_attn: FlexAttention for whole sequences on CUDA
        sliding_window_attn: every token sees the window before it, not only its own
        neural_mem_weight_residual: surprises are taken with weights of the previous memory mixed in
        token_emb: instead of `nn.Embedding(num_tokens, dim)`, any module from ids to (b n dim)
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
        neural_memory_model: nn.Module | None = None,
        neural_memory_kwargs: Mapping[str, Any] | None = None,
        neural_memory_layers: Sequence[int] | None = None,
        use_flex_attn: bool = False,
        sliding_window_attn: bool = False,
        neural_mem_weight_residual: bool = False,
        token_emb: nn.Module | None = None,
    ) -> None:
        super().__init__()
        value_checks.check_whole(num_tokens=num_tokens, dim=dim, depth=depth, segment_len=segment_len)
        value_checks.check_whole(neural_memory_segment_len=neural_memory_segment_len)
        value_checks.check_whole(num_residual_streams=num_residual_streams)
        value_checks.check_counts(num_longterm_mem_tokens=num_longterm_mem_tokens)
        value_checks.check_positive(ff_mult=ff_mult)
        value_checks.check_not_supported(neural_memory_add_value_residual=neural_memory_add_value_residual)
        memory_layers = value_checks.check_layers("neural_memory_layers", neural_memory_layers, depth)
        memory_kwargs = value_checks.check_reserved(
            "neural_memory_kwargs", neural_memory_kwargs, SET_BY_THE_TRANSFORMER
        )
        if token_emb is not None and not isinstance(token_emb, nn.Module):
            raise TypeError(f"token_emb must be an nn.Module, got {type(token_emb).__name__}")

        self.num_tokens, self.dim = num_tokens, dim
        self.lengthened = Lengthened(segment_len, num_longterm_mem_tokens)
        chunk = neural_memory_segment_len or segment_len + num_longterm_mem_tokens
        self.has_own_embedding = token_emb is not None
        self.token_emb = nn.Embedding(num_tokens, dim) if token_emb is None else token_emb
        self.axial_pos_emb = AxialPositions(dim, chunk)
        self.longterm_mems = nn.Parameter(torch.randn(num_longterm_mem_tokens, dim) * 0.02)
        connect, self.expand_streams, _ = mc_get_init_and_expand_reduce_stream_functions(
            num_residual_streams,
            dim=dim,
            add_stream_embed=True,
            disable=num_residual_streams == 1,
            sinkhorn_iters=SINKHORN_ITERATIONS,
        )
        self.needs_views = neural_memory_qkv_receives_diff_views
        parts = Parts(
            connect=connect,
            memory=partial(
                NeuralMemory,
                dim=dim,
                chunk_size=chunk,
                batch_size=neural_memory_batch_size,
                model=neural_memory_model,
                **memory_kwargs,
            ),
            attention=partial(
                SegmentedAttention,
                dim,
                segment_len,
                num_persist_mem_tokens=num_persist_mem_tokens,
                num_longterm_mem_tokens=num_longterm_mem_tokens,
                dim_head=dim_head,
                heads=heads,
                sliding=sliding_window_attn,
                use_flex_attn=use_flex_attn,
            ),
            ff=partial(feed_forward, dim, ff_mult),
            selector=partial(ViewSelector, dim),
        )
        first_memory = min(memory_layers, default=None)
        self.layers = nn.ModuleList(
            parts.layer(
                number,
                has_memory=number in memory_layers,
                has_views=self.needs_views and number > 1,
                mixes_weights=neural_mem_weight_residual and number != first_memory,
                gates_attention=neural_mem_gate_attn_output,
            )
            for number in range(1, depth + 1)
        )
        self.norm = nn.RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        return_loss_breakdown: bool = False,
        disable_flex_attn: bool = False,
        cache: MACCache | None = None,
        return_cache: bool = False,
        factorized_pos_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Logits or the loss of a sequence, or of its next piece.

        Args:
            ids: (b n)
            return_loss: the cross-entropy of each token but the first, given those before
            return_loss_breakdown: with it, also its parts by name
            disable_flex_attn: take the dense path although use_flex_attn is on
            cache: what the piece before returned; None: a sequence begins
            return_cache: return what the next piece needs; with a loss that is the one that begins with the last token
            factorized_pos_emb: `axial_pos_emb.factors(length)`, computed before

        Returns: logits (b n num_tokens), or the loss, or (loss, parts); with return_cache (that, cache)
        """
        self.check_ids("ids", ids, at_least=2 if return_loss else 1)
        if return_loss_breakdown and not return_loss:
            raise ValueError("return_loss_breakdown needs return_loss=True, got False")
        fed = ids[:, :-1] if return_loss else ids
        hidden, next_cache = self.hidden(fed, cache, disable_flex_attn, factorized_pos_emb)
        answer: Any = self.to_logits(self.norm(hidden))
        if return_loss:
            answer = F.cross_entropy(answer.flatten(0, 1), ids[:, 1:].flatten().long())
            answer = (answer, LossBreakdown(answer)) if return_loss_breakdown else answer
        return (answer, next_cache) if return_cache else answer

    def hidden(
        self,
        ids: Tensor,
        cache: MACCache | None = None,
        disable_flex_attn: bool = False,
        factorized_pos_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, MACCache]:
        """All layers.  ids: (b n) -> (b n dim) before the last norm, and what the next piece needs"""
        if cache is not None:
            self.check_cache(cache, ids.shape[0])
        num_before, count = 0 if cache is None else cache.num_tokens, ids.shape[1]
        embedded = self.token_emb(ids)
        tensor_checks.check_shape("what token_emb gives", embedded, (*ids.shape[:2], self.dim))
        x = self.lengthened.insert(embedded, self.longterm_mems, num_before)
        x = x + self.axial_pos_emb(self.lengthened.length(num_before), x.shape[1], factorized_pos_emb)
        streams = expand(self.expand_streams, x)
        passed = Passed(seen=() if self.needs_views else None)
        kept: list[LayerCache] = []
        befores: Sequence[LayerCache | None]
        befores = [None] * len(self.layers) if cache is None else cache.layers(self.have_memory)
        for layer, before in zip(self.layers, befores, strict=True):
            streams, passed, after = layer(streams, passed, before, disable_flex_attn)
            kept.append(after if after.memory is None else after._replace(memory=after.memory.at_rest()))
        hidden = self.lengthened.drop(streams.sum(dim=2), num_before, count)
        return hidden, MACCache.of(num_before + count, kept)

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
        cache: MACCache | None = None,
    ) -> Tensor:
        """Continue a batch of prompts (b n) to `seq_len` tokens, prompt included.  -> the tokens after it (b seq_len-n)

        temperature: 0 is greedy; filter_fn: (logits, **filter_kwargs) -> logits with removed tokens at -inf, by
        default min-p with min_p=0.1; use_cache: the same tokens, much faster; stop_token: after which a row only
        repeats it, and where all rows have it sampling ends; generator: makes samples reproducible;
        cache: of tokens that were fed before the prompt (and do not count)
        """
        self.check_ids("prompt", prompt)
        value_checks.check_at_least("seq_len", seq_len, prompt.shape[1], "the length of the prompt")
        with evaluating(self):
            return generate(
                Decoder(self, cache, use_cache or cache is not None, seq_len),
                prompt,
                seq_len - prompt.shape[1],
                temperature=temperature,
                filter_fn=filter_fn,
                filter_kwargs=filter_arguments(filter_fn, filter_kwargs),
                stop_token=stop_token,
                generator=generator,
                show_progress=show_progress,
            )

    @property
    def have_memory(self) -> list[bool]:
        """Which layers do."""
        return [layer.memory is not None for layer in self.layers]

    # ---- what comes in

    def check_ids(self, name: str, ids: Tensor, at_least: int = 1) -> None:
        in_range = None if self.has_own_embedding else self.num_tokens
        tensor_checks.check_ids(name, ids, in_range, at_least)

    def check_cache(self, cache: MACCache, batch: int) -> None:
        if not isinstance(cache, MACCache):
            raise TypeError(f"cache must be a MACCache, got {type(cache).__name__}")
        wanted = (len(self.layers), sum(self.have_memory))
        if (got := (len(cache.windows), len(cache.memories))) != wanted:
            raise ValueError(
                f"cache must be of this model's {wanted[0]} layers, {wanted[1]} of them with a memory, got one of "
                f"{got[0]} layers, {got[1]} with a memory"
            )
        tensor_checks.check_batch("cache", cache.batch, batch)
        position = self.lengthened.length(cache.num_tokens)
        for number, window in enumerate(cache.windows, start=1):
            if window.num_seen != position:
                raise ValueError(
                    f"cache must be of this model at position {position}, layer {number} is at {window.num_seen}"
                )


class Decoder:
    """New tokens in, logits of the token after them out; with the cache or without, the same ones."""

    def __init__(
        self, model: MemoryAsContextTransformer, cache: MACCache | None, uses_cache: bool, num_new: int
    ) -> None:
        self.model, self.cache, self.uses_cache = model, cache, uses_cache
        self.fed: Tensor | None = None
        num_tokens = num_new + (0 if cache is None else cache.num_tokens)
        self.positions = model.axial_pos_emb.factors(model.lengthened.length(num_tokens))

    def __call__(self, ids: Tensor) -> Tensor:
        """(b n) -> (b num_tokens)"""
        if self.uses_cache:
            for piece in ids.split(PREFILL_TOKENS, dim=1):
                hidden, self.cache = self.model.hidden(piece, self.cache, factorized_pos_emb=self.positions)
        else:
            self.fed = ids if self.fed is None else torch.cat((self.fed, ids), dim=1)
            hidden, _ = self.model.hidden(self.fed, factorized_pos_emb=self.positions)
        logits: Tensor = self.model.to_logits(self.model.norm(hidden[:, -1]))
        return logits
