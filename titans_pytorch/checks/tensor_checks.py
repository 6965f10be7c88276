"""Checks of what modules are called with: tensors, and states made of them.  The voice is that of `checks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_sequence(name: str, seq: Any, *, views: int | None, dim: int, dtype: torch.dtype) -> None:
    """seq: (b n dim) or one token (b dim), with views (views b n dim) or (views b dim)"""
    pattern = "(batch, tokens, dim) or (batch, dim)" if views is None else f"({views} views, batch, tokens, dim)"
    if not isinstance(seq, Tensor):
        raise TypeError(f"{name} must be a tensor {pattern}, got {type(seq).__name__}")
    if seq.ndim - (views is not None) not in (2, 3):
        raise ValueError(f"{name} must have the shape {pattern}, got {tuple(seq.shape)}")
    if views is not None and seq.shape[0] != views:
        raise ValueError(f"{name} must have {views} views along its first axis, got {seq.shape[0]}: {tuple(seq.shape)}")
    if seq.shape[-1] != dim:
        raise ValueError(
            f"{name} must have {dim} features along its last axis, got {seq.shape[-1]}: {tuple(seq.shape)}"
        )
    if 0 in seq.shape:
        raise ValueError(f"{name} must not be empty, got {tuple(seq.shape)}")
    if not seq.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {seq.dtype}")
    if seq.dtype != dtype and not torch.is_autocast_enabled(seq.device.type):
        raise TypeError(f"{name} must have the dtype of the module, {dtype}, got {seq.dtype} (or use autocast)")


def check_tokens(name: str, seq: Any, *, dim: int, dtype: torch.dtype) -> None:
    """seq: (b n dim), not empty"""
    if isinstance(seq, Tensor) and seq.ndim != 3:
        raise ValueError(f"{name} must have the shape (batch, tokens, {dim}), got {tuple(seq.shape)}")
    check_sequence(name, seq, views=None, dim=dim, dtype=dtype)


def check_ids(name: str, ids: Any, num_tokens: int | None, at_least: int) -> None:
    """ids: (b n) of at least so many tokens below num_tokens; None: an embedding of the user's knows what it takes"""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of token ids (batch, tokens), got {type(ids).__name__}")
    if ids.ndim != 2 and (num_tokens is not None or ids.ndim < 2):
        raise ValueError(f"{name} must have the shape (batch, tokens), got {tuple(ids.shape)}")
    if ids.shape[0] == 0 or ids.shape[1] < at_least:
        raise ValueError(f"{name} must have at least {at_least} token(s) in at least one row, got {tuple(ids.shape)}")
    if num_tokens is None:
        return
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be of dtype int64 or int32, got {ids.dtype}")
    # A look at the values would hold up an accelerator; there the embedding itself complains.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = ids.aminmax()
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} must be from 0 to {num_tokens - 1}, got ids from {int(low)} to {int(high)}")


def check_labels(name: str, labels: Tensor, num_tokens: int, ignored: int) -> None:
    """labels: ids, or `ignored`"""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = torch.where(labels == ignored, 0, labels).aminmax()
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"{name} must be from 0 to {num_tokens - 1}, or {ignored}, got labels from {int(low)} to {int(high)}"
            )


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """mask: boolean, with a value for every token"""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, got {got}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape (batch, tokens) = {tuple(shape)}, got {tuple(mask.shape)}")


def check_same_tokens(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """What is stored has as many sequences and tokens as what is read."""
    if tuple(given) != tuple(expected):
        raise ValueError(f"{name} must have the batch and length of seq, {tuple(expected)}, got {tuple(given)}")


def check_shape(name: str, given: Any, shape: tuple[int, ...]) -> None:
    """A tensor has exactly this shape."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if tuple(given.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(given.shape)}")


def check_weights(name: str, weights: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """weights: a mapping name -> tensor; shapes: what each must have"""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping of names to weights, got {type(weights).__name__}")
    if set(weights) != set(shapes):
        raise ValueError(f"{name} must hold the weights {sorted(shapes)} of this module, got {sorted(weights)}")
    for key, shape in shapes.items():
        weight = weights[key]
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"{name}[{key!r}] must have the shape {tuple(shape)}, got {tuple(weight.shape)}")
        if weight.dtype != dtype:
            raise TypeError(f"{name}[{key!r}] must have the dtype {dtype}, got {weight.dtype}")


def check_batch(name: str, given: int, expected: int) -> None:
    """What is kept of earlier tokens is of as many sequences as the input."""
    if given != expected:
        raise ValueError(f"{name} must be of the input's batch size {expected}, got one of {given}")


def check_tail(name: str, tail: Tensor | None, shape: tuple[int, ...] | None) -> None:
    """What a convolution still sees; None without one."""
    got = None if tail is None else tuple(tail.shape)
    expected = None if shape is None else tuple(shape)
    if got != expected:
        raise ValueError(f"{name} must have the shape {expected} of this module's conv_size, got {got}")


def check_waiting(segment: Tensor, *, views: int | None, dim: int, chunk: int) -> None:
    """The waiting tokens of a state fit a module."""
    if segment.ndim != (3 if views is None else 4) or segment.shape[-1] != dim or segment.shape[-2] >= chunk:
        expected = f"({'' if views is None else '2 views, '}batch, fewer than {chunk} tokens, {dim})"
        raise ValueError(f"state.cache_store_segment must have the shape {expected}, got {tuple(segment.shape)}")


def check_enough_chunks(given: int, needed: int) -> None:
    """Weights over time reach to the last chunk that is read."""
    if given < needed:
        raise ValueError(
            f"weights must hold the memory after {needed} chunks to read this sequence, got {given} chunks"
        )


def checked_trajectory(name: str, weights: Any, names: Iterable[str]) -> Mapping[str, Tensor]:
    """Something that may be weights over chunks."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} must be a mapping of names to weights, got {type(weights).__name__}")
    if set(weights) != set(names) or not all(isinstance(w, Tensor) and w.ndim > 0 for w in weights.values()):
        raise ValueError(f"{name} must hold the weights {sorted(names)} of this module, got {sorted(weights)}")
    return weights


def check_past_state(past_state: Any) -> None:
    """A published past state is a pair."""
    if not isinstance(past_state, (tuple, list)) or len(past_state) != 2:
        raise TypeError(f"past_state must be a pair (weights, momenta), got {type(past_state).__name__}")


def check_stored_before(name: str, seq_index: Any, chunk: int) -> None:
    """A number of tokens that whole chunks can have."""
    if isinstance(seq_index, bool) or not isinstance(seq_index, int) or seq_index < 0 or seq_index % chunk:
        raise ValueError(f"{name} must be a multiple of the store chunk size {chunk}, at least 0, got {seq_index!r}")
