"""Where half precision must not reach: gates, and weights that are summed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor


def is_autocasting(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, on the device of a tensor."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def same_autocast(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """A way to come back later to the autocast that is on now, on the device of a tensor."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of numbers of this dtype; torch's own promotion of dtypes is an operation like any other."""
    return torch.float64 if dtype == torch.float64 else torch.float32
