"""The arguments of a `NeuralMemory`, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from titans_pytorch.checks import value_checks
from titans_pytorch.fast_weights.engine import EngineName
from titans_pytorch.fast_weights.interface import LossFn
from titans_pytorch.losses import mean_squared_error, summed_squared_error
from titans_pytorch.memory import option_checks as memory_checks


@dataclass(frozen=True)
class MemoryOptions:
    """`NeuralMemory` says what each of them means, and has the defaults."""

    dim: int
    chunk_size: int | tuple[int, int]
    batch_size: int | None
    dim_head: int | None
    heads: int
    model: nn.Module | None
    store_memory_loss_fn: LossFn
    adaptive_step_transform: Callable[[Tensor], Tensor] | None
    default_step_transform_max_lr: float
    per_parameter_lr_modulation: bool
    max_mem_layer_modulation: float
    per_head_learned_parameters: bool
    attn_pool_chunks: bool
    momentum: bool
    momentum_order: int
    learned_momentum_combine: bool
    learned_combine_include_zeroth: bool
    num_kv_per_token: int
    qkv_receives_diff_views: bool
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    max_grad_norm: float | None
    use_accelerated_scan: bool
    activation: nn.Module | None
    init_adaptive_step_bias: float | None
    init_momentum_bias: float | None
    init_decay_bias: float | None
    accept_weight_residual: bool
    spectral_norm_surprises: bool
    gated_transition: bool
    mem_model_norm_add_residual: bool
    store_with_lookahead_value: bool
    default_model_kwargs: Mapping[str, Any] | None
    max_weight_growth: float | None
    engine: EngineName | None
    qk_l2norm: bool
    conv_size: int | None
    summed_loss: bool
    per_parameter_gates: bool
    channelwise_decay: bool
    learned_norm_gain: bool
    gated_output: bool

    @classmethod
    def names(cls) -> set[str]:
        return {field.name for field in fields(cls)}

    @property
    def chunks(self) -> tuple[int, int]:
        """(retrieve, store)"""
        return value_checks.check_chunk_size(self.chunk_size)

    @property
    def head_width(self) -> int:
        return self.dim if self.dim_head is None else self.dim_head

    @property
    def num_orders(self) -> int:
        """Of momentum."""
        return self.momentum_order if self.momentum else 0

    @property
    def num_combined(self) -> int:
        """How many orders are mixed; 0: the last one counts."""
        return self.momentum_order + self.learned_combine_include_zeroth if self.learned_momentum_combine else 0

    @property
    def loss_fn(self) -> LossFn:
        return summed_squared_error if self.summed_loss else self.store_memory_loss_fn

    def __post_init__(self) -> None:
        self.check_types()
        self.check_paper()
        memory_checks.check_batching(self.batch_size, self.chunks[1], self.gated_transition, self.max_weight_growth)
        memory_checks.check_chunking(self.chunks[1], self.attn_pool_chunks, self.store_with_lookahead_value)
        memory_checks.check_momentum(
            self.momentum,
            self.momentum_order,
            self.learned_momentum_combine,
            self.learned_combine_include_zeroth,
            self.init_momentum_bias,
        )
        memory_checks.check_scan(self.use_accelerated_scan)
        memory_checks.check_dim_head(self.dim, self.head_width, self.heads)
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(self.model).__name__}")

    def check_types(self) -> None:
        """Every argument by itself."""
        value_checks.check_switches(
            **{each.name: getattr(self, each.name) for each in fields(self) if each.type == "bool"}
        )
        value_checks.check_whole(
            dim=self.dim,
            dim_head=self.dim_head,
            heads=self.heads,
            momentum_order=self.momentum_order,
            num_kv_per_token=self.num_kv_per_token,
            batch_size=self.batch_size,
            conv_size=self.conv_size,
        )
        value_checks.check_positive(
            default_step_transform_max_lr=self.default_step_transform_max_lr,
            max_mem_layer_modulation=self.max_mem_layer_modulation,
            max_grad_norm=self.max_grad_norm,
        )
        value_checks.check_chunk_size(self.chunk_size)
        value_checks.check_number(
            init_adaptive_step_bias=self.init_adaptive_step_bias,
            init_momentum_bias=self.init_momentum_bias,
            init_decay_bias=self.init_decay_bias,
        )
        value_checks.check_callable(
            store_memory_loss_fn=self.store_memory_loss_fn, adaptive_step_transform=self.adaptive_step_transform
        )
        memory_checks.check_elementwise("adaptive_step_transform", self.adaptive_step_transform)
        memory_checks.check_activation(self.activation)

    def check_paper(self) -> None:
        has_loss = self.store_memory_loss_fn is not mean_squared_error
        value_checks.check_exclusive(qk_l2norm=self.qk_l2norm, qk_rmsnorm=self.qk_rmsnorm)
        value_checks.check_exclusive(summed_loss=self.summed_loss, store_memory_loss_fn=has_loss)
        has_norm = self.mem_model_norm_add_residual
        value_checks.check_needed("learned_norm_gain", self.learned_norm_gain, mem_model_norm_add_residual=has_norm)
