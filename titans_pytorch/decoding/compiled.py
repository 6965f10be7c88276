"""A step of rows under `torch.compile`: one graph where nobody's chunk ends and one where some do, at any positions.

The same graphs serve every token, every state and models of one shape; for `TitansMAC`, whose memories are asked before
segments, there are two more. Where the ends of chunks are rare, the step that stores them has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.decoding.due import TokenStep
from titans_pytorch.decoding.row_model import RowModel
from titans_pytorch.fast_weights.inductor import OPTIONS

MAX_GRAPHS = 64
"""Models and numbers of rows that one process may compile graphs for; torch gives up after 8 of a function"""

RARE = 32
"""Steps to one that stores a chunk, beyond which that one is not compiled, which would take half a minute: a guess"""


def logits_of(model: RowModel, ids: Tensor, buffers: Any, step: TokenStep) -> Tensor:
    """What is compiled."""
    return model.logits(ids, buffers, step)


@cache
def compiled_step(device: str) -> Callable[..., Tensor]:
    """`logits_of` on this kind of device, compiled where it is first called."""
    return torch.compile(logits_of, fullgraph=True, options=OPTIONS.get(device))


def compiled_logits(model: RowModel, ids: Tensor, buffers: Any, step: TokenStep) -> Tensor:
    """`RowModel.logits` by a graph; where a chunk ends, which is rare in long chunks of few rows, without one."""
    if step.chunks is not None and (model.cadence.chunk or 0) > RARE * len(ids):
        return model.logits(ids, buffers, step)
    with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
        return compiled_step(ids.device.type)(model, ids, buffers, of_few_forms(step))


def of_few_forms(step: TokenStep) -> TokenStep:
    """The step, in which somebody's base may always be renewed, and as many rows as one likes end a chunk."""
    chunks, renewals = step.chunks, step.renewals
    if chunks is not None and renewals is None:
        renewals = torch.zeros_like(chunks, dtype=torch.bool)
    chunks, renewals, segments = map(of_any_length, (chunks, renewals, step.segments))
    return step._replace(chunks=chunks, renewals=renewals, segments=segments)


def of_any_length(of_rows: Tensor | None) -> Tensor | None:
    """Two at least, since graphs for one are others; the only row is named twice, and written twice."""
    if of_rows is None:
        return None
    of_rows = of_rows.repeat(2) if len(of_rows) == 1 else of_rows
    torch._dynamo.maybe_mark_dynamic(of_rows, 0)
    return of_rows
