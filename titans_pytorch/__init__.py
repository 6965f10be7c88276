"""Memory that is learned at test time: the public names."""

from titans_pytorch.audit import audit
from titans_pytorch.memory_models import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    ResidualNorm,
)
from titans_pytorch.neural_memory import NeuralMemory, NeuralMemState, mem_state_detach

__all__ = [
    "FactorizedMemoryMLP",
    "GatedResidualMemoryMLP",
    "MemoryAttention",
    "MemoryMLP",
    "MemorySwiGluMLP",
    "NeuralMemState",
    "NeuralMemory",
    "ResidualNorm",
    "audit",
    "mem_state_detach",
]
