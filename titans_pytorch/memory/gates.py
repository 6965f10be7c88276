"""Every gate of a memory: step sizes of tokens; momentum, forgetting and mixes of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from einops import reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.fast_weights.rules.recurrence import Gates
from titans_pytorch.memory.options import MemoryOptions

DECAY_RANK = 32
"""Width between tokens and a forgetting gate of every channel; a full map would have as many weights as projections"""


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


class Gating(nn.Sequential):
    """A linear layer whose outputs are laid out as the name of the pattern says."""

    def __init__(self, dim: int, num_out: int, pattern: str, *, bias: float | None = None, **sizes: int) -> None:
        super().__init__(started_at(nn.Linear(dim, num_out), bias), Rearrange(pattern, **sizes))


class ChannelGating(nn.Sequential):
    """The same through a narrow layer, for as many outputs as a memory has channels."""

    def __init__(self, dim: int, num_out: int, pattern: str, *, bias: float | None = None, **sizes: int) -> None:
        rank = min(dim, DECAY_RANK)
        narrow, wide = nn.Linear(dim, rank, bias=False), started_at(nn.Linear(rank, num_out), bias)
        super().__init__(narrow, wide, Rearrange(pattern, **sizes))


def started_at(linear: nn.Linear, bias: float | None) -> nn.Linear:
    """A layer that first gives a constant; None: left as it is."""
    if bias is not None:
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, bias)
    return linear


def max_lr_sigmoid(raw: Tensor, max_lr: float) -> Tensor:
    """The default step size: between 0 and max_lr."""
    return raw.sigmoid() * max_lr


class GateLayers(nn.Module):
    """The layers that gates are made of, one set for all parameters of the memory or one for each (`p`)."""

    def add_gates(self, options: MemoryOptions, fast: Mapping[str, Tensor]) -> None:
        """fast: the parameters of the memory, as they are shaped"""
        dim, heads, u = options.dim, options.heads, options.num_kv_per_token
        o, num_combined, num_names = options.num_orders, options.num_combined, len(fast)
        p = num_names if options.per_parameter_gates else 1
        self.options, self.parameter_names = options, tuple(fast)
        self.channels = [w.shape[-1] if w.ndim else 1 for w in fast.values()]
        default_step = partial(max_lr_sigmoid, max_lr=options.default_step_transform_max_lr)
        self.adaptive_step_transform = options.adaptive_step_transform or default_step
        self.reduce_to_chunk_rep = AttentionPool(dim) if options.attn_pool_chunks else AveragePool()
        each_step = "b n c (h p u) -> p (b h) n c u"
        self.to_adaptive_step = Gating(dim, heads * p * u, each_step, bias=options.init_adaptive_step_bias, p=p, u=u)
        self.to_decay_factor = self.decay_gating(p)
        each_momentum = partial(Gating, dim, pattern="b n (h p o) -> p o (b h) n", bias=options.init_momentum_bias)
        self.to_momentum = each_momentum(heads * p * o, p=p, o=o) if o else None
        orders = partial(Gating, dim, pattern="b n (h o) -> o (b h) n")
        self.to_learned_momentum_combine = orders(heads * num_combined, o=num_combined) if num_combined else None
        modulates = options.per_parameter_lr_modulation
        self.to_layer_modulation = orders(heads * num_names, o=num_names) if modulates else None
        mixes = options.accept_weight_residual
        self.to_learned_weight_residual_mix = Gating(dim, heads, "b n h -> (b h) n") if mixes else None

    def decay_gating(self, p: int) -> nn.Module:
        dim, heads, bias = self.options.dim, self.options.heads, self.options.init_decay_bias
        if self.options.channelwise_decay:
            return ChannelGating(dim, heads * sum(self.channels), "b n (h j) -> (b h) j n", bias=bias, h=heads)
        return Gating(dim, heads * p, "b n (h p) -> p (b h) n", bias=bias, p=p)

    def rates(self, chunks: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """theta of every write, one for all parameters or one for each.  chunks: (b n c dim) -> (r n c u) each"""
        return self.adaptive_step_transform(self.to_adaptive_step(chunks).to(dtype)).unbind(0)

    def gates(self, pooled: Tensor, poison: Tensor, is_stored: Tensor | None, dtype: torch.dtype) -> tuple[Gates, ...]:
        """One for all parameters, or one for each.  pooled: (b n dim), one vector for each chunk"""
        names, combine, momentum = self.parameter_names, self.to_learned_momentum_combine, self.to_momentum
        log_keep = self.log_keep(pooled, dtype)
        log_momentum = () if momentum is None else F.logsigmoid(finite(momentum(pooled), dtype)).unbind(0)  # eta
        mixed = None if combine is None else finite(combine(pooled), dtype).softmax(dim=0)
        poisoned = self.each_head((poison.detach() * 0).sum(dim=-1).to(dtype))
        stored = None if is_stored is None else self.each_head(is_stored.any(dim=-1).to(dtype))
        if stored is not None:  # a chunk without anything to store changes nothing
            log_keep = tuple(log * (stored.unsqueeze(1) if log.ndim > stored.ndim else stored) for log in log_keep)
            log_momentum = tuple(log * stored for log in log_momentum)
        num = max(len(log_keep), len(log_momentum))
        if num == 1:
            return (Gates(log_keep[0], log_momentum[0] if log_momentum else None, mixed, stored, poisoned),)
        momenta = log_momentum if len(log_momentum) > 1 else (log_momentum or (None,)) * len(names)
        return tuple(Gates(keep, log, mixed, stored, poisoned) for keep, log in zip(log_keep, momenta, strict=True))

    def log_keep(self, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """log(1 - alpha), one for all parameters (r n), one for each, or one for each of their channels (r j n)"""
        logs = F.logsigmoid(-finite(self.to_decay_factor(pooled), dtype))
        if self.options.channelwise_decay:
            return logs.split(self.channels, dim=1)
        return logs.unbind(0)

    def each_head(self, x: Tensor) -> Tensor:
        return repeat(x, "b n -> (b h) n", h=self.options.heads)

    def shares(self, pooled: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        """lambda of every parameter, and the share of the previous layer's weights.  (r n) each"""
        modulation, mix = self.to_layer_modulation, self.to_learned_weight_residual_mix
        by_name = {}
        if modulation is not None:
            shares = finite(modulation(pooled), dtype).sigmoid() * self.options.max_mem_layer_modulation
            by_name = dict(zip(self.parameter_names, shares, strict=True))
        return by_name, None if mix is None else finite(mix(pooled), dtype).sigmoid()


def finite(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """What is not finite is kept apart, as poison, so that it never reaches what came before."""
    return raw.to(dtype).nan_to_num(0.0, 0.0, 0.0)
