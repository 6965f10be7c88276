"""From tokens to what a memory stores and is asked, and from what it answers back to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titans_pytorch.fast_weights.interface import Weights, Writes
from titans_pytorch.memory.convolution import Projection, Tails, fresh_tail, projected
from titans_pytorch.memory.gates import GateLayers, finite
from titans_pytorch.memory.options import MemoryOptions

NORM_GAIN = "norm.gamma"
"""Name of the gain of `ResidualNorm`"""


class MultiheadRMSNorm(nn.Module):
    """RMS norm with a gain `1 + gamma` for each head.  x: (b h t d)"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.rmsnorm = nn.RMSNorm(dim, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rmsnorm(x) * (self.gamma + 1)


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
    tails: Tails  # what the convolutions of the next chunks still see


class L2Norm(nn.Module):
    """Vectors of about length 1, with a bounded gradient; those much shorter than 0.001 stay short.  x: (... d)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def projection(dim_in: int, dim_out: int, options: MemoryOptions) -> nn.Module:
    if options.conv_size is not None:
        return Projection(dim_in, dim_out, options.conv_size, options.activation)
    linear = nn.Linear(dim_in, dim_out, bias=False)
    return linear if options.activation is None else nn.Sequential(linear, options.activation)


def head_norm(options: MemoryOptions) -> nn.Module:
    """Of queries and keys."""
    if options.qk_l2norm:
        return L2Norm()
    return MultiheadRMSNorm(options.head_width, options.heads) if options.qk_rmsnorm else nn.Identity()


class Projections(GateLayers):
    """The layers of a `NeuralMemory` outside its memory; parameter names are those of published checkpoints."""

    def __init__(self, options: MemoryOptions, fast: Mapping[str, Tensor], mixes_tokens: bool) -> None:
        """fast: the parameters of the memory, as they are shaped; mixes_tokens: whether its model does"""
        super().__init__()
        dim, heads, dim_head, u = options.dim, options.heads, options.head_width, options.num_kv_per_token
        inner = heads * dim_head
        self.heads, self.dim_head, self.num_kv_per_token = heads, dim_head, u
        self.looks_ahead, self.compacts_masked = options.store_with_lookahead_value, mixes_tokens

        self.retrieve_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.q_norm, self.k_norm = head_norm(options), head_norm(options)
        norms_reads = options.post_rmsnorm or options.gated_output
        self.multihead_rmsnorm = MultiheadRMSNorm(dim_head, heads) if norms_reads else nn.Identity()

        self.to_queries = projection(dim, inner, options)
        self.to_keys = projection(dim, inner * u, options)
        self.to_values = projection(dim, inner * u, options)
        is_combined = heads > 1 or options.gated_output
        self.combine_heads = nn.Linear(inner, dim, bias=False) if is_combined else nn.Identity()
        self.retrieve_gate = self.output_gate(options)
        self.add_gates(options, fast)
        self.memory_norm_gamma = nn.Parameter(torch.zeros(heads, dim_head)) if options.learned_norm_gain else None

    def start_associating(self) -> None:
        """Begin as a memory of what followed what: a token is stored under the one before it, and asked for by itself.

        Queries start as keys, convolutions near the one token that this takes. From weights of either sign, or equal
        ones, hundreds of steps pass before a token's query finds what was stored (docs/stability.md).
        """
        if self.num_kv_per_token == 1:
            self.to_queries.load_state_dict(self.to_keys.state_dict())
        for layer, lag in ((self.to_queries, 0), (self.to_keys, 1), (self.to_values, 0)):
            if isinstance(layer, Projection):
                layer.convolution.start_at(lag)

    def output_gate(self, options: MemoryOptions) -> nn.Module | None:
        """A gate of every feature, one of every head, or none.  (b t dim) -> (b h t d), (b h t 1)"""
        dim, heads, inner = options.dim, options.heads, options.heads * options.head_width
        if options.gated_output:
            gate = nn.Linear(dim, inner, bias=False)
            return nn.Sequential(gate, Rearrange("b t (h d) -> b h t d", h=heads), nn.Sigmoid())
        if heads == 1:
            return None
        return nn.Sequential(nn.Linear(dim, heads, bias=False), Rearrange("b t h -> b h t 1"), nn.Sigmoid())

    def fresh_tails(self, batch: int) -> Tails:
        """Of a stream that has not begun."""
        return Tails(*(fresh_tail(layer, batch) for layer in (self.to_queries, self.to_keys, self.to_values)))

    def slow_weights(self, batch: int, dtype: torch.dtype) -> Weights:
        """Parameters of the memory model that are learned outside, not by storing.  name -> (b·h d)"""
        gamma = self.memory_norm_gamma
        return {} if gamma is None else {NORM_GAIN: gamma.to(dtype).repeat(batch, 1)}

    def queries(self, tokens: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: (b t dim), normed -> (r t d), the next tail of the convolution"""
        found, tail = projected(self.to_queries, tokens, tail)
        split = rearrange(found, "b t (h d) -> b h t d", h=self.heads)
        return rearrange(self.q_norm(split), "b h t d -> (b h) t d"), tail

    def merge(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """What was read: normed, gated by the tokens, heads combined.  reads: (r t d), tokens: (b t dim) -> same"""
        split = self.multihead_rmsnorm(rearrange(reads, "(b h) t d -> b h t d", h=self.heads))
        if self.retrieve_gate is not None:
            split = split * self.retrieve_gate(tokens)
        return self.combine_heads(rearrange(split, "b h t d -> b t (h d)"))

    def project_writes(self, tokens: StoredTokens, chunk: int, dtype: torch.dtype, tails: Tails) -> Projected:
        """Keys, values, rates and gates of whole chunks.  dtype: in which weights are kept"""
        is_stored = None if tokens.is_stored is None else rearrange(tokens.is_stored, "b (n c) -> b n c", c=chunk)
        from_keys = self.normed(tokens.keys, tokens.is_stored)
        same = tokens.values is tokens.keys
        from_values = from_keys if same else self.normed(tokens.values, tokens.is_stored)
        chunks = rearrange(from_keys, "b (n c) d -> b n c d", c=chunk)
        found_keys, keys_tail = projected(self.to_keys, from_keys, tails.keys)
        found_values, values_tail = projected(self.to_values, from_values, tails.values)
        keys = self.split_chunks(self.k_norm, found_keys, chunk)
        values = self.split_chunks(nn.Identity(), found_values, chunk)
        rates = self.rates(chunks, dtype)
        pooled = self.reduce_to_chunk_rep(chunks, is_stored)
        poison = pooled if same else pooled + reduce(from_values, "b (n c) d -> b n d", "mean", c=chunk)
        gates = self.gates(pooled, poison, is_stored, dtype)
        modulation, mix = self.shares(pooled, dtype)
        if is_stored is not None:
            is_stored = repeat(is_stored, "b n c -> (b h) n c u", h=self.heads, u=self.num_kv_per_token)
        if self.looks_ahead:
            keys, values, rates = keys[:, :, :-1], values[:, :, 1:], tuple(rate[:, :, :-1] for rate in rates)
            is_stored = None if is_stored is None else is_stored[:, :, :-1] & is_stored[:, :, 1:]
        keys, values, *own = (
            rearrange(finite(x, dtype), "r n c u ... -> r n (c u) ...") for x in (keys, values, *rates)
        )
        slow = self.slow_weights(tokens.keys.shape[0], dtype)
        writes = Writes(keys, values, tuple(own), gates, modulation, mix, slow)
        tails = tails._replace(keys=keys_tail, values=values_tail)
        if is_stored is None:
            return Projected(writes, None, None, tails)
        return self.without_masked(writes, rearrange(is_stored, "r n c u -> r n (c u)"), tails)

    def normed(self, tokens: Tensor, is_stored: Tensor | None) -> Tensor:
        if is_stored is not None:  # what is not stored may be anything, NaN included
            tokens = torch.where(is_stored[..., None], tokens, 0.0)
        return self.store_norm(tokens)

    def split_chunks(self, norm: nn.Module, projected: Tensor, chunk: int) -> Tensor:
        """(b t hud) -> (r n c u d)"""
        h, u = self.heads, self.num_kv_per_token
        split = norm(rearrange(projected, "b t (h u d) -> b h (t u) d", h=h, u=u))
        return rearrange(split, "b h (n c u) d -> (b h) n c u d", c=chunk, u=u)

    def without_masked(self, writes: Writes, is_stored: Tensor, tails: Tails) -> Projected:
        """Rates of zero; for a model that mixes tokens, what is masked also moves behind all that is stored.

        Masked keys are ones: zero is where norms in a memory model may have no second derivative.
        """
        keys = torch.where(is_stored[..., None], writes.keys, 1.0)
        writes = writes._replace(keys=keys, rates=tuple(rate * is_stored for rate in writes.rates))
        if not self.compacts_masked:
            return Projected(writes, is_stored, None, tails)
        order = is_stored.logical_not().byte().argsort(dim=-1, stable=True)
        keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in (writes.keys, writes.values))
        rates = tuple(rate.gather(2, order) for rate in writes.rates)
        return Projected(writes._replace(keys=keys, values=values, rates=rates), is_stored, order, tails)
