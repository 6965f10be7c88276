"""Titans models to try, as data; small ones in float64, every parameter moved away from where it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.streams import disturbed, randn
from titans_pytorch.titans import TitansBackbone, TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL

NUM_TOKENS, DIM = 11, 8
MODELS = {"mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL, "lmm": TitansLMM}
VARIANTS = tuple(MODELS)

SMALL: dict[str, Any] = dict(
    dim=DIM, depth=2, heads=2, window=4, num_persistent=2, ff_hidden=6, memory_chunk=2, memory_refresh=4, max_step=0.5
)

PAPER = dict(summed_loss=True, per_parameter_gates=True, channelwise_decay=True)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one memory, odd window": dict(memory_heads=1, window=5, memory_chunk=3, memory_refresh=6),
    "chunk longer than window": dict(
        window=3, memory_chunk=4, memory_refresh=4, num_persistent=1, layer_residual=False
    ),
    "chunk of one token": dict(window=6, memory_chunk=1, memory_refresh=5, num_persistent=0),
    "never refreshed": dict(memory_refresh=None, num_persistent=3),
    "window of one token": dict(window=1, memory_chunk=2),
    "gate: attention": dict(gate="attention"),
    "gate: memory": dict(gate="memory", layer_residual=False),
    "gate: product": dict(gate="product"),
    "gate: mix": dict(gate="mix"),
    "no convolution, no norm": dict(
        conv_size=None, qk_l2norm=False, memory_options=dict(gated_output=False, learned_norm_gain=False)
    ),
    "convolution longer than window": dict(conv_size=5, window=3),
    "the paper's memory": dict(memory_options=PAPER),
    "the paper's memory by the paper's chunks": dict(
        memory_options=PAPER, memory_heads=1, memory_chunk=4, memory_refresh=4, num_persistent=1
    ),
    "linear memory, no momentum": dict(memory_depth=1, momentum=False),
    "gates of every token": dict(token_gates=True, memory_chunk=2, memory_refresh=4),
    "linear memory, at every token": dict(memory_model="linear", memory_chunk=1, memory_refresh=1),
    "gated delta rule": dict(
        memory_model="linear", memory_rule="gated_delta", memory_loss="sse", memory_chunk=1, memory_refresh=1
    ),
    "another loss": dict(memory_loss="huber:0.5"),
    "deep memory, no decay": dict(memory_depth=3, decay=False, memory_expansion=1.0),
    "no memory": dict(memory=False),
    "no memory, nothing persistent": dict(memory=False, num_persistent=0, window=3),
}


BY_DEFAULT = {
    "mac": (
        "plain",
        "gated delta rule",
        "chunk longer than window",
        "the paper's memory",
        "convolution longer than window",
    ),
    "mag": (
        "one memory, odd window",
        "gates of every token",
        "chunk of one token",
        "the paper's memory",
        "gate: product",
        "no memory",
    ),
    "mal": ("plain", "another loss", "gate: memory", "window of one token", "the paper's memory", "never refreshed"),
    "lmm": (
        "plain",
        "linear memory, at every token",
        "deep memory, no decay",
        "linear memory, no momentum",
        "no convolution, no norm",
        "no memory",
    ),
}
CASES = [
    pytest.param(variant, name, marks=() if name in BY_DEFAULT[variant] else pytest.mark.slow, id=f"{variant}, {name}")
    for variant in VARIANTS
    for name in OPTIONS
]
"""All models with all options; those of BY_DEFAULT by default, the others in the long run"""


def config_of(name: str, **changes: Any) -> TitansConfig:
    return TitansConfig(**SMALL | OPTIONS[name] | changes)


def build(variant: str, name: str = "plain", *, seed: int = 0, **changes: Any) -> Any:
    """A language model in float64."""
    torch.manual_seed(seed)
    return disturbed(MODELS[variant](NUM_TOKENS, config_of(name, **changes)).double())


def build_backbone(variant: str, name: str = "plain", *, seed: int = 0, **changes: Any) -> TitansBackbone:
    torch.manual_seed(seed)
    return disturbed(TitansBackbone(variant, config_of(name, **changes)).double())  # type: ignore[arg-type]


def random_ids(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, count), generator=torch.Generator().manual_seed(seed))


def random_inputs(batch: int, count: int, seed: int = 0) -> Tensor:
    return randn(batch, count, DIM, seed=seed)
