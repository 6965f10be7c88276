"""Inputs, disturbed modules, and sequences that come in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed, whatever was drawn before."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def disturbed(module: Module, scale: float = 0.3) -> Module:
    """Every parameter that trains moved away from where it starts, so that none of them hides behind a 0 or a 1."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def pieces(lengths: Iterable[int]) -> Iterator[slice]:
    """Stretches of so many tokens, one behind the other."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def with_state(module: Callable[..., Any], piece: Tensor, state: Any, **more: Tensor) -> tuple[Tensor, Any]:
    """One call of a module that takes `state` and returns `(outputs, state)`."""
    return module(piece, state=state, **more)


def in_pieces(
    module: Callable[..., Any],
    given: Tensor,
    lengths: Iterable[int],
    stream: Callable[..., tuple[Tensor, Any]] = with_state,
    **more: Tensor,
) -> tuple[Tensor, Any]:
    """Outputs of all pieces and the last state.  given, and all of `more`: (b t ...) -> (b t ...)"""
    state, outputs = None, []
    for piece in pieces(lengths):
        output, state = stream(module, given[:, piece], state, **{name: x[:, piece] for name, x in more.items()})
        outputs.append(output)
    return torch.cat(outputs, dim=1), state
