"""Who sees whom: one rule for the dense path, for FlexAttention and for decoding.

Masks of the dense path (and frequencies) are made once for each shape and kept, all together in at most KEPT_BYTES.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec

import torch
from torch import Tensor

Sizes = ParamSpec("Sizes")

KEPT_BYTES = 64 << 20
"""Room for the masks of windows of 2,048 tokens (8 MB each) and a few hundred small ones"""


def may_attend(query: Tensor, key: Tensor, *, window: int, sliding: bool) -> Tensor:
    """Whether the token at `query` sees the one at `key` (they broadcast).

    Persistent memories sit at negative positions: all see them.
    """
    near = query - key <= window if sliding else query // window == key // window
    return (key < 0) | ((key <= query) & near)


class KeptMasks:
    """The masks that were used last, as many as fit into `max_bytes`; a mask that is larger is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.masks: OrderedDict[Any, Tensor] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Any, build: Callable[[], Tensor]) -> Tensor:
        """The mask that is kept for this key, or what `build` makes."""
        with self.lock:
            if key in self.masks:
                self.masks.move_to_end(key)
                return self.masks[key]
        with torch.inference_mode(False):  # training may use later what inference has made
            mask = build()
        if mask.nbytes <= self.max_bytes:
            self.keep(key, mask)
        return mask

    def keep(self, key: Any, mask: Tensor) -> None:
        """Make room by forgetting what was not used for longest, and keep this one."""
        with self.lock:
            if key in self.masks:  # another thread was faster
                return
            while self.num_bytes + mask.nbytes > self.max_bytes:
                _, forgotten = self.masks.popitem(last=False)
                self.num_bytes -= forgotten.nbytes
            self.masks[key] = mask
            self.num_bytes += mask.nbytes


KEPT = KeptMasks(KEPT_BYTES)


def kept(build: Callable[Sizes, Tensor]) -> Callable[Sizes, Tensor]:
    """A function of sizes and a device whose results are kept; while compiling, the compiler sees to that."""

    @wraps(build)
    def mask(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        return KEPT.get((build.__name__, args, *sorted(kwargs.items())), lambda: build(*args, **kwargs))

    return mask


@kept
def window_mask(
    num_queries: int, num_tokens: int, num_persistent: int, window: int, sliding: bool, device: torch.device
) -> Tensor:
    """Keys [persistent | tokens], queries the last of the tokens, each seeing what `may_attend` says.  -> (i j)"""
    keys = torch.arange(-num_persistent, num_tokens, device=device)
    queries = torch.arange(num_tokens - num_queries, num_tokens, device=device)
    return may_attend(queries[:, None], keys, window=window, sliding=sliding)


@kept
def context_mask(num_queries: int, num_tokens: int, num_persistent: int, device: torch.device) -> Tensor:
    """Keys [persistent | h | segment]: token i sees the tokens j <= i and what was read for them (eq. 23).  -> (i j)"""
    tokens = torch.arange(num_tokens, device=device)
    keys = torch.cat((torch.full((num_persistent,), -1, device=device), tokens, tokens))
    queries = torch.arange(num_tokens - num_queries, num_tokens, device=device)
    return may_attend(queries[:, None], keys, window=num_tokens, sliding=True)
