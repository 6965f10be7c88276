"""What the paper (arXiv 2501.00663) turns on in a `NeuralMemory`; `docs/paper.md` says which equation is where."""

from __future__ import annotations

from typing import Any

from torch import nn

from titans_pytorch.checks import value_checks

PAPER: dict[str, Any] = dict(
    qk_l2norm=True,
    conv_size=4,
    summed_loss=True,
    per_parameter_gates=True,
    channelwise_decay=True,
    learned_norm_gain=True,
    gated_output=True,
    init_decay_bias=-4.0,  # about 0.02 of a memory is forgotten in a chunk
)

MAX_LR = 0.3
"""Largest step of the mean loss; the sum has as many times its gradient as there are features"""


def paper_options(dim: int, heads: int, chunk_size: int | tuple[int, int], overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a `NeuralMemory`, overridden."""
    chunks = value_checks.check_chunk_size(chunk_size)
    value_checks.check_whole(dim=dim, heads=heads)
    dim_head = overrides.get("dim_head")
    if dim_head is None:
        value_checks.check_divides("heads", heads, "dim", dim)
        dim_head = dim // heads
    options = PAPER | dict(batch_size=chunks[1], activation=nn.SiLU()) | overrides
    max_lr = MAX_LR / dim_head if options["summed_loss"] else MAX_LR
    given = dict(dim=dim, heads=heads, chunk_size=chunk_size, dim_head=dim_head)
    return {"default_step_transform_max_lr": max_lr} | options | given
