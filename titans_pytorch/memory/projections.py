"""From tokens to what a memory stores and is asked, and from what it answers back to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from titans_pytorch.fast_weights.interface import Weights, Writes
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.initialization import write
from titans_pytorch.memory.convolution import (
    ConvolvedLinear,
    LeadingLinear,
    Tails,
    fresh_tail,
    leading,
    projected,
)
from titans_pytorch.memory.gates import GateLayers, finite
from titans_pytorch.memory.head_norms import MultiheadRMSNorm, head_norm
from titans_pytorch.memory.key_powers import KeyPowers
from titans_pytorch.memory.options import GateOptions, ProjectionOptions
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory_models import NORM_GAIN


class ProjectedWrites(NamedTuple):
    """Writes, and which of them count."""

    writes: Writes
    is_stored: Tensor | None  # (r n c)
    order: Tensor | None  # (r n c)  where each write of `writes` stood; None: where it is
    tails: Tails  # what the convolutions of the next chunks still see


def projection(dim_in: int, dim_out: int, options: ProjectionOptions) -> nn.Module:
    """A layer for queries, keys or values.  (b t dim_in) -> (b t dim_out)"""
    if options.conv_size is not None:
        return ConvolvedLinear(dim_in, dim_out, options.conv_size, options.activation)
    linear = LeadingLinear(dim_in, dim_out)
    return linear if options.activation is None else nn.Sequential(linear, options.activation)


class Projections(GateLayers):
    """The layers of a `NeuralMemory` outside its memory; parameter names are those of published checkpoints."""

    def __init__(
        self,
        options: ProjectionOptions,
        gates: GateOptions,
        rule: Rule,
        fast: Mapping[str, Tensor],
        compacts_masked: bool,
    ) -> None:
        """fast: the parameters of the memory, as they are shaped; compacts_masked: whether tokens that are not stored
        move behind those that are, as a memory model needs that mixes tokens
        """
        super().__init__()
        dim, heads, dim_head, u = options.dim, options.heads, options.dim_head, options.num_kv_per_token
        inner = options.inner
        self.heads, self.dim_head, self.num_kv_per_token = heads, dim_head, u
        self.lookback = (options.conv_size or 1) - 1  # tokens before it that a query depends on
        self.looks_ahead, self.compacts_masked = options.looks_ahead, compacts_masked

        self.retrieve_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if options.pre_rmsnorm else nn.Identity()
        self.q_norm, self.k_norm = head_norm(options), head_norm(options)
        self.key_powers = KeyPowers(options.key_powers, heads) if options.key_powers > 1 else nn.Identity()
        norms_reads = options.post_rmsnorm or options.gated_output
        self.multihead_rmsnorm = MultiheadRMSNorm(dim_head, heads) if norms_reads else nn.Identity()

        self.to_queries = projection(dim, inner, options)
        self.to_keys = projection(dim, inner * u, options)
        self.to_values = projection(dim, inner * u, options)
        is_combined = heads > 1 or options.gated_output
        self.combine_heads = nn.Linear(inner, dim, bias=False) if is_combined else nn.Identity()
        self.retrieve_gate = self.output_gate(options)
        self.add_gates(gates, options, rule, fast)
        self.memory_norm_gamma = nn.Parameter(torch.zeros(heads, dim_head)) if options.has_learned_gain else None

    def init_as_association(self) -> None:
        """Begin as a memory of what followed what: a token is stored under the one before it, and asked for by itself.

        Queries start as keys, convolutions near the one token that this takes. From weights of either sign, or equal
        ones, hundreds of steps pass before a token's query finds what was stored (docs/stability.md).
        """
        if self.num_kv_per_token == 1:
            for queries, keys in zip(leading(self.to_queries), leading(self.to_keys), strict=True):
                keys.followers = (queries,)
                write(queries.weight, keys.weight)
        for layer, lag in ((self.to_queries, 0), (self.to_keys, 1), (self.to_values, 0)):
            if isinstance(layer, ConvolvedLinear):
                layer.convolution.start_at(lag)

    def output_gate(self, options: ProjectionOptions) -> nn.Module | None:
        """A gate of every feature, one of every head, or none.  (b t dim) -> (b h t d), (b h t 1)"""
        dim, heads, inner = options.dim, options.heads, options.inner
        if options.gated_output:
            gate = nn.Linear(dim, inner, bias=False)
            return nn.Sequential(gate, Rearrange("b t (h d) -> b h t d", h=heads), nn.Sigmoid())
        if heads == 1:
            return None
        return nn.Sequential(nn.Linear(dim, heads, bias=False), Rearrange("b t h -> b h t 1"), nn.Sigmoid())

    def fresh_tails(self, batch: int) -> Tails:
        """What convolutions see before a stream begins."""
        return Tails(*(fresh_tail(layer, batch) for layer in (self.to_queries, self.to_keys, self.to_values)))

    def slow_weights(self, batch: int, dtype: torch.dtype) -> Weights:
        """Parameters of the memory model that are learned outside, not by storing.  name -> (b·h d)"""
        gamma = self.memory_norm_gamma
        return {} if gamma is None else {NORM_GAIN: gamma.to(dtype).repeat(batch, 1)}

    def queries(self, tokens: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: (b t dim), normed -> (r t d), the next tail of the convolution"""
        found, tail = projected(self.to_queries, tokens, tail)
        split = rearrange(found, "b t (h d) -> b h t d", h=self.heads)
        return rearrange(self.q_norm(self.key_powers(split)), "b h t d -> (b h) t d"), tail

    def merge(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """What was read: normed, gated by the tokens, heads combined.  reads: (r t d), tokens: (b t dim) -> same"""
        split = self.multihead_rmsnorm(rearrange(reads, "(b h) t d -> b h t d", h=self.heads))
        if self.retrieve_gate is not None:
            split = split * self.retrieve_gate(tokens)
        return self.combine_heads(rearrange(split, "b h t d -> b t (h d)"))

    def project_writes(self, tokens: StoredTokens, chunk: int, dtype: torch.dtype, tails: Tails) -> ProjectedWrites:
        """Keys, values, rates and gates of whole chunks.  dtype: in which weights are kept"""
        is_stored = None if tokens.is_stored is None else rearrange(tokens.is_stored, "b (n c) -> b n c", c=chunk)
        from_keys = self.normed(tokens.keys, tokens.is_stored)
        has_one_view = tokens.values is tokens.keys
        from_values = from_keys if has_one_view else self.normed(tokens.values, tokens.is_stored)
        keys, keys_tail = self.write_keys(from_keys, chunk, tails.keys)
        values, values_tail = self.write_values(from_values, chunk, tails.values)
        chunks = rearrange(from_keys, "b (n c) d -> b n c d", c=chunk)
        rates, thresholds = self.rates(chunks, dtype), self.thresholds(chunks, dtype)
        pooled = self.reduce_to_chunk_rep(chunks, is_stored)
        poison = pooled if has_one_view else pooled + reduce(from_values, "b (n c) d -> b n d", "mean", c=chunk)
        gates, (modulation, mix) = self.gates(pooled, poison, is_stored, dtype), self.shares(pooled, dtype)
        counted = None
        if is_stored is not None:
            counted = repeat(is_stored, "b n c -> (b h) n c u", h=self.heads, u=self.num_kv_per_token)
        if self.looks_ahead:  # keys of a token go with values of the next one
            keys, values, rates = keys[:, :, :-1], values[:, :, 1:], rates.map(lambda rate: rate[:, :, :-1])
            thresholds = None if thresholds is None else thresholds[:, :, :-1]
            counted = None if counted is None else counted[:, :, :-1] & counted[:, :, 1:]

        def flat(x: Tensor) -> Tensor:
            """(r n c u ...) -> (r n cu ...)"""
            return rearrange(finite(x, dtype), "r n c u ... -> r n (c u) ...")

        slow = self.slow_weights(tokens.keys.shape[0], dtype)
        writes = Writes(flat(keys), flat(values), rates.map(flat), gates, modulation, mix, slow)
        writes = writes if thresholds is None else writes._replace(thresholds=flat(thresholds))
        tails = tails._replace(keys=keys_tail, values=values_tail)
        if counted is None:
            return ProjectedWrites(writes, None, None, tails)
        return self.without_masked(writes, rearrange(counted, "r n c u -> r n (c u)"), tails)

    def write_keys(self, tokens: Tensor, chunk: int, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: (b t dim), normed -> (r n c u d), the next tail of the convolution"""
        found, tail = projected(self.to_keys, tokens, tail)
        return self.split_chunks(lambda keys: self.k_norm(self.key_powers(keys)), found, chunk), tail

    def write_values(self, tokens: Tensor, chunk: int, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: (b t dim), normed -> (r n c u d), the next tail of the convolution"""
        found, tail = projected(self.to_values, tokens, tail)
        return self.split_chunks(nn.Identity(), found, chunk), tail

    def normed(self, tokens: Tensor, is_stored: Tensor | None) -> Tensor:
        if is_stored is not None:  # what is not stored may be anything, NaN included
            tokens = torch.where(is_stored[..., None], tokens, 0.0)
        return self.store_norm(tokens)

    def split_chunks(self, norm: Callable[[Tensor], Tensor], projected: Tensor, chunk: int) -> Tensor:
        """(b t hud) -> (r n c u d)"""
        h, u = self.heads, self.num_kv_per_token
        split = norm(rearrange(projected, "b t (h u d) -> b h (t u) d", h=h, u=u))
        return rearrange(split, "b h (n c u) d -> (b h) n c u d", c=chunk, u=u)

    def without_masked(self, writes: Writes, is_stored: Tensor, tails: Tails) -> ProjectedWrites:
        """Rates of zero for what is masked; for a model that mixes tokens it also moves behind all that is stored.

        Masked keys are ones: zero is where norms in a memory model may have no second derivative.
        """
        keys = torch.where(is_stored[..., None], writes.keys, 1.0)
        writes = writes._replace(keys=keys, rates=writes.rates.map(lambda rate: rate * is_stored))
        if not self.compacts_masked:
            return ProjectedWrites(writes, is_stored, None, tails)
        order = is_stored.logical_not().byte().argsort(dim=-1, stable=True)
        keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in (writes.keys, writes.values))
        rates = writes.rates.map(lambda rate: rate.gather(2, order))
        thresholds = None if writes.thresholds is None else writes.thresholds.gather(2, order)
        moved = writes._replace(keys=keys, values=values, rates=rates, thresholds=thresholds)
        return ProjectedWrites(moved, is_stored, order, tails)
