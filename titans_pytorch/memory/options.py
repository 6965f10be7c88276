"""The arguments of a `NeuralMemory`, sorted by the part of it that reads them; each checks its own.

`NeuralMemory` says what each of them means, and has the defaults. Those of rules are in `fast_weights.rules.registry`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from titans_pytorch.checks import value_checks
from titans_pytorch.fast_weights.interface import LossFn
from titans_pytorch.fast_weights.rules.registry import RuleOptions
from titans_pytorch.losses import loss_by_name, mean_squared_error, summed_squared_error
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.steps import Step, step_of

DEFAULT_MODEL = {"depth": 2, "expansion_factor": 4.0}

SpanKind = Literal["chunk", "shard"]
"""The tokens on whose keys a query is projected: those of its chunk or its shard, up to it"""


@dataclass(frozen=True)
class ProjectionOptions:
    """How tokens become queries, keys and values, and what is read becomes tokens."""

    dim: int
    heads: int
    dim_head: int  # width of a head
    num_kv_per_token: int
    activation: nn.Module | None
    conv_size: int | None
    pre_rmsnorm: bool
    post_rmsnorm: bool
    qk_rmsnorm: bool
    qk_l2norm: bool
    gated_output: bool
    looks_ahead: bool  # keys are paired with the values of the next token
    has_learned_gain: bool  # the gain of the norm around the memory model is learned outside
    key_powers: int  # of the polynomial that queries and keys pass; 1: none

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.dim_head

    def __post_init__(self) -> None:
        value_checks.check_whole(
            dim=self.dim,
            dim_head=self.dim_head,
            heads=self.heads,
            num_kv_per_token=self.num_kv_per_token,
            conv_size=self.conv_size,
            key_powers=self.key_powers,
        )
        value_checks.check_switches(
            pre_rmsnorm=self.pre_rmsnorm,
            post_rmsnorm=self.post_rmsnorm,
            qk_rmsnorm=self.qk_rmsnorm,
            qk_l2norm=self.qk_l2norm,
            gated_output=self.gated_output,
            store_with_lookahead_value=self.looks_ahead,
            learned_norm_gain=self.has_learned_gain,
        )
        value_checks.check_exclusive(qk_l2norm=self.qk_l2norm, qk_rmsnorm=self.qk_rmsnorm)
        if self.activation is not None and not isinstance(self.activation, nn.Module):
            got = f"{self.activation!r} ({type(self.activation).__name__})"
            raise TypeError(f"activation must be an nn.Module such as nn.SiLU(), got {got}")
        if self.heads == 1 and self.dim_head != self.dim:
            raise ValueError(
                f"dim_head must equal dim ({self.dim}) with one head, got {self.dim_head}; use heads > 1 for another"
            )


@dataclass(frozen=True)
class GateOptions:
    """What decides how eagerly tokens are stored, beside the gates of the rule."""

    attn_pool_chunks: bool
    adaptive_step_transform: Step | str | None
    default_step_transform_max_lr: float
    per_parameter_lr_modulation: bool
    max_mem_layer_modulation: float
    accept_weight_residual: bool
    has_thresholds: bool  # the loss has one for each token

    def __post_init__(self) -> None:
        value_checks.check_switches(
            attn_pool_chunks=self.attn_pool_chunks,
            per_parameter_lr_modulation=self.per_parameter_lr_modulation,
            accept_weight_residual=self.accept_weight_residual,
        )
        value_checks.check_positive(
            default_step_transform_max_lr=self.default_step_transform_max_lr,
            max_mem_layer_modulation=self.max_mem_layer_modulation,
        )
        _ = self.step  # refuses what is none

    @property
    def step(self) -> Step:
        """What makes step sizes of gates."""
        return step_of(self.adaptive_step_transform, self.default_step_transform_max_lr)


@dataclass(frozen=True)
class ModelOptions:
    """What the memory is, and how it begins."""

    model: nn.Module | str
    model_arguments: Mapping[str, Any]  # of one by name
    has_residual_norm: bool
    has_learned_gain: bool
    is_per_head: bool

    def __post_init__(self) -> None:
        value_checks.check_switches(
            mem_model_norm_add_residual=self.has_residual_norm, per_head_learned_parameters=self.is_per_head
        )
        if self.has_learned_gain and not self.has_residual_norm:
            raise ValueError(
                "learned_norm_gain needs mem_model_norm_add_residual=True, got mem_model_norm_add_residual=False"
            )
        if not isinstance(self.model, (nn.Module, str)):
            raise TypeError(f"model must be an nn.Module or a name, got {type(self.model).__name__}")


@dataclass(frozen=True)
class ShardOptions:
    """Where a memory restarts, and which keys its queries are projected on."""

    shard: int | None  # tokens after which the memory is its start again
    key_span: SpanKind | None

    def check(self, projections: ProjectionOptions, layout: Layout, has_residual: bool) -> None:
        """Whole chunks and batches in a shard, which begins as a stream does."""
        value_checks.check_whole(shard=self.shard)
        value_checks.check_choice("qk_projection", self.key_span, (None, *get_args(SpanKind)))
        if self.shard is None and self.key_span == "shard":
            raise ValueError("qk_projection='shard' needs a shard, got shard=None")
        if self.shard is None:
            return
        for what, size in (("read", layout.retrieve_chunk), ("store", layout.store_chunk), ("batch", layout.batch)):
            if size is not None and self.shard % size:
                name = "batch size" if what == "batch" else f"chunk size to {what}"
                raise ValueError(f"shard must be a multiple of the {name} ({size}), got {self.shard}")
        if self.shard < (lookback := (projections.conv_size or 1) - 1):
            raise ValueError(f"shard must be at least conv_size - 1 ({lookback}), got {self.shard}")
        value_checks.check_exclusive(shard=True, accept_weight_residual=has_residual)


@dataclass(frozen=True)
class RenewalOptions:
    """What happens where the base is renewed."""

    is_gated: bool
    max_weight_growth: float | None
    keeps_lengths: bool

    def __post_init__(self) -> None:
        value_checks.check_switches(gated_transition=self.is_gated, keep_lengths=self.keeps_lengths)
        value_checks.check_positive(max_weight_growth=self.max_weight_growth)
        if self.max_weight_growth is not None and self.max_weight_growth < 1:
            raise ValueError(
                f"max_weight_growth must be at least 1 (times the initial memory), got {self.max_weight_growth}"
            )


def model_arguments(model: nn.Module | str | None, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The arguments of the memory model, where it is made here."""
    if given is not None and not isinstance(model, nn.Module):
        return given
    return DEFAULT_MODEL if model in (None, "mlp") else {}


def layout_of(
    chunk_size: int | tuple[int, int], batch_size: int | None, attn_pool_chunks: bool, applies_first: bool
) -> Layout:
    """How time is cut, in whole chunks, and what the token reads that completes one."""
    value_checks.check_switches(apply_then_update=applies_first)
    retrieve_chunk, store_chunk = value_checks.check_chunk_size(chunk_size)
    value_checks.check_whole(batch_size=batch_size)
    value_checks.check_multiple("batch_size", batch_size, store_chunk)
    if attn_pool_chunks and store_chunk == 1:
        raise ValueError("attn_pool_chunks needs a store chunk size of at least 2 tokens, got 1")
    return Layout(retrieve_chunk, store_chunk, batch_size, 0 if applies_first else 1)


def loss_of(store_memory_loss_fn: LossFn, summed_loss: bool, loss: str | None) -> LossFn:
    """The key-value loss, however it was asked for."""
    is_given = store_memory_loss_fn is not mean_squared_error
    value_checks.check_switches(summed_loss=summed_loss)
    value_checks.check_callable(store_memory_loss_fn=store_memory_loss_fn)
    value_checks.check_exclusive(summed_loss=summed_loss, store_memory_loss_fn=is_given)
    if loss is None:
        return summed_squared_error if summed_loss else store_memory_loss_fn
    value_checks.check_exclusive(loss=True, summed_loss=summed_loss)
    value_checks.check_exclusive(loss=True, store_memory_loss_fn=is_given)
    return loss_by_name(loss)


def check_scan(use_accelerated_scan: bool) -> None:
    """The kernel is there, if it is asked for."""
    value_checks.check_switches(use_accelerated_scan=use_accelerated_scan)
    if not use_accelerated_scan:
        return
    has_package = importlib.util.find_spec("accelerated_scan") is not None
    if not (has_package and torch.cuda.is_available()):
        raise ValueError(
            "use_accelerated_scan needs a CUDA device and the package accelerated-scan, "
            f"got CUDA {'available' if torch.cuda.is_available() else 'not available'} "
            f"and the package {'installed' if has_package else 'not installed'}"
        )


def without_effect(rule: RuleOptions, layout: Layout, renewal: RenewalOptions, looks_ahead: bool) -> Iterator[str]:
    """What the published package accepts and ignores."""
    if rule.momentum_order > 1 and not rule.momentum:
        yield f"momentum_order={rule.momentum_order} has no effect with momentum=False"
    if rule.learned_combine_include_zeroth and not rule.learned_momentum_combine:
        yield "learned_combine_include_zeroth=True has no effect with learned_momentum_combine=False"
    for name, is_on in (("gated_transition", renewal.is_gated), ("keep_lengths", renewal.keeps_lengths)):
        if is_on and layout.batch is None:
            yield f"{name}=True has no effect with batch_size=None (unless a call sets ttt_batch_size)"
    if looks_ahead and layout.store_chunk == 1:
        yield (
            "store_with_lookahead_value=True stores nothing with a store chunk size of 1, as no token has a next one "
            "in its chunk: the memory only forgets"
        )
