"""Padding moved out of the way: the real tokens of every row to its front, and what is made of them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RealFirst(NamedTuple):
    """An order of the tokens of every row in which the real ones come first."""

    order: Tensor  # (b n)  where each token of that order stands in the row
    is_real: Tensor  # (b n)  in that order

    @staticmethod
    def of(mask: Tensor) -> RealFirst:
        """mask: (b n), False for padding"""
        order = mask.logical_not().byte().argsort(dim=1, stable=True)
        return RealFirst(order, mask.gather(1, order))

    def pack(self, x: Tensor) -> Tensor:
        """Real tokens first; behind them the first one of the row again, as padding may hold anything.  (b n ...)"""
        index = torch.where(self.is_real, self.order, self.order[:, :1])
        packed = x.gather(1, over(index, x).expand_as(x))
        has_any = self.is_real[:, :1]
        return torch.where(over(has_any, x), packed, torch.zeros((), dtype=x.dtype, device=x.device))

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Every token where it was; `fill` at padding.  (b n ...)"""
        source = packed.masked_fill(~over(self.is_real, packed), fill)
        return torch.full_like(source, fill).scatter(1, over(self.order, packed).expand_as(packed), source)


def to_the_right(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens last in every row, without columns of padding alone; padding becomes a real token of its row.

    x: (b n ...), mask: (b n) -> both of (b n' ...)
    """
    longest, shortest = mask.sum(dim=1).aminmax()[::-1] if len(mask) else (0, 0)
    packing = RealFirst.of(mask)
    if int(shortest) == 0:
        raise ValueError("attention_mask must have a real token in every row of the prompt, got a row of padding")
    count = int(longest)
    packed, is_real = packing.pack(x)[:, :count], packing.is_real[:, :count]
    turn = (torch.arange(count, device=mask.device) + is_real.sum(dim=1, keepdim=True)) % count
    return packed.gather(1, over(turn, x).expand_as(packed)), is_real.gather(1, turn)


def over(values: Tensor, x: Tensor) -> Tensor:
    """(b n) as it broadcasts over (b n ...)"""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))
