"""What `--compile` compiles: a renewal of every memory's loop, and every layer around its memory."""

from __future__ import annotations

from typing import Any

import torch

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.neural_memory import NeuralMemory


def compile_layers(model: CausalLM[Any]) -> None:
    """Compile where it pays: layers of one kind share a graph, and no graph holds a memory's loop.

    A graph with the loop in it would take minutes and grow with the sequence, so memories call their compiled step.
    """
    model.compile_loops()
    for memory in model.modules():
        if isinstance(memory, NeuralMemory):
            memory.forward = torch.compiler.disable(memory.forward)  # type: ignore[method-assign]
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=False)
