"""The Omega rule of Atlas (arXiv 2505.23735): a step follows a window of surprises, not the newest alone.

    S_t = eta_t S_{t-1} - sum_{i=t-c+1..t} gamma_i^(t) grad l_i      (9)-(11), with momentum (32)-(33)
    M_t = (1 - alpha_t) M_{t-1} + S_t

gamma_i^(t) is the step size theta_i of what was written, times a gate of the chunk that looks back at it; a chunk's own
gate is 1. So a window of one chunk is the rule of Titans, or whichever rule has the window: how it moves and forgets
stays its own. All gradients are taken at the base, those of earlier chunks, too: where it has been renewed in between,
they are taken anew.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.rule import GateSpec, Shares

WINDOW = "window"


def window_gate(window: int, varies: Literal["memory", "parameter"]) -> GateSpec:
    """How much each chunk counts of those before it, from the newest to the oldest."""
    return GateSpec(WINDOW, "to_window", "scale", number=window - 1, varies=varies)


def counted(gates: Gates, window: int) -> Tensor:
    """How much of the surprise of each chunk (column) is in the step of each chunk of a block (row).

    The first columns are the window - 1 chunks before the block.  -> (r n n+window-1)
    """
    own = torch.ones_like(gates.like).unsqueeze(-1)
    before = gates.shares[WINDOW].movedim(0, -1)  # (r n window-1), the newest first
    band = torch.cat((before.flip(-1), own), dim=-1)
    n = gates.num_chunks
    rows = F.pad(band, (0, n)).flatten(1)[:, : n * (n + window - 1)]  # each row begins one further to the right
    return rows.unflatten(1, (n, n + window - 1))


def shares_of_window(shares: Shares, gates: Gates, window: int) -> Shares:
    """Sums over windows, of the surprises of a block's chunks and of those before it."""
    table = counted(gates, window)
    of_channels = table.unsqueeze(1)
    surprise = shares.surprise @ (table if shares.surprise.ndim == 3 else of_channels)
    last = shares.last_surprise.unsqueeze(-2) @ (table if shares.last_surprise.ndim == 3 else of_channels)
    return shares._replace(surprise=surprise, last_surprise=last.squeeze(-2))
