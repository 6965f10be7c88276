"""FlexAttention with the mask of `masks.may_attend`: a block mask is made once for each shape, a kernel once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from titans_pytorch.attention.masks import may_attend
from titans_pytorch.checks import value_checks

__all__ = ["create_mac_block_mask", "flex_attention", "flex_backend"]

FLEX: Any = flex_attention  # whose type checkers cannot follow


def create_mac_block_mask(
    seq_len: int,
    window_size: int,
    persist_mem_len: int,
    sliding: bool = False,
    *,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Who sees whom among `seq_len` queries and as many keys behind `persist_mem_len` persistent ones.

    device: of the queries; None: CUDA where there is one
    """
    value_checks.check_whole(seq_len=seq_len, window_size=window_size)
    value_checks.check_counts(persist_mem_len=persist_mem_len)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _block_mask(seq_len, window_size, persist_mem_len, sliding, str(device))


@lru_cache(maxsize=64)
def _block_mask(seq_len: int, window: int, persistent: int, sliding: bool, device: str) -> BlockMask:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(query, key - persistent, window=window, sliding=sliding)

    return create_block_mask(sees, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len + persistent, device=device)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(FLEX)


def flex_backend(block_mask: BlockMask) -> Callable[..., Any]:
    """(q, k, v) -> out; inside a compiled model the outer compilation takes the kernel in."""
    attend = FLEX if torch.compiler.is_compiling() else _compiled()
    return partial(attend, block_mask=block_mask)
