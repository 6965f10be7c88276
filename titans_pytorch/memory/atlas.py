"""Memories of Atlas (arXiv 2505.23735) as presets: windows of surprises, powers of keys, orthogonal steps.

    OmegaNet   M_t = (1 - alpha_t) M_{t-1} - grad of a window          powers of queries and keys
    Atlas      the same with momentum, whose steps are orthogonal

The paper leaves open how long windows are and how steps are sized. Here the largest step is shared by a window, as so
many gradients are added up; and the memory is that of `paper.py`, with the norm that the paper puts elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titans_pytorch.checks import value_checks
from titans_pytorch.memory.paper import paper_options

WINDOW, KEY_POWERS = 4, 2


def omeganet_options(
    dim: int, heads: int, chunk_size: int, token_gates: bool, window: int, key_powers: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` with a window and without momentum, but for what is overridden."""
    value_checks.check_whole(window=window)
    options = paper_options(dim, heads, chunk_size, overrides, token_gates)
    largest = options["default_step_transform_max_lr"] / window
    own: dict[str, Any] = dict(window=window, key_powers=key_powers, momentum=False)
    return options | own | dict(default_step_transform_max_lr=largest) | dict(overrides)


def atlas_options(
    dim: int, heads: int, chunk_size: int, token_gates: bool, window: int, key_powers: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` with a window and orthogonal steps, but for what is overridden."""
    options = omeganet_options(dim, heads, chunk_size, token_gates, window, key_powers, overrides)
    return options | dict(rule="atlas", momentum=True) | dict(overrides)
