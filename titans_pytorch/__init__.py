"""Memory that is learned at test time: the public names."""

from importlib.metadata import PackageNotFoundError, version

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.auditing.audit import audit
from titans_pytorch.conversations import ConversationPool
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.initialization import reset_parameters
from titans_pytorch.mac_transformer import MACCache, MemoryAsContextTransformer
from titans_pytorch.memory.recorded import recorded_surprises, storing_costs
from titans_pytorch.memory.writes import writes_off
from titans_pytorch.memory_models import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    LayerwiseMemory,
    MemoryAttention,
    MemoryGLU,
    MemoryMLP,
    MemorySwiGluMLP,
    ResidualNorm,
)
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.neural_memory import NeuralMemory, NeuralMemState, mem_state_detach
from titans_pytorch.ragged.state import RaggedState
from titans_pytorch.state_files import load_state, save_state, state_from_bytes, state_to_bytes
from titans_pytorch.titans import (
    TitansBackbone,
    TitansConfig,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TitansState,
)
from titans_pytorch.tnt_memory import TNTMemory, TNTState

try:
    __version__ = version("titans-pytorch")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.6.0"

__all__ = [
    "ConversationPool",
    "FactorizedMemoryMLP",
    "GatedResidualMemoryMLP",
    "ImplicitMLPAttention",
    "LayerwiseMemory",
    "MACCache",
    "MemoryAsContextTransformer",
    "MemoryAttention",
    "MemoryGLU",
    "MemoryMLP",
    "MemorySwiGluMLP",
    "NestedAttention",
    "NeuralMemState",
    "NeuralMemory",
    "RaggedState",
    "ResidualNorm",
    "SegmentedAttention",
    "TNTMemory",
    "TNTState",
    "TitansBackbone",
    "TitansConfig",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansState",
    "__version__",
    "audit",
    "load_state",
    "mem_state_detach",
    "recorded_surprises",
    "reset_parameters",
    "save_state",
    "state_from_bytes",
    "state_to_bytes",
    "storing_costs",
    "writes_off",
]
