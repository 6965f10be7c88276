"""A memory that grows (Proteus, arXiv 2608.16844): its hidden units are opened block by block as the stream goes on.

    k(t) = min(E, 1 + (t - 1) // D),  M_t = M_{t-1} - theta_t g_t * grad(g_t * M_{t-1}),  g_t opens k(t) of E blocks

A unit that is closed has zeros in both matrices around it. Then it answers nothing and is given no gradient, so nothing
has to be multiplied by g, and what is closed does not forget. At a border a block begins as in the learned start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from titans_pytorch.checks import value_checks
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory_models import ResidualNorm


@runtime_checkable
class HasHiddenUnits(Protocol):
    """A memory model that says which axes of its weights are hidden units; where these are 0, all they touch is."""

    @property
    def hidden_axes(self) -> dict[str, tuple[int, ...]]: ...


class Capacity(NamedTuple):
    """How many blocks of hidden units there are, and after how many tokens each of them is opened."""

    blocks: int
    tokens: int

    def of(self, weights: Weights, form: nn.Module, num_seen: int) -> Weights:
        """The part of weights that the token after so many can use; what is closed is 0.  name -> (r ...)"""
        axes, share = axes_of(form), self.num_open(num_seen) / self.blocks
        return {name: closed_at(weight, axes.get(name, ()), share) for name, weight in weights.items()}

    def num_open(self, num_seen: int) -> int:
        """Blocks that the token after so many can use."""
        return min(self.blocks, 1 + num_seen // self.tokens)

    def parts(self, first: int, num_tokens: int) -> Iterator[slice]:
        """A call cut where blocks are opened.  first: tokens before it"""
        start = 0
        while start < num_tokens:
            rest = self.tokens - (first + start) % self.tokens
            is_whole = self.num_open(first + start) == self.blocks
            stop = num_tokens if is_whole else min(start + rest, num_tokens)
            yield slice(start, stop)
            start = stop

    def check(
        self, form: nn.Module, rule: Rule, layout: Layout, has_shards: bool, keeps_lengths: bool, has_residual: bool
    ) -> None:
        """Whole chunks between openings, hidden units in equal blocks, and nothing that fills what is closed."""
        for what, size in (("read", layout.retrieve_chunk), ("store", layout.store_chunk)):
            if self.tokens % size:
                raise ValueError(
                    f"capacity must open blocks at multiples of the chunk size to {what} ({size}), got {self.tokens}"
                )
        value_checks.check_exclusive(capacity=True, shard=has_shards)
        value_checks.check_exclusive(capacity=True, keep_lengths=keeps_lengths)
        value_checks.check_exclusive(capacity=True, accept_weight_residual=has_residual)
        if rule.uses_start or not rule.zeros_stay:
            raise ValueError(
                f"capacity needs a rule that leaves what is closed at 0, got {type(rule).__name__}, which fills it"
            )
        if not any(axes_of(form).values()):
            inner = form.model if isinstance(form, ResidualNorm) else form
            raise ValueError(
                f"capacity needs a memory model with hidden units, as mlp and glu are, got {type(inner).__name__}"
            )
        for name, axes in axes_of(form).items():
            for axis in axes:
                if (width := form.get_parameter(name).shape[axis]) % self.blocks:
                    raise ValueError(f"capacity must divide the {width} hidden units into blocks, got {self.blocks}")


def capacity_of(given: Any) -> Capacity | None:
    """The option as it is given: (blocks, tokens)."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"capacity must be a pair (blocks, tokens) of whole numbers, got {given!r}")
    blocks, tokens = given
    value_checks.check_whole(**{"capacity[0]": blocks, "capacity[1]": tokens})
    return Capacity(blocks, tokens)


def axes_of(form: nn.Module) -> dict[str, tuple[int, ...]]:
    """The axes of each weight of a memory that are hidden units."""
    model = form.model if isinstance(form, ResidualNorm) else form
    prefix = "model." if isinstance(form, ResidualNorm) else ""
    if not isinstance(model, HasHiddenUnits):
        return {}
    return {f"{prefix}{name}": axes for name, axes in model.hidden_axes.items()}


def closed_at(weight: Tensor, axes: tuple[int, ...], share: float) -> Tensor:
    """A weight with zeros around all hidden units but the first share of them.  (r i j) -> same"""
    for axis in axes:
        size = weight.shape[1 + axis]
        is_open = torch.arange(size, device=weight.device) < round(size * share)
        weight = torch.where(is_open[:, None] if axis == 0 else is_open, weight, 0.0)
    return weight
