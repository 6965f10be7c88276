"""Who sees whom in the attention of the Titans models.  Masks are made once for each shape and kept.

Keys are [persistent | ...]; everybody sees the persistent ones. Queries are always the last of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

from titans_pytorch.attention.masks import may_attend

MaskOf = Callable[[int, int, int, int, torch.device], Tensor]


def kept(build: MaskOf) -> MaskOf:
    """A function of sizes and a device that remembers its results; while compiling the compiler does that."""

    @lru_cache(maxsize=256)
    def remembered(num_queries: int, num_tokens: int, num_persistent: int, window: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # training may use later what inference has made
            return build(num_queries, num_tokens, num_persistent, window, device)

    @wraps(build)
    def mask(num_queries: int, num_tokens: int, num_persistent: int, window: int, device: torch.device) -> Tensor:
        make = build if torch.compiler.is_compiling() else remembered
        return make(num_queries, num_tokens, num_persistent, window, device)

    return mask


@kept
def sliding_mask(num_queries: int, num_tokens: int, num_persistent: int, window: int, device: torch.device) -> Tensor:
    """Keys [persistent | tokens]: the last `window` tokens, oneself included (eqs. 27, 31).  -> (i j)"""
    keys = torch.arange(-num_persistent, num_tokens, device=device)
    queries = torch.arange(num_tokens - num_queries, num_tokens, device=device)
    return may_attend(queries[:, None], keys, window=window - 1, sliding=True)


@kept
def context_mask(num_queries: int, num_tokens: int, num_persistent: int, window: int, device: torch.device) -> Tensor:
    """Keys [persistent | h | segment]: token i sees the tokens j <= i and what was read for them (eq. 23).  -> (i j)"""
    tokens = torch.arange(num_tokens, device=device)
    keys = torch.cat((torch.full((num_persistent,), -1, device=device), tokens, tokens))
    queries = torch.arange(num_tokens - num_queries, num_tokens, device=device)
    return may_attend(queries[:, None], keys, window=window, sliding=True)
