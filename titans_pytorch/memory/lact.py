"""LaCT (arXiv 2505.23884) as one preset: long chunks, a gated network, and norms that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titans_pytorch.checks import value_checks
from titans_pytorch.memory.delta import LINEAR
from titans_pytorch.memory.paper import form_options, width_of_heads

STEPS_OF_A_CHUNK = 16.0
"""Largest steps of all tokens of a chunk together: their gradients do not shrink as the memory learns"""

CHUNK = 2048


def lact_options(dim: int, heads: int, chunk_size: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` with that rule, but for what is overridden."""
    value_checks.check_whole(chunk_size=chunk_size)
    width = width_of_heads(dim, heads, overrides.get("dim_head"))
    options = form_options(dim, heads, rule="lact", loss="dot", model="glu", dim_head=width)
    cut = dict(chunk_size=chunk_size, batch_size=chunk_size, apply_then_update=True)
    return options | LINEAR | cut | dict(default_step_transform_max_lr=STEPS_OF_A_CHUNK / chunk_size) | dict(overrides)
