"""What `--compile` compiles: a renewal of every memory's loop, and the feed-forward networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.layers.feed_forward import SiluGate, SwiGLU


def compile_parts(model: CausalLM[Any]) -> None:
    """Compile where it pays, in seconds; parts of one shape share a graph.

    A graph of all layers would hold every renewal of every memory, and take minutes.
    """
    model.compile_loops()
    for module in model.modules():
        if is_feed_forward(module):
            module.compile(dynamic=False)


def is_feed_forward(module: nn.Module) -> bool:
    is_gated = isinstance(module, nn.Sequential) and any(isinstance(part, SiluGate) for part in module)
    return is_gated or isinstance(module, SwiGLU)
