"""Which tokens of a batch are real, and which document they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Marks(NamedTuple):
    """What is said of the tokens of a batch beside themselves.  (b n) each"""

    mask: Tensor | None  # False: padding; None: all are real
    documents: Tensor | None  # numbers of documents, one following another where the number changes; None: one a row


def marks_of(
    attention_mask: Tensor | None, document_ids: Tensor | None, cu_seqlens: Tensor | None, shape: Sequence[int]
) -> Marks | None:
    """The arguments of a call, checked; None: every row is one sequence, all of it real.

    attention_mask: (b n) bool or 0 and 1; document_ids: (b n) whole numbers; cu_seqlens: (k + 1) borders of documents
    of a single row, from 0 to n
    """
    if attention_mask is not None:
        attention_mask = checked_mask(attention_mask, shape)
    if cu_seqlens is not None:
        if document_ids is not None:
            raise ValueError("cu_seqlens and document_ids say the same, give one of them, got both")
        document_ids = numbered(cu_seqlens, shape)
    elif document_ids is not None:
        check_documents(document_ids, shape)
    if attention_mask is None and document_ids is None:
        return None
    return Marks(attention_mask, document_ids)


def checked_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A boolean mask, True for real tokens."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor (batch, tokens), got {type(mask).__name__}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"attention_mask must have the shape (batch, tokens) = {(*shape,)}, one value for each new token, "
            f"got {tuple(mask.shape)}"
        )
    if mask.is_floating_point() or mask.is_complex():  # maybe one that is added to scores, 0 for tokens
        raise TypeError(f"attention_mask must be boolean or whole numbers, True or 1 for tokens, got {mask.dtype}")
    if mask.dtype == torch.bool:
        return mask
    if can_look_at(mask) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"attention_mask must be 1 for tokens and 0 for padding, got other values of {mask.dtype}")
    return mask != 0


def check_documents(documents: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(documents, Tensor) or documents.is_floating_point() or documents.is_complex():
        got = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(f"document_ids must be a tensor of whole numbers (batch, tokens), got {got}")
    if tuple(documents.shape) != tuple(shape):
        raise ValueError(
            f"document_ids must have the shape (batch, tokens) = {(*shape,)}, one for each new token, "
            f"got {tuple(documents.shape)}"
        )


def numbered(cu_seqlens: Tensor, shape: Sequence[int]) -> Tensor:
    """Document numbers 0, 1, ... from the borders between documents.  (k + 1) -> (1 n)"""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise TypeError(f"cu_seqlens must be whole numbers (documents + 1), got {got}")
    batch, count = shape
    if batch != 1:
        raise ValueError(f"cu_seqlens belongs to a single row, got {batch} rows; use document_ids")
    borders = cu_seqlens.tolist()
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != count or borders != sorted(borders):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {count}, got {borders}")
    lengths = cu_seqlens.long().diff()
    documents = torch.arange(len(lengths), device=cu_seqlens.device)
    return documents.repeat_interleave(lengths, output_size=count)[None]


def can_look_at(tensor: Tensor) -> bool:
    """Whether looking at values holds nobody up."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
