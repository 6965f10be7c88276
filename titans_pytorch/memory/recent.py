"""The writes that the windows of the next chunks still see (`rules.omega`), as they were projected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import PerParameter, Writes
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

    @classmethod
    def of_nothing(cls, like: Tensor, num_rates: int, num_shares: int) -> RecentWrites:
        """Before a stream begins: what has no step size.  like: a tensor shaped as keys"""
        rates = like.new_zeros(num_rates, *like.shape[:3])
        modulation = like.new_zeros(num_shares, *like.shape[:2]) if num_shares else None
        return cls(torch.ones_like(like), torch.zeros_like(like), rates, modulation)

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
        )

    def after_nothing(self, num_chunks: int) -> RecentWrites:
        """The last of them where so many chunks have stored nothing."""
        num = min(num_chunks, self.keys.shape[1])
        shares = 0 if self.modulation is None else len(self.modulation)
        new = RecentWrites.of_nothing(self.keys[:, :num], len(self.rates), shares)

        def shifted(old: Tensor, new: Tensor, axis: int) -> Tensor:
            return torch.cat((old.narrow(axis, num, old.shape[axis] - num), new), dim=axis)

        modulation = None
        if self.modulation is not None and new.modulation is not None:
            modulation = shifted(self.modulation, new.modulation, 2)
        return RecentWrites(
            shifted(self.keys, new.keys, 1),
            shifted(self.values, new.values, 1),
            shifted(self.rates, new.rates, 2),
            modulation,
        )


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
