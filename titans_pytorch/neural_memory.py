"""`NeuralMemory`: a network whose weights are trained on a sequence while it is read, and so remember it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, overload

from assoc_scan import AssocScan
from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.fast_weights.interface import LossFn, Weights
from titans_pytorch.fast_weights.rules.registry import RuleOptions, rule_of
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.ways import EngineName
from titans_pytorch.losses import HuberOfTokens, mean_squared_error
from titans_pytorch.memory.call import PreviousWeights
from titans_pytorch.memory.capacity import capacity_of
from titans_pytorch.memory.core import MemoryOptions
from titans_pytorch.memory.growing import advance_growing, plan_growing
from titans_pytorch.memory.options import (
    GateOptions,
    ModelOptions,
    ProjectionOptions,
    RenewalOptions,
    ShardOptions,
    SpanKind,
    check_scan,
    layout_of,
    loss_of,
    model_arguments,
    without_effect,
)
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.plan import CallPlan
from titans_pytorch.memory.presets import PresetMemory
from titans_pytorch.memory.ragged_call import advance_ragged, check_for_each_row
from titans_pytorch.memory.results import LossAndRates
from titans_pytorch.memory.state import NeuralMemState, Updates, mem_state_detach
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.ragged import Marks, RaggedState, marks_of

__all__ = ["AssocScan", "NeuralMemState", "NeuralMemory", "mem_state_detach"]


class NeuralMemory(Pretrained, PresetMemory):
    """Learns to memorise at test time: the weights of a small network are trained on each chunk of a sequence as it
    comes, and every token reads the weights after the last complete chunk.

        memory = NeuralMemory(dim=384, chunk_size=64)
        retrieved, state = memory(torch.randn(2, 1024, 384))       # (2 1024 384)
        retrieved, state = memory(torch.randn(2, 7, 384), state=state)   # goes on at any token

    Each chunk's gradient of a key -> value loss is its surprise; momentum smooths surprises, decay forgets, and all of
    it is gated by the chunk (eq. 11-18 of arXiv 2501.00663).

    Args:
        dim: features of a token
        chunk_size: tokens that share one step; a pair (retrieve, store) for different ones when reading and storing
        batch_size: tokens after which surprises are taken at the current weights; None: always at those of the start
        dim_head: width of a head; default dim
        heads: every head is a memory of its own
        model: the memory, any module (... n dim_head) -> (... n dim_head) without buffers, or a name: mlp (default),
            linear, swiglu, gated, factorized or attention
        store_memory_loss_fn: (prediction, value), both (... d) -> loss of each token (...); default mean squared error
        adaptive_step_transform: raw step -> step, elementwise; default sigmoid(step) * default_step_transform_max_lr;
            sparse: 1.1 times the sigmoid less 0.1, 0 where that is negative, so that many tokens are not stored at all
        default_step_transform_max_lr: the largest step size, unless it is made by a transform of yours
        per_parameter_lr_modulation: scale every parameter's surprise by a gate
        max_mem_layer_modulation: what that gate is at most
        per_head_learned_parameters: every head has an initial memory of its own
        attn_pool_chunks: gates see an attention pool of the chunk, not its mean
        momentum: moving averages of surprises
        momentum_order: how many of them are chained
        learned_momentum_combine: step by a learned mix of the orders
        learned_combine_include_zeroth: the surprise itself is in that mix, too
        num_kv_per_token: writes of one token
        qkv_receives_diff_views: the input has a leading axis of three, seen by queries, keys and values
        pre_rmsnorm: norm of the input
        post_rmsnorm: norm of what is read
        qk_rmsnorm: norms of queries and keys
        max_grad_norm: smooth limit of the norm of each chunk's gradient of each parameter
        use_accelerated_scan: scan with the CUDA kernel of accelerated-scan, where an engine scans
        activation: of queries, keys and values
        init_adaptive_step_bias: start the gate of step sizes at a constant
        init_momentum_bias: start the gate of momentum at a constant
        init_decay_bias: start the gate of forgetting at a constant
        accept_weight_residual: surprises are taken at base + mix * weights of the previous memory layer
        spectral_norm_surprises: orthogonalise steps by Newton-Schulz iterations
        gated_transition: where the base is renewed, go only a learned part of the way from the old base
        mem_model_norm_add_residual: use the model as LayerNorm(model(x)) + x
        store_with_lookahead_value: pair keys with the values of the next token of their chunk
        default_model_kwargs: of the default model, or of one by name
        max_weight_growth: where the base is renewed, rescale a memory whose norm has grown to more than so many times
            that of the initial memory; None: never
        engine: how weights evolve, see `fast_weights.engine`; None: the fastest that can
        qk_l2norm: queries and keys of every head have length 1; instead of qk_rmsnorm
        conv_size: queries, keys and values pass a causal convolution over so many tokens, after their projection and
            before the activation; a token that is not stored is a zero to it
        summed_loss: the default loss is the sum over features, not the mean
        per_parameter_gates: every parameter of the memory has step sizes, momentum and forgetting of its own
        channelwise_decay: every entry along the last axis of every parameter (an output of `x @ w`) is forgotten by
            itself
        learned_norm_gain: the gain of the norm around the model is learned outside, and storing does not change it
        gated_output: what is read is normed, and every feature gated by a sigmoid of a linear map of the token, before
            heads are combined (which they then are, be there one or more)
        rule: how weights follow from surprises, by name or as a `Rule` (docs/extending.md)
        loss: the key-value loss by name, mse, sse, huber, yaad, lp, dot or cosine, instead of store_memory_loss_fn;
            huber:0.5 and lp:4 have a number of their own, yaad a threshold of every token
        window: every step follows the surprises of so many chunks: its own and, gated, those before it (Omega rule)
        key_powers: queries and keys pass a_1 x + a_2 x^2 + ... up to this power, feature by feature, before their norm;
            a is learned for every head, and starts as 1/i!
        keep_lengths: where the base is renewed, the weights of every output of a matrix are made as long again as they
            were in the initial memory
        shard: tokens after which the memory restarts from its learned start (TNT, docs/rules.md); None: never. Whole
            shards of a call are read side by side; `updates` of a state are of the shard that it is in
        qk_projection: queries are projected on the keys of their "chunk" or "shard" up to them; None: they are not
        apply_then_update: the token that completes a chunk reads what the others of it read (LaCT); False: it is the
            first to read what the chunk has taught
        capacity: (blocks, tokens): the memory begins with one of so many blocks of its hidden units, and another is
            opened after every so many tokens (Proteus); None: all are open
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int | tuple[int, int] = 1,
        batch_size: int | None = None,
        dim_head: int | None = None,
        heads: int = 1,
        model: nn.Module | str | None = None,
        store_memory_loss_fn: LossFn = mean_squared_error,
        adaptive_step_transform: Callable[[Tensor], Tensor] | str | None = None,
        default_step_transform_max_lr: float = 1.0,
        per_parameter_lr_modulation: bool = False,
        max_mem_layer_modulation: float = 1.0,
        per_head_learned_parameters: bool = True,
        attn_pool_chunks: bool = False,
        momentum: bool = True,
        momentum_order: int = 1,
        learned_momentum_combine: bool = False,
        learned_combine_include_zeroth: bool = False,
        num_kv_per_token: int = 1,
        qkv_receives_diff_views: bool = False,
        pre_rmsnorm: bool = True,
        post_rmsnorm: bool = False,
        qk_rmsnorm: bool = False,
        max_grad_norm: float | None = None,
        use_accelerated_scan: bool = False,
        activation: nn.Module | None = None,
        init_adaptive_step_bias: float | None = None,
        init_momentum_bias: float | None = None,
        init_decay_bias: float | None = None,
        accept_weight_residual: bool = False,
        spectral_norm_surprises: bool = False,
        gated_transition: bool = False,
        mem_model_norm_add_residual: bool = True,
        store_with_lookahead_value: bool = False,
        default_model_kwargs: Mapping[str, Any] | None = None,
        *,
        max_weight_growth: float | None = 10.0,
        engine: EngineName | None = None,
        qk_l2norm: bool = False,
        conv_size: int | None = None,
        summed_loss: bool = False,
        per_parameter_gates: bool = False,
        channelwise_decay: bool = False,
        learned_norm_gain: bool = False,
        gated_output: bool = False,
        rule: str | Rule = "titans",
        loss: str | None = None,
        window: int = 1,
        key_powers: int = 1,
        keep_lengths: bool = False,
        shard: int | None = None,
        qk_projection: SpanKind | None = None,
        capacity: tuple[int, int] | None = None,
        apply_then_update: bool = False,
    ) -> None:
        value_checks.check_whole(dim=dim)
        value_checks.check_positive(max_grad_norm=max_grad_norm)
        value_checks.check_switches(qkv_receives_diff_views=qkv_receives_diff_views)
        check_scan(use_accelerated_scan)
        layout = layout_of(chunk_size, batch_size, attn_pool_chunks, apply_then_update)
        projections = ProjectionOptions(
            dim=dim,
            heads=heads,
            dim_head=dim if dim_head is None else dim_head,
            num_kv_per_token=num_kv_per_token,
            activation=activation,
            conv_size=conv_size,
            pre_rmsnorm=pre_rmsnorm,
            post_rmsnorm=post_rmsnorm,
            qk_rmsnorm=qk_rmsnorm,
            qk_l2norm=qk_l2norm,
            gated_output=gated_output,
            looks_ahead=store_with_lookahead_value,
            has_learned_gain=learned_norm_gain,
            key_powers=key_powers,
        )
        loss_fn = loss_of(store_memory_loss_fn, summed_loss, loss)
        gates = GateOptions(
            attn_pool_chunks=attn_pool_chunks,
            adaptive_step_transform=adaptive_step_transform,
            default_step_transform_max_lr=default_step_transform_max_lr,
            per_parameter_lr_modulation=per_parameter_lr_modulation,
            max_mem_layer_modulation=max_mem_layer_modulation,
            accept_weight_residual=accept_weight_residual,
            has_thresholds=isinstance(loss_fn, HuberOfTokens),
        )
        rules = RuleOptions(
            momentum=momentum,
            momentum_order=momentum_order,
            learned_momentum_combine=learned_momentum_combine,
            learned_combine_include_zeroth=learned_combine_include_zeroth,
            spectral_norm_surprises=spectral_norm_surprises,
            per_parameter_gates=per_parameter_gates,
            channelwise_decay=channelwise_decay,
            init_adaptive_step_bias=init_adaptive_step_bias,
            init_momentum_bias=init_momentum_bias,
            init_decay_bias=init_decay_bias,
            window=window,
        )
        renewal = RenewalOptions(gated_transition, max_weight_growth, keep_lengths)
        models = ModelOptions(
            model="mlp" if model is None else model,
            model_arguments=model_arguments(model, default_model_kwargs),
            has_residual_norm=mem_model_norm_add_residual,
            has_learned_gain=learned_norm_gain,
            is_per_head=per_head_learned_parameters,
        )
        super().__init__(
            MemoryOptions(
                projections=projections,
                gates=gates,
                model=models,
                rule=rule_of(rule, rules, DEFAULT_RULE),
                loss_fn=loss_fn,
                renewal=renewal,
                sharding=ShardOptions(shard, qk_projection),
                capacity=capacity_of(capacity),
                layout=layout,
                num_views=3 if qkv_receives_diff_views else None,
                engine=engine,
                max_grad_norm=max_grad_norm,
                use_accelerated_scan=use_accelerated_scan,
            )
        )
        for warning in without_effect(rules, layout, renewal, store_with_lookahead_value):
            warnings.warn(warning, UserWarning, stacklevel=2)

    # ---- storing and reading

    @overload
    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = ...,
        state: NeuralMemState | None = ...,
        detach_mem_state: bool = ...,
        prev_weights: PreviousWeights = ...,
        store_mask: Tensor | None = ...,
        return_surprises: Literal[False] = ...,
        ttt_batch_size: int | None = ...,
    ) -> tuple[Tensor, NeuralMemState]: ...

    @overload
    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = ...,
        state: NeuralMemState | None = ...,
        detach_mem_state: bool = ...,
        prev_weights: PreviousWeights = ...,
        store_mask: Tensor | None = ...,
        *,
        return_surprises: Literal[True],
        ttt_batch_size: int | None = ...,
    ) -> tuple[Tensor, NeuralMemState, LossAndRates]: ...

    @overload
    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = ...,
        state: NeuralMemState | RaggedState | None = ...,
        detach_mem_state: bool = ...,
        prev_weights: None = ...,
        store_mask: Tensor | None = ...,
        return_surprises: Literal[False] = ...,
        ttt_batch_size: int | None = ...,
        *,
        attention_mask: Tensor | None = ...,
        document_ids: Tensor | None = ...,
        cu_seqlens: Tensor | None = ...,
    ) -> tuple[Tensor, NeuralMemState | RaggedState]: ...

    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = None,
        state: NeuralMemState | RaggedState | None = None,
        detach_mem_state: bool = False,
        prev_weights: PreviousWeights = None,
        store_mask: Tensor | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemState | RaggedState] | tuple[Tensor, NeuralMemState, LossAndRates]:
        """Store a piece of a sequence and read the memory at each of its tokens.

        Args:
            seq: (b n dim), or one token (b dim); with views (3 b n dim)
            store_seq: what is stored instead of seq, position by position; with views (2 b n dim), for keys and values
            state: what the call before returned; None: nothing has been seen
            detach_mem_state: return the state cut from the graph
            prev_weights: `updates` (or the state) of the previous memory layer for the same tokens
            store_mask: (b n) bool, False for tokens that leave no trace in the memory
            return_surprises: also return the unweighted loss and the step size of every write
            ttt_batch_size: instead of batch_size, for this call
            attention_mask: (b n), False or 0 for padding, which is not even read: positions, chunks and convolutions
                count real tokens only (with store_mask they count all), and outputs there are 0
            document_ids: (b n), another document begins where the number changes, and is read as if it were alone
            cu_seqlens: (k + 1), the borders between documents of a single row, from 0 to n

        Returns: what was read (b n dim), the state (a `RaggedState` where rows differ in length), and if asked for
        (loss, step size), both (b h writes)
        """
        self.check_input(seq, store_seq)
        if seq.ndim == (2 if self.num_views is None else 3):  # one token
            seq = seq.unsqueeze(-2)
            store_seq = None if store_seq is None else store_seq.unsqueeze(-2)
            store_mask = store_mask.unsqueeze(-1) if store_mask is not None and store_mask.ndim == 1 else store_mask
        queries, keys, values = (seq, seq, seq) if self.num_views is None else seq.unbind(0)
        if store_seq is not None:
            keys, values = (store_seq, store_seq) if self.num_views is None else store_seq.unbind(0)
        if store_mask is not None:
            tensor_checks.check_mask("store_mask", store_mask, queries.shape[:2])
        new, layout = StoredTokens(keys, values, store_mask), self.layout_of(ttt_batch_size)
        marks = marks_of(attention_mask, document_ids, cu_seqlens, queries.shape[:2])
        if marks is not None or isinstance(state, RaggedState):
            check_for_each_row(prev_weights=prev_weights is not None, return_surprises=return_surprises)
            found, after = advance_ragged(self, queries, new, marks or Marks(None, None), state, layout)
            return found, after.detach() if detach_mem_state else after
        retrieved, state, surprises = advance_growing(self, queries, new, state, prev_weights, layout)
        retrieved = cast(Tensor, retrieved)  # something was read
        state = state.detach() if detach_mem_state else state
        return (retrieved, state, surprises) if return_surprises else (retrieved, state)

    def store_memories(
        self,
        seq: Tensor,
        weights: Weights | None = None,
        past_state: tuple[Weights, Weights] | None = None,
        seq_index: int = 0,
        prev_weights: PreviousWeights = None,
        mask: Tensor | None = None,
        return_surprises: bool = True,
    ) -> tuple[Updates, NeuralMemState] | tuple[Updates, NeuralMemState, LossAndRates]:
        """Only store.  seq: (b n dim), with views (2 b n dim) -> updates, state, and if asked for (loss, step size)

        Args:
            weights: the base
            past_state: current weights and momenta
            seq_index: tokens stored before, whole chunks
            prev_weights: of the memory before this one, with accept_weight_residual
            mask: (b n) bool, which tokens are stored
            return_surprises: return loss and step size of each token, too
        """
        views = None if self.num_views is None else 2
        tensor_checks.check_sequence("seq", seq, views=views, dim=self.dim, dtype=self.dtype)
        keys, values = (seq, seq) if views is None else seq.unbind(0)
        tensor_checks.check_stored_before("seq_index", seq_index, self.layout.store_chunk)
        if mask is not None:
            tensor_checks.check_mask("mask", mask, keys.shape[:2])
        state = self.init_state(keys.shape[0])._replace(seq_index=seq_index)
        if weights is not None:
            state = state._replace(weights=weights, states=(weights, state.momenta))
        if past_state is not None:
            tensor_checks.check_past_state(past_state)
            state = state._replace(states=past_state)
        new = StoredTokens(keys, values, mask)
        _, state, surprises = advance_growing(self, None, new, state, prev_weights, self.layout)
        return (state.updates, state, surprises) if return_surprises else (state.updates, state)

    def plan(self, batch: int, num_tokens: int, state: NeuralMemState | None = None) -> CallPlan:
        """How a call with so many tokens will be run; `explain()` says it in words."""
        num_seen, first_chunk = (
            (0, 0) if state is None else (state.num_seen, state.seq_index // self.layout.store_chunk)
        )
        return plan_growing(self, self.layout, batch, num_seen + self.layout.first, num_tokens, first_chunk)


def _default_of(name: str) -> Any:
    """What an argument of `NeuralMemory` is if it is not given."""
    return inspect.signature(NeuralMemory.__init__).parameters[name].default


DEFAULT_RULE = RuleOptions(**{name: _default_of(name) for name in RuleOptions.__dataclass_fields__})
