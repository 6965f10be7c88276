"""Checks of the options of a memory that depend on each other.  The voice is that of `checks`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.checks import value_checks


def check_dim_head(dim: int, dim_head: int, heads: int) -> None:
    if heads == 1 and dim_head != dim:
        raise ValueError(f"dim_head must equal dim ({dim}) with one head, got {dim_head}; use heads > 1 for another")


def check_momentum(
    momentum: bool,
    momentum_order: int,
    learned_momentum_combine: bool,
    learned_combine_include_zeroth: bool,
    init_momentum_bias: float | None,
) -> None:
    """Options that contradict are errors; the ones that the published package ignores are warnings."""
    if learned_momentum_combine and not (momentum and momentum_order > 1):
        got = f"momentum={momentum} and momentum_order={momentum_order}"
        raise ValueError(f"learned_momentum_combine needs momentum of more than one order, got {got}")
    if init_momentum_bias is not None and not momentum:
        raise ValueError(f"init_momentum_bias needs momentum, got {init_momentum_bias} with momentum=False")
    if momentum_order > 1 and not momentum:
        warn_ignored(f"momentum_order={momentum_order}", "momentum=False")
    if learned_combine_include_zeroth and not learned_momentum_combine:
        warn_ignored("learned_combine_include_zeroth=True", "learned_momentum_combine=False")


def check_batching(batch_size: int | None, chunk: int, gated_transition: bool, max_weight_growth: float | None) -> None:
    value_checks.check_multiple("batch_size", batch_size, chunk)
    value_checks.check_positive(max_weight_growth=max_weight_growth)
    if max_weight_growth is not None and max_weight_growth < 1:
        raise ValueError(f"max_weight_growth must be at least 1 (times the initial memory), got {max_weight_growth}")
    if gated_transition and batch_size is None:
        warn_ignored("gated_transition=True", "batch_size=None (unless a call sets ttt_batch_size)")


def check_chunking(chunk: int, attn_pool_chunks: bool, looks_ahead: bool) -> None:
    for name, is_on in (("attn_pool_chunks", attn_pool_chunks), ("store_with_lookahead_value", looks_ahead)):
        if is_on and chunk == 1:
            raise ValueError(f"{name} needs a store chunk size of at least 2 tokens, got 1")


def check_scan(use_accelerated_scan: bool) -> None:
    if not use_accelerated_scan:
        return
    has_package = importlib.util.find_spec("accelerated_scan") is not None
    if not (has_package and torch.cuda.is_available()):
        raise ValueError(
            "use_accelerated_scan needs a CUDA device and the package accelerated-scan, "
            f"got CUDA {'available' if torch.cuda.is_available() else 'not available'} "
            f"and the package {'installed' if has_package else 'not installed'}"
        )


def check_activation(activation: Any) -> None:
    if activation is not None and not isinstance(activation, torch.nn.Module):
        raise TypeError(
            f"activation must be an nn.Module such as nn.SiLU(), got {activation!r} ({type(activation).__name__})"
        )


def check_elementwise(name: str, transform: Callable[[Tensor], Tensor] | None) -> None:
    if transform is None:
        return
    got = transform(torch.zeros(2, 3))
    if not isinstance(got, Tensor) or got.shape != (2, 3):
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{name} must be elementwise: gave the shape (2, 3), got {shape}")


def warn_ignored(option: str, because: str) -> None:
    warnings.warn(f"{option} has no effect with {because}", UserWarning, stacklevel=6)
