"""The three memories of Miras (arXiv 2504.13173) as presets: what is minimised, and what a memory is held near to.

    yaad     squares up to a threshold of every token, straight on from there; forgets as Titans
    moneta   cubes of differences; weights are divided by the square of their 4-norm
    memora   squares; weights are shares, held near to each other as distributions are

None has momentum. Steps are of the mean loss, as large at most as those of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titans_pytorch.checks import value_checks
from titans_pytorch.memory.paper import paper_options

KINDS: dict[str, dict[str, Any]] = {
    "yaad": dict(loss="yaad"),
    "moneta": dict(loss="lp:3", rule="lq:4"),
    "memora": dict(loss="mse", rule="kl"),
}


def kind_of_miras(kind: str) -> dict[str, Any]:
    """The loss and the rule of one of them."""
    value_checks.check_choice("kind", kind, tuple(KINDS))
    return KINDS[kind]


def miras_options(
    kind: str, dim: int, heads: int, chunk_size: int | tuple[int, int], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a `NeuralMemory` that is one of them, but for what is overridden."""
    own = kind_of_miras(kind) | dict(summed_loss=False, momentum=False) | dict(overrides)
    return paper_options(dim, heads, chunk_size, own)
