"""Triton, or the sentence that says that it is missing; where a kernel is started."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "titans_pytorch.kernels needs the package triton, which is not installed: "
        "pip install 'titans-pytorch[triton]' (Linux)"
    ) from error

__all__ = ["on_device_of", "tl", "triton"]


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are started on the current CUDA device, wherever their tensors are: a context in which these agree."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
