"""Documents behind one another in one row, each read as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.hf.ragged import Outputs, Reader

OF_COLLATORS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "seq_idx")
"""What `DataCollatorWithFlattening` describes documents by, in its several forms"""


def document_starts(x: Tensor, mask: Tensor | None, past: Any, given: Mapping[str, Any]) -> Tensor | None:
    """Where documents begin, and where the last ends, (documents + 1); None: every row is one document.

    given: cu_seq_lens_q, as of `DataCollatorWithFlattening(return_flash_attn_kwargs=True)`, or position_ids that begin
    again at 0 with every document. A collator's row has no mask, and follows no cache.
    """
    bounds = given.get("cu_seq_lens_q")
    positions = given.get("position_ids")
    if bounds is None and positions is not None and mask is None and past is None and len(positions) == 1:
        begins = (positions[0] == 0).nonzero()[:, 0]
        bounds = F.pad(begins, (0, 1), value=x.shape[1]) if len(begins) > 1 else None
    if bounds is None:
        if given.get("seq_idx") is not None:
            raise ValueError("documents of a row must be given by cu_seq_lens_q or position_ids, got seq_idx alone")
        return None
    if mask is not None or past is not None:
        raise ValueError("documents in one row go with neither attention_mask nor past_key_values")
    if len(x) != 1 or bounds[0] != 0 or bounds[-1] != x.shape[1]:
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to the {x.shape[1]} tokens of one row, got {bounds.tolist()} "
            f"with {len(x)} row(s)"
        )
    return bounds


def read_documents(read: Reader, x: Tensor, starts: Tensor) -> Outputs:
    """Documents of one row, as rows of a batch.  x: (1 n dim), starts: (documents + 1) -> (1 n ...) each

    They are padded on the right, to the longest: what stands behind a document is not seen by it.
    """
    lengths = starts.diff()
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    rows = x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x[0])
    outputs, _ = read(rows, None)
    return tuple(y[mask][None] for y in outputs)
