"""What collators and tokenizers say of the tokens of a batch, in the words of the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ragged import Marks, marks_of

OF_COLLATORS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx")
"""What `DataCollatorWithFlattening` describes documents by, in its several forms"""


def marks_of_call(x: Tensor, mask: Any, past: Any, given: Mapping[str, Any]) -> Marks | None:
    """Which of the new tokens are real, and where documents begin; None: every row is one document, all of it real.

    x: (b n ...); mask: (b m), of which the last n columns count; given: cu_seq_lens_q, as of
    `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`, or position_ids that begin again at 0 with every
    document, where there is neither a mask nor a past, as then they may say other things
    """
    borders, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    documents = None
    if borders is None and positions is not None and mask is None and past is None:
        documents = (positions == 0).cumsum(dim=1).expand(x.shape[:2])
        documents = documents if bool((documents[:, -1] > 1).any()) else None
    if borders is None and documents is None and given.get("seq_idx") is not None:
        raise ValueError("documents of a row must be given by cu_seq_lens_q or position_ids, got seq_idx alone")
    if borders is not None and past is not None:
        raise ValueError("cu_seq_lens_q does not go with past_key_values, as documents begin anew")
    return marks_of(new_columns(mask, x), documents, borders, x.shape[:2])


def new_columns(mask: Any, x: Tensor) -> Tensor | None:
    """The columns of a mask that belong to the new tokens.  -> (b n) bool"""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != len(x) or mask.shape[1] < x.shape[1]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape (batch, tokens), here {tuple(x.shape[:2])}, got {got}")
    return mask[:, -x.shape[1] :].to(torch.bool)
