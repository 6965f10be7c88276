"""How a transformer calls its layers: plainly, unless whoever calls the transformer wants to see or recompute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Call = Callable[..., Any]
"""(layer, *arguments) -> what the layer answers to them"""


def plainly(layer: nn.Module, *arguments: Any) -> Any:
    """Call a layer, and do nothing else."""
    return layer(*arguments)
