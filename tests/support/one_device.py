"""A watch over operations: tensors that are given to them and that they give are on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class OneDevice(TorchDispatchMode):
    """Refuses tensors of another device, which the meta device takes in products and as indices without a word."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for each in tensors((args, tuple((kwargs or {}).values()), result)):
            if each.device != self.device:
                raise RuntimeError(f"{op} has a tensor on {each.device} beside {self.device}")
        return result


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those in nested lists and tuples, which is all that operations take and give."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from tensors(part)
