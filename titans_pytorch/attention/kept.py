"""What a backward pass keeps: a view keeps all that it is a view of."""

from __future__ import annotations

import torch
from torch import Tensor


def by_itself(x: Tensor) -> Tensor:
    """A part of something larger, to be kept without the rest; without gradients nothing is kept or copied."""
    return x.contiguous() if torch.is_grad_enabled() else x
