"""Keys and values of tokens: the record that attention reads, and what a window keeps of it for later tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.public_names import register_state


@register_state
class KeyValues(NamedTuple):
    """Keys (turned by their position) and values of some tokens.  (b h t d) each"""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """How many tokens these are."""
        return self.keys.shape[2]

    def at(self, start: int, stop: int) -> KeyValues:
        """Those of the tokens start, ..., stop - 1, as a view."""
        return KeyValues(self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def last(self, count: int) -> KeyValues:
        """Those of the last `count` tokens at most, as a copy that does not keep the others alive."""
        start = self.length - count
        return self if start <= 0 else KeyValues(*(x[:, :, start:].clone() for x in self))

    def map(self, fn: Callable[[Tensor], Tensor]) -> KeyValues:
        """Both tensors, whose first axis is the batch, after fn."""
        return KeyValues(fn(self.keys), fn(self.values))


@register_state
class KeyValueCache(NamedTuple):
    """What later tokens may still see: at most one window of keys (turned by their position) and values."""

    keys: Tensor  # (b h t d)
    values: Tensor  # (b h t d)
    num_seen: int  # position of the next token

    @property
    def key_values(self) -> KeyValues:
        """The keys and values without the position."""
        return KeyValues(self.keys, self.values)


def joined(*parts: KeyValues | None) -> KeyValues:
    """Keys and values one part after another; None is nothing."""
    given = [part for part in parts if part is not None]
    if len(given) == 1:
        return given[0]
    return KeyValues(torch.cat([part.keys for part in given], dim=2), torch.cat([part.values for part in given], dim=2))
