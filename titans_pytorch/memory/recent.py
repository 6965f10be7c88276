"""The writes that the windows of the next chunks still see (`rules.omega`), as they were projected."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import PerParameter, Writes
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory.rows import rows_along
from titans_pytorch.public_names import register_state


@register_state
@rows_along(rates=1, modulation=1)
class RecentWrites(NamedTuple):
    """The writes of the last chunks, as many as a window looks back."""

    keys: Tensor  # (r n c d)
    values: Tensor  # (r n c d)
    rates: Tensor  # (p r n c)  of each parameter, or of all
    modulation: Tensor | None  # (p r n)
    thresholds: Tensor | None = None  # (r n c)

    @classmethod
    def of_nothing(cls, like: Tensor, num_rates: int, num_shares: int, has_thresholds: bool) -> RecentWrites:
        """Before a stream begins: what has no step size.  like: a tensor shaped as keys"""
        rates = like.new_zeros(num_rates, *like.shape[:3])
        modulation = like.new_zeros(num_shares, *like.shape[:2]) if num_shares else None
        thresholds = like.new_ones(like.shape[:3]) if has_thresholds else None
        return cls(torch.ones_like(like), torch.zeros_like(like), rates, modulation, thresholds)

    def before(self, writes: Writes) -> Writes:
        """Writes with these in front of them."""

        def joined(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat((old, new), dim=1)

        each, names = writes.rates.each, list(writes.modulation)
        own = dict(zip(each, self.rates.expand(len(each), *self.rates.shape[1:]), strict=True))
        if writes.rates.is_shared:
            rates = PerParameter.shared(each, joined(self.rates[0], writes.rates.any))
        else:
            rates = PerParameter({name: joined(own[name], rate) for name, rate in each.items()}, False)
        shares = {} if self.modulation is None else dict(zip(names, self.modulation, strict=True))
        return writes._replace(
            keys=joined(self.keys, writes.keys),
            values=joined(self.values, writes.values),
            rates=rates,
            modulation={name: joined(share, writes.modulation[name]) for name, share in shares.items()},
            thresholds=joined_if_there(self.thresholds, writes.thresholds, 1),
            num_older=self.keys.shape[1],
        )

    def after(self, writes: Writes) -> RecentWrites:
        """The last of them; writes: with these in front of them, as `before` gives them"""
        first, shares = writes.num_chunks, list(writes.modulation.values())
        rates = [writes.rates.any] if writes.rates.is_shared else list(writes.rates.each.values())
        return RecentWrites(
            writes.keys[:, first:].clone(),  # or the whole span would be kept with it
            writes.values[:, first:].clone(),
            torch.stack([rate[:, first:] for rate in rates]),
            torch.stack([share[:, first:] for share in shares]) if shares else None,
            None if writes.thresholds is None else writes.thresholds[:, first:].clone(),
        )

    def after_nothing(self, num_chunks: int) -> RecentWrites:
        """The last of them where so many chunks have stored nothing."""
        num = min(num_chunks, self.keys.shape[1])
        shares = 0 if self.modulation is None else len(self.modulation)
        new = RecentWrites.of_nothing(self.keys[:, :num], len(self.rates), shares, self.thresholds is not None)

        def shifted(old: Tensor | None, new: Tensor | None, axis: int) -> Any:
            return None if old is None else joined_if_there(old.narrow(axis, num, old.shape[axis] - num), new, axis)

        return RecentWrites(*map(shifted, self, new, (1, 1, 2, 2, 1)))


def joined_if_there(old: Tensor | None, new: Tensor | None, axis: int) -> Tensor | None:
    """Older chunks and newer ones, of what a memory may have."""
    return None if old is None or new is None else torch.cat((old, new), dim=axis)


def written(writes: Writes, recent: RecentWrites | None) -> Writes:
    """What a span stores, behind what its windows look back at."""
    return writes if recent is None else recent.before(writes)


def fresh_recent(layers: Projections, batch: int, chunk: int, like: Tensor) -> RecentWrites | None:
    """What windows look back at before a stream begins; None without any.  like: of the dtype of weights"""
    window = layers.rule.window
    if window == 1:
        return None
    writes = (chunk - int(layers.looks_ahead)) * layers.num_kv_per_token
    keys = like.new_zeros(batch * layers.heads, window - 1, writes, layers.dim_head)
    (rate,) = (gate for gate in layers.rule.gates if gate.kind == "rate")
    num_parameters = len(layers.parameter_names)
    num_shares = 0 if layers.to_layer_modulation is None else num_parameters
    num_rates = num_parameters if rate.varies == "parameter" else 1
    return RecentWrites.of_nothing(keys, num_rates, num_shares, layers.to_threshold is not None)


def check_recent(given: RecentWrites | None, fresh: RecentWrites | None) -> None:
    """What windows look back at is as a module with this window makes it."""
    if (given is None) != (fresh is None):
        raise ValueError(f"state.recent must be {'given' if given is None else 'None'} with this module's window")
    if given is None or fresh is None:
        return
    for name, got, own in zip(RecentWrites._fields, given, fresh, strict=True):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (got, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"state.recent.{name} must have the shape {shapes[1]} of this module, got {shapes[0]}")
