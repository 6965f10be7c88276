"""What decoding works out ahead, as no token changes it: combined parameters, and tables of the positions to come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from titans_pytorch.attention.rotary import Turns
from titans_pytorch.mac.axial import AxialPositions
from titans_pytorch.mac.residual_streams import Combined, combined

STRETCH = 256
"""Positions of a table: so many that making one does not count, and few beside the cache of a window"""


class LayerAhead(NamedTuple):
    """One layer's part; None: to be worked out where it is used."""

    memory_connection: Combined | None = None
    attention_connection: Combined | None = None
    ff_connection: Combined | None = None
    turns: Turns | None = None  # of the tokens of one call


NOTHING_AHEAD = LayerAhead()


def connections_ahead(layer: Any) -> LayerAhead:
    """The combined parameters of a layer."""
    return LayerAhead(*(combined(getattr(layer, name)) for name in LayerAhead._fields[:3]))


class Ahead:
    """Combined parameters and tables for one generation, while parameters do not change."""

    def __init__(self, layers: Iterable[Any], positions: AxialPositions) -> None:
        self.layers, self.positions = list(layers), positions
        self.connections = [connections_ahead(layer) for layer in self.layers]
        self.first = self.stop = 0
        self.embedded: Tensor | None = None
        self.turns: list[Turns] = []

    def at(self, first: int, count: int) -> tuple[Tensor, list[LayerAhead]]:
        """For the positions first, first + 1, ...: how they are embedded (count dim), and every layer's part."""
        if self.embedded is None or first < self.first or first + count > self.stop:
            self.first, self.stop = first, first + -(-count // STRETCH) * STRETCH
            self.embedded = self.positions(first, self.stop - first)
            here = (first, self.stop - first, self.positions.like)
            self.turns = [layer.attention.rotary_emb.turns(*here) for layer in self.layers]
        rows = slice(first - self.first, first - self.first + count)
        parts = zip(self.connections, self.turns, strict=True)
        return self.embedded[rows], [part._replace(turns=(cos[rows], sin[rows])) for part, (cos, sin) in parts]
