"""What the layers around a memory are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """The arguments of a `NeuralMemory` that its projections and gates need, after they have been checked."""

    dim: int
    heads: int
    dim_head: int
    num_kv_per_token: int
    parameter_channels: dict[str, int]  # of every fast weight, the size of its last axis (1 for a number)

    # queries, keys, values and reads
    activation: nn.Module | None
    conv_size: int | None
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    qk_l2norm: bool
    gated_output: bool
    learned_norm_gain: bool
    looks_ahead: bool
    compacts_masked: bool

    # gates
    attn_pool_chunks: bool
    per_parameter_gates: bool
    channelwise_decay: bool
    adaptive_step_transform: Callable[[Tensor], Tensor] | None
    max_lr: float
    momentum_order: int  # 0: none
    num_combined: int  # orders that are mixed, 0: the last one counts
    modulates_parameters: bool
    max_modulation: float
    mixes_weights: bool
    step_bias: float | None
    momentum_bias: float | None
    decay_bias: float | None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(self.parameter_channels)

    @property
    def num_gated(self) -> int:
        """How many sets of gates there are: one for each parameter, or one for all."""
        return len(self.parameter_channels) if self.per_parameter_gates else 1
