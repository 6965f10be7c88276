"""The gated delta rule (arXiv 2412.06464) as one preset: a linear memory that is surprised at every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titans_pytorch.memory.paper import form_options, width_of_heads

MAX_STEP = 0.5
"""Largest step of the summed loss, whose gradient is twice the difference: what a key of length 1 holds is replaced"""

DECAY_BIAS = -6.0
"""About 0.0025 of a memory is forgotten at a token, which is 0.04 in a chunk of 16"""

LINEAR: dict[str, Any] = dict(mem_model_norm_add_residual=False, learned_norm_gain=False, max_weight_growth=None)
"""What makes a memory of one matrix linear in it, also where its base is renewed"""


def delta_options(dim: int, heads: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` with that rule, but for what is overridden."""
    width = width_of_heads(dim, heads, overrides.get("dim_head"))
    options = form_options(dim, heads, rule="gated_delta", loss="sse", momentum=False, chunk_size=1, batch_size=1)
    steps = dict(default_step_transform_max_lr=MAX_STEP, init_decay_bias=DECAY_BIAS)
    return options | LINEAR | steps | dict(model="linear", dim_head=width) | dict(overrides)
