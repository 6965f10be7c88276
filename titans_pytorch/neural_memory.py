"""`NeuralMemory`: a network whose weights are trained on a sequence while it is read, and so remember it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from assoc_scan import AssocScan
from einops import rearrange
from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.fast_weights.engine import Engine, EngineName, Rules
from titans_pytorch.fast_weights.general import DenseBlock, StillBlock
from titans_pytorch.fast_weights.interface import Block, Carry, LossFn, Weights
from titans_pytorch.fast_weights.probe import check_contents, inspect_model
from titans_pytorch.fast_weights.renewal import renewed, total_norm
from titans_pytorch.losses import mean_squared_error
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.options import MemoryOptions
from titans_pytorch.memory.paper import paper_options
from titans_pytorch.memory.projections import NORM_GAIN, Projections, StoredTokens
from titans_pytorch.memory.reading import Reader
from titans_pytorch.memory.schedule import BlockPlan, Layout
from titans_pytorch.memory.state import (
    NeuralMemState,
    ReadingGroup,
    Updates,
    mem_state_detach,
    outside_inference,
    restarted,
)
from titans_pytorch.memory.streaming import Stored, Stream, Surprise
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.pretrained import Pretrained

__all__ = ["AssocScan", "NeuralMemState", "NeuralMemory", "mem_state_detach"]

DEFAULT_MODEL = {"depth": 2, "expansion_factor": 4.0}


def fast_parameters(model: nn.Module, has_learned_gain: bool) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not (has_learned_gain and name == NORM_GAIN)}


class NeuralMemory(Pretrained, Projections):
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
        dim_head, heads: every head is a memory of its own, `dim_head` wide (default dim)
        model: the memory, any module (... n dim_head) -> (... n dim_head) without buffers; default `MemoryMLP`
        store_memory_loss_fn: (prediction, value), both (... d) -> loss of each token (...); default mean squared error
        adaptive_step_transform: raw step -> step, elementwise; default sigmoid(step) * default_step_transform_max_lr
        per_parameter_lr_modulation: scale every parameter's surprise by a gate, up to max_mem_layer_modulation
        per_head_learned_parameters: every head has an initial memory of its own
        attn_pool_chunks: gates see an attention pool of the chunk, not its mean
        momentum, momentum_order: chained moving averages of surprises
        learned_momentum_combine: step by a learned mix of the orders, the surprise itself too if include_zeroth
        num_kv_per_token: writes of one token
        qkv_receives_diff_views: the input has a leading axis of three, seen by queries, keys and values
        pre_rmsnorm, post_rmsnorm, qk_rmsnorm: norms of the input, of what is read, of queries and keys
        max_grad_norm: smooth limit of the norm of each chunk's gradient of each parameter
        use_accelerated_scan: scan with the CUDA kernel of accelerated-scan, where an engine scans
        activation: of queries, keys and values
        init_adaptive_step_bias, init_momentum_bias, init_decay_bias: start these gates at a constant
        accept_weight_residual: surprises are taken at base + mix * weights of the previous memory layer
        spectral_norm_surprises: orthogonalise steps by Newton-Schulz iterations
        gated_transition: where the base is renewed, go only a learned part of the way from the old base
        mem_model_norm_add_residual: use the model as LayerNorm(model(x)) + x
        store_with_lookahead_value: pair keys with the values of the next token
        default_model_kwargs: of the default model
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
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int | tuple[int, int] = 1,
        batch_size: int | None = None,
        dim_head: int | None = None,
        heads: int = 1,
        model: nn.Module | None = None,
        store_memory_loss_fn: LossFn = mean_squared_error,
        adaptive_step_transform: Callable[[Tensor], Tensor] | None = None,
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
    ) -> None:
        given = {name: value for name, value in locals().items() if name in MemoryOptions.names()}
        options = MemoryOptions(**given)
        chunks, width = options.chunks, options.head_width
        form = MemoryMLP(width, **(default_model_kwargs or DEFAULT_MODEL)) if model is None else deepcopy(model)
        check_contents(form)
        form = ResidualNorm(width, form) if mem_model_norm_add_residual else form
        traits = inspect_model(form.requires_grad_(False), width, options.loss_fn)
        super().__init__(options, fast_parameters(form, learned_norm_gain), traits.mixes_tokens)
        self.dim, self.num_views = dim, 3 if qkv_receives_diff_views else None
        self.layout = Layout(*chunks, batch_size)
        self.mixes_tokens, self.max_weight_growth = traits.mixes_tokens, max_weight_growth
        self.momentum_order = options.num_orders

        # The model is only a form: its weights are lent by the memory while it runs, so it is no submodule.
        self._form = (form,)
        heads_axis = (heads,) if per_head_learned_parameters else ()
        initial = [p.detach().expand((*heads_axis, *p.shape)).clone() for p in self.fast_forms().values()]
        self.memory_model_parameters = nn.ParameterList(initial)
        self.transition_gate = nn.Parameter(torch.tensor(-5.0)) if gated_transition else None

        rules = Rules(max_grad_norm, spectral_norm_surprises, use_accelerated_scan, channelwise_decay)
        fitting: EngineName = "general" if traits.uses is None else "dense" if spectral_norm_surprises else "factored"
        self._engine = Engine(engine or fitting, form, traits, options.loss_fn, rules)

    @classmethod
    def paper(cls, dim: int, heads: int = 1, chunk_size: int | tuple[int, int] = 16, **overrides: Any) -> NeuralMemory:
        """The memory as the paper has it (`docs/paper.md`); every argument can be overridden.

        M(x) = x + LayerNorm(W_1 gelu(W_2 x)), four times as wide inside; convolution, SiLU and l2 norm of queries, keys
        and values; summed loss; gates for every parameter; surprises at the weights of every chunk's start; a normed
        and gated output. The paper does not say how anything starts: here memory is kept long, steps are small, and
        tokens are stored under the ones before them (`start_associating`).
        """
        memory = cls(**paper_options(dim, heads, chunk_size, overrides))
        memory.start_associating()
        return memory

    # ---- the memory model and its weights

    @property
    def memory_model(self) -> nn.Module:
        """The form of the memory; what it starts with is in `memory_model_parameters`."""
        return self._form[0]

    @property
    def engine(self) -> EngineName:
        return self._engine.name

    @property
    def weight_dtype(self) -> torch.dtype:
        """Weights and gates are kept in at least float32."""
        return torch.promote_types(self.memory_model_parameters[0].dtype, torch.float32)

    def fast_forms(self) -> dict[str, nn.Parameter]:
        """The parameters of the memory model that storing changes; their values here do not matter."""
        return fast_parameters(self.memory_model, self.options.learned_norm_gain)

    def initial_weights(self) -> Weights:
        """The learned memory of each head.  name -> (h ...)"""
        forms = self.fast_forms()
        has_heads = self.memory_model_parameters[0].ndim > next(iter(forms.values())).ndim
        return {
            name: (p if has_heads else p.expand((self.heads, *form.shape))).to(self.weight_dtype)
            for (name, form), p in zip(forms.items(), self.memory_model_parameters, strict=True)
        }

    def init_weights(self, batch: int) -> Weights:
        """What a memory that has seen nothing consists of.  name -> (b·h ...)"""
        value_checks.check_whole(batch=batch)
        return {name: w.repeat(batch, *[1] * (w.ndim - 1)) for name, w in self.initial_weights().items()}

    def init_momentum(self, batch: int) -> Weights:
        """name -> (o b·h ...); empty without momentum"""
        weights = self.init_weights(batch)
        if self.momentum_order == 0:
            return {}
        return {name: w.new_zeros(self.momentum_order, *w.shape) for name, w in weights.items()}

    def init_state(self, batch: int) -> NeuralMemState:
        """A memory that has seen nothing."""
        weights = self.init_weights(batch)
        views = () if self.num_views is None else (2,)
        segment = self.memory_model_parameters[0].new_zeros(*views, batch, 0, self.dim)
        states = (weights, self.init_momentum(batch))
        updates, tails = Updates(0, 0, weights, []), self.fresh_tails(batch)
        return NeuralMemState(0, weights, segment, states, updates, tails=tails)

    def reset(self, state: NeuralMemState, rows: Tensor | None = None) -> NeuralMemState:
        """Let some sequences of a batch forget everything, waiting tokens included, as where a new document begins.

        rows: (b) bool, None: all. Positions are common to a batch and go on, so chunks and batches keep their borders.
        """
        batch = state.batch
        rows = torch.ones(batch, dtype=torch.bool, device=state.cache_store_segment.device) if rows is None else rows
        tensor_checks.check_mask("rows", rows, (batch,))
        return restarted(state, self.init_state(batch), rows, self.layout.store_chunk)

    # ---- storing and reading

    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = None,
        state: NeuralMemState | None = None,
        detach_mem_state: bool = False,
        prev_weights: NeuralMemState | Mapping[str, Tensor] | None = None,
        store_mask: Tensor | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
    ) -> Any:
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

        Returns: what was read (b n dim), the state, and if asked for (loss, step size), both (b h writes)
        """
        self.check_input(seq, store_seq)
        is_token = seq.ndim == (2 if self.num_views is None else 3)
        if is_token:
            seq = seq.unsqueeze(-2)
            store_seq = None if store_seq is None else store_seq.unsqueeze(-2)
            store_mask = store_mask.unsqueeze(-1) if store_mask is not None and store_mask.ndim == 1 else store_mask
        views = (seq, seq, seq) if self.num_views is None else seq.unbind(0)
        keys, values = views[1:]
        if store_seq is not None:
            keys, values = (store_seq, store_seq) if self.num_views is None else store_seq.unbind(0)
        if store_mask is not None:
            tensor_checks.check_mask("store_mask", store_mask, views[0].shape[:2])
        is_fresh, batch = state is None, views[0].shape[0]
        state = self.init_state(batch) if state is None else self.checked_state(state, batch)
        new = StoredTokens(keys, values, store_mask)
        retrieved, state, surprise = self.proceed(views[0], new, state, prev_weights, ttt_batch_size, is_fresh)
        state = state.detach() if detach_mem_state else state
        return (retrieved, state, surprise) if return_surprises else (retrieved, state)

    def store_memories(
        self,
        seq: Tensor,
        weights: Weights | None = None,
        past_state: tuple[Weights, Weights] | None = None,
        seq_index: int = 0,
        prev_weights: NeuralMemState | Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        return_surprises: bool = True,
    ) -> Any:
        """Only store.  seq: (b n dim), with views (2 b n dim) -> updates, state, and if asked for (loss, step size)

        weights: the base; past_state: current weights and momenta; seq_index: tokens stored before, whole chunks
        """
        views = None if self.num_views is None else 2
        tensor_checks.check_sequence("seq", seq, views=views, dim=self.dim, dtype=self.memory_model_parameters[0].dtype)
        keys, values = (seq, seq) if views is None else seq.unbind(0)
        batch = keys.shape[0]
        tensor_checks.check_stored_before("seq_index", seq_index, self.layout.store_chunk)
        if mask is not None:
            tensor_checks.check_mask("mask", mask, keys.shape[:2])
        state = self.init_state(batch)._replace(seq_index=seq_index)
        if weights is not None:
            state = state._replace(weights=weights, states=(weights, state.states[1]))
        if past_state is not None:
            tensor_checks.check_past_state(past_state)
            state = state._replace(states=past_state)
        state = self.checked_state(state, batch)
        _, state, surprise = self.proceed(None, StoredTokens(keys, values, mask), state, prev_weights, None)
        return (state.updates, state, surprise) if return_surprises else (state.updates, state)

    def retrieve_memories(self, seq: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Only read.  seq: (b n dim), the first token being that of a fresh stream -> (b n dim)

        weights: one memory (b·h ...) for all tokens, or as `updates` (b·h N+1 ...) that of each chunk
        """
        tensor_checks.check_sequence("seq", seq, views=None, dim=self.dim, dtype=self.memory_model_parameters[0].dtype)
        seq = seq if seq.ndim == 3 else seq.unsqueeze(1)
        last_group = seq.shape[1] // self.layout.retrieve_chunk + 1
        form = next(iter(self.fast_forms().items()))
        weights = dict(tensor_checks.checked_trajectory("weights", weights, self.parameter_names))
        num_chunks = weights[form[0]].shape[1] - 1 if weights[form[0]].ndim == form[1].ndim + 2 else None
        chunks = () if num_chunks is None else (num_chunks + 1,)
        tensor_checks.check_weights("weights", weights, self.weight_shapes(seq.shape[0], *chunks), self.weight_dtype)
        weights = {name: outside_inference(weight) for name, weight in weights.items()}
        block: Block = StillBlock(Carry(weights, weights, {}))
        if num_chunks is not None:
            tensor_checks.check_enough_chunks(num_chunks, self.layout.weight_index(last_group - 1))
            block = DenseBlock({}, weights, {})
        reader = Reader(self, self._engine, self.layout, self.mixes_tokens, 1, ReadingGroup(None, None), None)
        reader.begin(seq, 0, last_group, self.weight_dtype)
        reader.read(block, BlockPlan(0, num_chunks or 0, 0, last_group, False))
        return reader.finish()[0]

    def proceed(
        self,
        seq: Tensor | None,
        new: StoredTokens,
        state: NeuralMemState,
        prev_weights: NeuralMemState | Mapping[str, Tensor] | None,
        ttt_batch_size: int | None,
        is_fresh: bool = False,
    ) -> tuple[Tensor | None, NeuralMemState, tuple[Tensor, Tensor]]:
        """Go on from a state.  seq: (b n dim), what is read; None: only store"""
        segment, chunk = state.cache_store_segment, self.layout.store_chunk
        keys, values = (segment, segment) if self.num_views is None else segment.unbind(0)
        stored = Stored(StoredTokens(keys, values, state.cache_store_mask), new)
        num_chunks, first_chunk = stored.num_tokens // chunk, state.seq_index // chunk
        residual = self.checked_residual(prev_weights, first_chunk, num_chunks, state.batch)
        layout = self.layout
        if ttt_batch_size is not None:
            value_checks.check_whole(ttt_batch_size=ttt_batch_size)
            value_checks.check_multiple("ttt_batch_size", ttt_batch_size, chunk)
            layout = layout._replace(batch=ttt_batch_size)
        stream = Stream(
            self, self._engine, layout, self.renew, self.mixes_tokens, residual, state.num_seen + 1, first_chunk
        )
        moved = {} if is_fresh else {name: m.unbind(0) for name, m in state.states[1].items()}
        outcome = stream.run(Carry(state.weights, state.states[0], moved), state.group, state.tails, seq, stored)
        base, weights, orders = outcome.carry
        has_moved = num_chunks > 0 and orders
        momenta = {name: torch.stack(order) for name, order in orders.items()} if has_moved else state.states[1]
        rest = stored.select(num_chunks * chunk, stored.num_tokens)
        segment = rest.keys.clone() if self.num_views is None else torch.stack((rest.keys, rest.values))
        updates = Updates(first_chunk, num_chunks, weights, outcome.blocks, outcome.replay)
        next_index, states = state.seq_index + num_chunks * chunk, (weights, momenta)
        more = (updates, rest.is_stored, outcome.group, outcome.tails)
        state = NeuralMemState(next_index, base, segment, states, *more)
        return outcome.reads, state, self.by_head(outcome.surprises, state.batch)

    def by_head(self, surprises: list[Surprise], batch: int) -> tuple[Tensor, Tensor]:
        """Losses and rates of all writes.  (r n c) each -> (b h writes)"""
        if not surprises:
            nothing = self.memory_model_parameters[0].new_zeros(batch, self.heads, 0)
            return nothing, nothing
        loss, rates = (torch.cat(parts, dim=1) for parts in zip(*surprises, strict=True))
        merge = "(b h) n c -> b h (n c)"
        return rearrange(loss, merge, h=self.heads), rearrange(rates, merge, h=self.heads)

    def renew(self, carry: Carry) -> Carry:
        limit = None
        if self.max_weight_growth is not None:
            rows = next(iter(carry.weights.values())).shape[0]
            limit = (self.max_weight_growth * total_norm(self.initial_weights())).repeat(rows // self.heads)
        return renewed(carry, self.transition_gate, limit)

    # ---- what comes in

    def check_input(self, seq: Tensor, store_seq: Tensor | None) -> None:
        dtype, views = self.memory_model_parameters[0].dtype, self.num_views
        tensor_checks.check_sequence("seq", seq, views=views, dim=self.dim, dtype=dtype)
        if store_seq is not None:
            tensor_checks.check_sequence(
                "store_seq", store_seq, views=None if views is None else 2, dim=self.dim, dtype=dtype
            )
            first = 0 if views is None else 1
            tensor_checks.check_same_tokens("store_seq", store_seq.shape[first:-1], seq.shape[first:-1])

    def weight_shapes(self, batch: int, *chunks: int) -> dict[str, tuple[int, ...]]:
        return {name: (batch * self.heads, *chunks, *form.shape) for name, form in self.fast_forms().items()}

    def checked_state(self, state: NeuralMemState, batch: int) -> NeuralMemState:
        """A state that this module, for this batch, could have returned."""
        if not isinstance(state, NeuralMemState):
            raise TypeError(f"state must be a NeuralMemState, got {type(state).__name__}")
        tensor_checks.check_batch("state", state.batch, batch)
        tensor_checks.check_stored_before("state.seq_index", state.seq_index, self.layout.store_chunk)
        shapes = self.weight_shapes(batch)
        tensor_checks.check_weights("state.weights", state.weights, shapes, self.weight_dtype)
        tensor_checks.check_weights("state.states[0]", state.states[0], shapes, self.weight_dtype)
        orders = {name: (self.momentum_order, *shape) for name, shape in shapes.items()} if self.momentum_order else {}
        tensor_checks.check_weights("state.states[1]", state.states[1], orders, self.weight_dtype)
        views = None if self.num_views is None else 2
        tensor_checks.check_waiting(state.cache_store_segment, views=views, dim=self.dim, chunk=self.layout.store_chunk)
        for name, tail, fresh in zip(Tails._fields, state.tails, self.fresh_tails(batch), strict=True):
            tensor_checks.check_tail(f"state.tails.{name}", tail, None if fresh is None else fresh.shape)
        return state.outside_inference()

    def checked_residual(
        self, prev_weights: NeuralMemState | Mapping[str, Tensor] | None, first_chunk: int, num_chunks: int, batch: int
    ) -> Updates | None:
        """The previous layer's weights over these chunks."""
        accepts = self.to_learned_weight_residual_mix is not None
        if prev_weights is None and not accepts:
            return None
        if prev_weights is None:
            raise ValueError("prev_weights must be given to a memory with accept_weight_residual=True, got None")
        if not accepts:
            raise ValueError("prev_weights needs a memory with accept_weight_residual=True, got one with False")
        updates = prev_weights.updates if isinstance(prev_weights, NeuralMemState) else prev_weights
        if not isinstance(updates, Updates):
            updates = Updates.of(tensor_checks.checked_trajectory("prev_weights", updates, self.parameter_names))
        tensor_checks.check_weights("prev_weights", updates.last, self.weight_shapes(batch), self.weight_dtype)
        if not updates.covers(first_chunk, num_chunks):
            have = (updates.first_chunk, updates.first_chunk + updates.num_chunks)
            raise ValueError(
                f"prev_weights must cover the chunks {first_chunk} to {first_chunk + num_chunks} of this call, "
                f"got {have[0]} to {have[1]}: run the previous layer on the same tokens"
            )
        return updates

    # ---- as a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeuralMemory:
        self.memory_model._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Published checkpoints hold a second copy of the memory model, which does not count."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}memory_model.")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
