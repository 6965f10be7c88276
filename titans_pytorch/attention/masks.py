"""Who sees whom: one rule for the dense path, for FlexAttention and for decoding."""

from __future__ import annotations

from torch import Tensor


def may_attend(query: Tensor, key: Tensor, *, window: int, sliding: bool) -> Tensor:
    """Whether the token at `query` sees the one at `key` (they broadcast).

    Persistent memories sit at negative positions: all see them.
    """
    near = query - key <= window if sliding else query // window == key // window
    return (key < 0) | ((key <= query) & near)
