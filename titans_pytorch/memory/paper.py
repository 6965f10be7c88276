"""The paper's memory (arXiv 2501.00663) as one preset; `docs/paper.md` says which equation is where.

`NeuralMemory.paper` has all of it. The models of the family (`titans.memory`) share `FORM`: how tokens are projected
and answers formed. They leave `RULE` out: one gate serves all parameters, and steps are measured by the mean loss, so
that one size of step fits heads of any width. `memory_options` turns the rest on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from titans_pytorch.checks import value_checks

FORM: dict[str, Any] = dict(qk_l2norm=True, conv_size=4, learned_norm_gain=True, gated_output=True)
RULE: dict[str, Any] = dict(summed_loss=True, per_parameter_gates=True, channelwise_decay=True)

MAX_STEP = 0.3
"""Largest step of the mean loss; the sum has as many times its gradient as there are features"""

DECAY_BIAS = -4.0
"""About 0.02 of a memory is forgotten in a chunk"""


def form_options(dim: int, heads: int, **overrides: Any) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` that projects and answers as the paper's."""
    return FORM | dict(dim=dim, heads=heads, activation=nn.SiLU()) | overrides


def of_token(decay_bias: float, num_tokens: int) -> float:
    """The logit of forgetting at every token that forgets as much of a memory in so many tokens as one does at once."""
    kept_by_token = -math.log1p(math.exp(decay_bias)) / num_tokens  # of the logarithm of 1 - sigmoid(bias)
    return math.log(-math.expm1(kept_by_token)) - kept_by_token


def width_of_heads(dim: int, heads: int, dim_head: int | None) -> int:
    """The width of a head where all of them together are as wide as a token, unless it is given."""
    value_checks.check_whole(dim=dim, heads=heads, dim_head=dim_head)
    if dim_head is None and dim % heads:
        raise ValueError(f"dim must be a multiple of heads ({heads}), got {dim}; or give dim_head")
    return dim // heads if dim_head is None else dim_head


def paper_options(
    dim: int, heads: int, chunk_size: int | tuple[int, int], overrides: Mapping[str, Any], token_gates: bool = False
) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` that is the paper's in every respect, but for what is overridden."""
    chunks = value_checks.check_chunk_size(chunk_size)
    value_checks.check_switches(token_gates=token_gates)
    dim_head = width_of_heads(dim, heads, overrides.get("dim_head"))
    rule = RULE | dict(batch_size=chunks[1], init_decay_bias=DECAY_BIAS)
    if token_gates:  # forgetting of every token and every channel would be built token by token
        chunk_size, rule = 1, rule | dict(channelwise_decay=False, init_decay_bias=of_token(DECAY_BIAS, chunks[1]))
    options = form_options(dim, heads) | rule | dict(overrides)
    max_lr = MAX_STEP / dim_head if options["summed_loss"] else MAX_STEP
    return {"default_step_transform_max_lr": max_lr} | options | dict(chunk_size=chunk_size, dim_head=dim_head)
