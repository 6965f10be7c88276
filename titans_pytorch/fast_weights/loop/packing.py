"""Parameters of equal size lie together, so that one operation moves them all.

A *pack* holds matrices (r i j) of one shape, those of the transposed shape turned over, one after the other: (g r p q).
For an MLP of two layers that is one pack; a gain is a pack of its own, of a matrix with one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a parameter lies."""

    pack: int
    number: int  # in it
    is_turned: bool


class Packing(NamedTuple):
    """Which parameters lie together, and how each is turned."""

    packs: tuple[tuple[str, ...], ...]
    places: dict[str, Place]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], may_turn: bool = True) -> Packing:
        """shapes: of each parameter, (i j) or (j); may_turn: whether last axes may become first ones"""
        packs: list[list[str]] = []
        found: dict[tuple[bool, int, int], int] = {}  # vectors apart
        places = {}
        for name, shape in shapes.items():
            i, j = (1, *shape)[-2:]
            is_vector = len(shape) < 2
            is_turned = may_turn and not is_vector and (False, j, i) in found and (False, i, j) not in found
            form = (False, j, i) if is_turned else (is_vector, i, j)
            if form not in found:
                found[form] = len(packs)
                packs.append([])
            pack = found[form]
            places[name] = Place(pack, len(packs[pack]), is_turned)
            packs[pack].append(name)
        return cls(tuple(map(tuple, packs)), places)

    def together(self, tensors: Mapping[str, Iterable[Tensor]]) -> list[Tensor]:
        """Several tensors of each parameter, as weights and momenta, pack by pack.  (r i j) or (r j) -> (g r a p q)"""
        return [torch.stack([self.slots(name, tensors[name]) for name in names]) for names in self.packs]

    def slots(self, name: str, tensors: Iterable[Tensor]) -> Tensor:
        """(r i j) or (r j) each -> (r a p q)"""
        stacked = torch.stack([t if t.ndim == 3 else t.unsqueeze(1) for t in tensors], dim=1)
        return stacked.mT if self.places[name].is_turned else stacked

    def of_rows(self, by_name: Mapping[str, Tensor], axis: int) -> list[Tensor]:
        """Numbers of each parameter's rows, pack by pack.  axis: of the rows  (... r ...) -> (... g r ...)"""
        return [torch.stack([by_name[name] for name in names], dim=axis) for names in self.packs]

    def turned(self, name: str, stored: Tensor) -> Tensor:
        """A parameter as its owner sees it.  (... p q) -> (... i j)"""
        return stored.mT if self.places[name].is_turned else stored
