"""From tokens to what a memory stores and is asked: keys, values, queries and every gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.fast_weights.interface import Writes
from titans_pytorch.fast_weights.recurrence import Gates


class MultiheadRMSNorm(nn.Module):
    """RMS norm with a gain `1 + gamma` for each head.  x: (b h t d)"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(dim, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rmsnorm(x) * (self.gamma + 1)


class AveragePool(nn.Module):
    """One vector for each chunk, the mean of its stored tokens.  x: (b n c d), is_stored: (b n c) -> (b n d)"""

    def forward(self, x: Tensor, is_stored: Tensor | None = None) -> Tensor:
        if is_stored is None:
            return reduce(x, "b n c d -> b n d", "mean")
        count = reduce(is_stored.to(x.dtype), "b n c -> b n 1", "sum").clamp(min=1)
        return reduce(x, "b n c d -> b n d", "sum") / count


class AttentionPool(nn.Module):
    """One vector for each chunk, a learned softmax over its stored tokens for every feature; starts as their mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Linear(dim, dim)
        nn.init.zeros_(self.to_attn_logits.weight)
        nn.init.zeros_(self.to_attn_logits.bias)

    def forward(self, x: Tensor, is_stored: Tensor | None = None) -> Tensor:
        logits = self.to_attn_logits(x)
        if is_stored is not None:  # a very negative number, as a chunk without any stored token has to stay finite
            logits = logits.masked_fill(~is_stored[..., None], torch.finfo(logits.dtype).min / 2)
        return (logits.softmax(dim=-2) * x).sum(dim=-2)


class StoredTokens(NamedTuple):
    """Whole chunks of tokens, as they come."""

    keys: Tensor  # (b t dim)    view that keys and gates are made of
    values: Tensor  # (b t dim)    view that values are made of; the same tensor unless views differ
    is_stored: Tensor | None  # (b t)  None: all


class Projected(NamedTuple):
    """Writes, and which of them count."""

    writes: Writes
    is_stored: Tensor | None  # (r n c)
    order: Tensor | None  # (r n c)  where each write of `writes` stood; None: where it is


class Gating(nn.Sequential):
    """A linear layer whose outputs are laid out as the name of the pattern says."""

    def __init__(self, dim: int, num_out: int, pattern: str, *, bias: float | None = None, **sizes: int) -> None:
        linear = nn.Linear(dim, num_out)
        super().__init__(linear, Rearrange(pattern, **sizes))
        if bias is not None:
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, bias)


def max_lr_sigmoid(raw: Tensor, max_lr: float) -> Tensor:
    """The default step size: between 0 and max_lr."""
    return raw.sigmoid() * max_lr


def linear_then(dim_in: int, dim_out: int, activation: nn.Module | None) -> nn.Module:
    linear = nn.Linear(dim_in, dim_out, bias=False)
    return linear if activation is None else nn.Sequential(linear, activation)


class Projections(nn.Module):
    """The layers of a `NeuralMemory` outside its memory; parameter names are those of published checkpoints."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        num_kv_per_token: int,
        activation: nn.Module | None,
        parameter_names: tuple[str, ...],
        momentum_order: int,
        num_combined: int,
        modulates_parameters: bool,
        max_modulation: float,
        mixes_weights: bool,
        attn_pool_chunks: bool,
        pre_rmsnorm: bool,
        post_rmsnorm: bool,
        qk_rmsnorm: bool,
        adaptive_step_transform: Callable[[Tensor], Tensor] | None,
        max_lr: float,
        step_bias: float | None,
        momentum_bias: float | None,
        decay_bias: float | None,
        looks_ahead: bool,
        compacts_masked: bool,
    ) -> None:
        super().__init__()
        inner, u = heads * dim_head, num_kv_per_token
        self.heads, self.dim_head, self.num_kv_per_token = heads, dim_head, u
        self.parameter_names, self.max_modulation = parameter_names, max_modulation
        self.looks_ahead, self.compacts_masked = looks_ahead, compacts_masked
        self.adaptive_step_transform = adaptive_step_transform or partial(max_lr_sigmoid, max_lr=max_lr)

        self.retrieve_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.q_norm = MultiheadRMSNorm(dim_head, heads) if qk_rmsnorm else nn.Identity()
        self.k_norm = MultiheadRMSNorm(dim_head, heads) if qk_rmsnorm else nn.Identity()
        self.multihead_rmsnorm = MultiheadRMSNorm(dim_head, heads) if post_rmsnorm else nn.Identity()

        self.to_queries = linear_then(dim, inner, activation)
        self.to_keys = linear_then(dim, inner * u, activation)
        self.to_values = linear_then(dim, inner * u, activation)
        self.combine_heads = nn.Linear(inner, dim, bias=False) if heads > 1 else nn.Identity()
        gate = (nn.Linear(dim, heads, bias=False), Rearrange("b t h -> b h t 1"), nn.Sigmoid())
        self.retrieve_gate = nn.Sequential(*gate) if heads > 1 else None

        self.reduce_to_chunk_rep = AttentionPool(dim) if attn_pool_chunks else AveragePool()
        self.to_adaptive_step = Gating(dim, heads * u, "b n c (h u) -> (b h) n c u", bias=step_bias, u=u)
        self.to_decay_factor = Gating(dim, heads, "b n h -> (b h) n", bias=decay_bias)
        orders = partial(Gating, dim, pattern="b n (h o) -> o (b h) n")
        has_momentum = momentum_order > 0
        self.to_momentum = (
            orders(heads * momentum_order, bias=momentum_bias, o=momentum_order) if has_momentum else None
        )
        self.to_learned_momentum_combine = orders(heads * num_combined, o=num_combined) if num_combined else None
        num_names = len(parameter_names)
        self.to_layer_modulation = orders(heads * num_names, o=num_names) if modulates_parameters else None
        self.to_learned_weight_residual_mix = Gating(dim, heads, "b n h -> (b h) n") if mixes_weights else None

    def queries(self, tokens: Tensor) -> Tensor:
        """tokens: (b t dim), normed -> (r t d)"""
        split = rearrange(self.to_queries(tokens), "b t (h d) -> b h t d", h=self.heads)
        return rearrange(self.q_norm(split), "b h t d -> (b h) t d")

    def merge(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """What was read: normed, gated by the tokens, heads combined.  reads: (r t d), tokens: (b t dim) -> same"""
        split = self.multihead_rmsnorm(rearrange(reads, "(b h) t d -> b h t d", h=self.heads))
        if self.retrieve_gate is not None:
            split = split * self.retrieve_gate(tokens)
        return self.combine_heads(rearrange(split, "b h t d -> b t (h d)"))

    def project_writes(self, tokens: StoredTokens, chunk: int, dtype: torch.dtype) -> Projected:
        """Keys, values, rates and gates of whole chunks.  dtype: in which weights are kept"""
        is_stored = None if tokens.is_stored is None else rearrange(tokens.is_stored, "b (n c) -> b n c", c=chunk)
        from_keys = self.normed(tokens.keys, tokens.is_stored)
        same = tokens.values is tokens.keys
        from_values = from_keys if same else self.normed(tokens.values, tokens.is_stored)
        chunks = rearrange(from_keys, "b (n c) d -> b n c d", c=chunk)
        keys = self.split_chunks(self.k_norm, self.to_keys(from_keys), chunk)
        values = self.split_chunks(nn.Identity(), self.to_values(from_values), chunk)
        rates = self.adaptive_step_transform(self.to_adaptive_step(chunks).to(dtype))  # theta: (r n c u)
        pooled = self.reduce_to_chunk_rep(chunks, is_stored)
        poison = pooled if same else pooled + reduce(from_values, "b (n c) d -> b n d", "mean", c=chunk)
        gates = self.gates(pooled, poison, is_stored, dtype)
        modulation, mix = self.shares(pooled, dtype)
        if is_stored is not None:
            is_stored = repeat(is_stored, "b n c -> (b h) n c u", h=self.heads, u=self.num_kv_per_token)
        if self.looks_ahead:
            keys, values, rates = keys[:, :, :-1], values[:, :, 1:], rates[:, :, :-1]
            is_stored = None if is_stored is None else is_stored[:, :, :-1] & is_stored[:, :, 1:]
        merge = "r n c u ... -> r n (c u) ..."
        keys, values, rates = (rearrange(x.to(dtype).nan_to_num(0.0, 0.0, 0.0), merge) for x in (keys, values, rates))
        writes = Writes(keys, values, rates, gates, modulation, mix)
        if is_stored is None:
            return Projected(writes, None, None)
        return self.without_masked(writes, rearrange(is_stored, "r n c u -> r n (c u)"))

    def normed(self, tokens: Tensor, is_stored: Tensor | None) -> Tensor:
        if is_stored is not None:  # what is not stored may be anything, NaN included
            tokens = torch.where(is_stored[..., None], tokens, 0.0)
        return self.store_norm(tokens)

    def split_chunks(self, norm: nn.Module, projected: Tensor, chunk: int) -> Tensor:
        """(b t hud) -> (r n c u d)"""
        h, u = self.heads, self.num_kv_per_token
        split = norm(rearrange(projected, "b t (h u d) -> b h (t u) d", h=h, u=u))
        return rearrange(split, "b h (n c u) d -> (b h) n c u d", c=chunk, u=u)

    def gates(self, pooled: Tensor, poison: Tensor, is_stored: Tensor | None, dtype: torch.dtype) -> Gates:
        """pooled: (b n dim), one vector for each chunk"""
        log_keep = F.logsigmoid(-self.to_decay_factor(pooled).to(dtype).nan_to_num(0.0, 0.0, 0.0))  # 1 - alpha
        combine, momentum = self.to_learned_momentum_combine, self.to_momentum
        log_momentum = (
            None if momentum is None else F.logsigmoid(momentum(pooled).to(dtype).nan_to_num(0.0, 0.0, 0.0))
        )  # eta
        mixed = None if combine is None else combine(pooled).to(dtype).nan_to_num(0.0, 0.0, 0.0).softmax(dim=0)
        poisoned = repeat((poison.detach() * 0).sum(dim=-1).to(dtype), "b n -> (b h) n", h=self.heads)
        if is_stored is None:
            return Gates(log_keep, log_momentum, mixed, None, poisoned)
        stored = repeat(is_stored.any(dim=-1).to(dtype), "b n -> (b h) n", h=self.heads)
        log_momentum = None if log_momentum is None else log_momentum * stored
        return Gates(log_keep * stored, log_momentum, mixed, stored, poisoned)

    def shares(self, pooled: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        """lambda of every parameter, and the share of the previous layer's weights.  (r n) each"""
        modulation, mix = self.to_layer_modulation, self.to_learned_weight_residual_mix
        shares = (
            []
            if modulation is None
            else modulation(pooled).to(dtype).nan_to_num(0.0, 0.0, 0.0).sigmoid() * self.max_modulation
        )
        by_name = dict(zip(self.parameter_names, shares, strict=True)) if modulation is not None else {}
        return by_name, None if mix is None else mix(pooled).to(dtype).nan_to_num(0.0, 0.0, 0.0).sigmoid()

    def without_masked(self, writes: Writes, is_stored: Tensor) -> Projected:
        """Rates of zero; for a model that mixes tokens, what is masked also moves behind all that is stored.

        Masked keys are ones: zero is where norms in a memory model may have no second derivative.
        """
        keys = torch.where(is_stored[..., None], writes.keys, 1.0)
        writes = writes._replace(keys=keys, rates=writes.rates * is_stored)
        if not self.compacts_masked:
            return Projected(writes, is_stored, None)
        order = is_stored.logical_not().byte().argsort(dim=-1, stable=True)
        keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in (writes.keys, writes.values))
        return Projected(
            writes._replace(keys=keys, values=values, rates=writes.rates.gather(2, order)), is_stored, order
        )
