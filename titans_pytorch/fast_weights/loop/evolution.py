"""How weights and momenta move through the blocks of a loop, forwards and backwards, in place.

    by shares       all chunks of a block at once: what it begins with times shares, and one product with all its tokens
    by equations    blocks of one chunk: its surprise is built once, then the rule's own sums are worked out
    by table        the same for a gain, all blocks of a renewal in one small product

Each holds a pack's slots where blocks begin and after them: slot 0 are weights, the others momenta.
A `bar` is the gradient of what it is named for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

Slots = list[list[Tensor]]
"""[slot][block] -> (g r p q)"""


SCRATCH = 2**18
"""How many products a dot product writes down at once on a CPU: what stays in the cache of a core"""


def num_together(like: Tensor, num: int) -> int:
    """How many tensors go into one dot product: on a CPU as many as a cache holds, else all."""
    return num if like.device.type != "cpu" else min(num, max(1, SCRATCH // max(1, like.numel())))


class PackFactors(NamedTuple):
    """A pack's surprises as products, token by token, for N renewals of L tokens."""

    left: Tensor  # (N g·r L p)
    right: Tensor  # (N g·r L q)


PackProducts = list[tuple[Tensor, Tensor]]
"""(N k r c p) and (N k r c q) of every parameter of a pack, or of all side by side, (N k g·r ...): left^T right each"""


def side_by_side(products: PackProducts) -> PackProducts:
    """All parameters as the rows of one."""
    left, right = (torch.stack(side, dim=2).flatten(2, 3) for side in zip(*products, strict=True))
    return [(left, right)]


class Others:
    """Gradients of what blocks begin with, of one slot, from whoever reads it.

    parts: of each parameter of a pack, (N k r p q); None: nobody reads it, or by products alone;
    products: none, or of all parameters; like: a pack's slot where a block begins (g r p q)
    """

    def __init__(self, parts: list[Tensor | None], products: PackProducts, like: Tensor, num: tuple[int, int]) -> None:
        nothing = like.new_zeros(()).expand(*num, *like.shape[1:])
        self.is_there = any(part is not None for part in parts)
        self.parts, self.products = [nothing if part is None else part for part in parts], products
        # of the first block of a renewal, and of another one, which nobody needs any longer when the next is asked for
        self.room = torch.empty(2, *like.shape, dtype=like.dtype, device=like.device).unbind(0) if products else ()

    def of_renewal(self, n: int) -> Tensor:
        """Those that are no products.  -> (k g r p q), ours to add to"""
        return torch.stack([part[n] for part in self.parts], dim=1)

    def of_block(self, n: int, place: int) -> Tensor:
        """Those of one block of a renewal.  -> (g r p q), ours to add to"""
        if not self.products:
            return torch.stack([part[n, place] for part in self.parts])
        found = self.room[min(place, 1)]
        rows = found.flatten(0, 1).chunk(len(self.products))
        for out, (left, right) in zip(rows, self.products, strict=True):
            torch.bmm(left[n, place].mT, right[n, place], out=out)
        if self.is_there:
            found.add_(torch.stack([part[n, place] for part in self.parts]))
        return found


class Evolution(ABC):
    """One pack through N renewals of k blocks each, T in all."""

    per_renewal: int
    num_places: int  # renewals whose weights are kept; of more than those, one takes the place of another
    starts: Slots  # where blocks begin
    ends: Slots  # after each block: where the next one begins, unless that lies in another place
    bars: Slots  # gradients where blocks begin, and after the last one

    @abstractmethod
    def of_slot(self, slot: int, index: int) -> Tensor:
        """One parameter's slot at the start of every block.  -> (N k r p q)"""

    @abstractmethod
    def bases(self, index: int) -> Tensor:
        """One parameter's weights at the start of the renewal in every place, where they lie.  -> (M r p q)"""

    @abstractmethod
    def weights_of(self, index: int, first: int, num: int) -> Tensor:
        """One parameter's weights where the blocks of some renewals begin, that are in place.  -> (num r k p q)"""

    def start_again(self) -> None:
        """What all places end with becomes what the first place begins with."""
        raise NotImplementedError(f"{type(self).__name__} has a place for every renewal")

    @abstractmethod
    def forward(self, n: int) -> None:
        """Through the blocks of a renewal, whose factors are there."""

    @abstractmethod
    def begin_backward(self, last_bars: list[Tensor | None], others: list[Others | None]) -> None:
        """Gradients of every slot: after the last block (g r p q), and where blocks begin, from whoever reads it."""

    @abstractmethod
    def of_readers(self, n: int) -> Tensor:
        """Where gradients of the weights that a renewal begins with are added up, before those of its blocks.

        Those from whoever reads them are there.  -> (g r p q)
        """

    @abstractmethod
    def bars_after(self, n: int) -> Tensor:
        """Gradients of all slots after a renewal.  -> (... p q)"""

    @abstractmethod
    def factor_bars(self, n: int) -> tuple[Tensor, Tensor]:
        """Gradients of the factors of a renewal, from those of its end.  -> (g·r L p), (g·r L q)"""

    @abstractmethod
    def start_bar(self, n: int) -> None:
        """The gradient of what a renewal begins with, after `factor_bars` and all that is added to `of_readers`."""

    @abstractmethod
    def gate_bars(self) -> list[Tensor]:
        """Gradients of what multiplies, after all renewals."""
