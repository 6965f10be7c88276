"""A memory's parts: its layers, the network that it is, what it begins with, and what states it accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import LossFn, Weights
from titans_pytorch.fast_weights.norms import lengths_of, total_norm
from titans_pytorch.fast_weights.precision import at_least_float32
from titans_pytorch.fast_weights.probe import can_be_looked_at, check_contents, inspect_model, learns_from
from titans_pytorch.fast_weights.renewal import Renewal
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.ways import EngineName
from titans_pytorch.initialization import reset_parameters, write
from titans_pytorch.memory.capacity import Capacity
from titans_pytorch.memory.convolution import Tails
from titans_pytorch.memory.costs import Representation, Sizes
from titans_pytorch.memory.key_span import KeySpan, Told
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.options import GateOptions, ModelOptions, ProjectionOptions, RenewalOptions, ShardOptions
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory.recent import check_recent, fresh_recent
from titans_pytorch.memory.state import AnyState, NeuralMemState, Updates, restarted
from titans_pytorch.memory_models import NORM_GAIN, LayerwiseMemory, ResidualNorm, memory_model_by_name
from titans_pytorch.ragged.state import RaggedState

TRANSITION = -5.0
"""What the logit of going to new weights starts with, where a base is renewed"""


class MemoryOptions(NamedTuple):
    """All that a memory is made of, sorted by who reads it."""

    projections: ProjectionOptions
    gates: GateOptions
    model: ModelOptions
    rule: Rule
    loss_fn: LossFn
    renewal: RenewalOptions
    sharding: ShardOptions
    capacity: Capacity | None
    layout: Layout
    num_views: int | None  # of the input; None: it has no axis for them
    engine: EngineName | None
    max_grad_norm: float | None
    use_accelerated_scan: bool


def form_of(options: ModelOptions, width: int) -> nn.Module:
    """The network that a memory is; its weights here do not count."""
    if isinstance(options.model, str):
        form = memory_model_by_name(options.model, width, options.model_arguments)
    else:
        form = deepcopy(options.model)
    check_contents(form)
    if isinstance(form, LayerwiseMemory) and options.has_residual_norm:
        raise ValueError(
            "a layerwise memory needs mem_model_norm_add_residual=False, got mem_model_norm_add_residual=True"
        )
    form = ResidualNorm(width, form) if options.has_residual_norm else form
    return form.requires_grad_(False)


def fast_parameters(form: nn.Module, has_learned_gain: bool) -> dict[str, nn.Parameter]:
    """The parameters of the memory model that storing changes."""
    return {name: p for name, p in form.named_parameters() if not (has_learned_gain and name == NORM_GAIN)}


def check_renewed(rule: Rule, layout: Layout, argument: str) -> None:
    """A rule that forgets before it is surprised needs the memory of every chunk's start."""
    if rule.forgets_first and layout.batch != layout.store_chunk:
        raise ValueError(
            f"{argument} must be the store chunk size ({layout.store_chunk}) with a rule that is surprised after "
            f"forgetting, got {layout.batch} with {type(rule).__name__}"
        )


class MemoryCore(Projections):
    """The parameters and parts of a `NeuralMemory`, before anything is stored or read."""

    is_known_to_learn = False  # whether the memory that it begins with has been looked at
    _given: tuple[nn.Module | None, bool] = (None, False)  # the model of the user's, and whether a norm is around it

    def __init__(self, options: MemoryOptions) -> None:
        width, model = options.projections.dim_head, options.model
        form = form_of(model, width)
        traits, fast = inspect_model(form, width, options.loss_fn), fast_parameters(form, model.has_learned_gain)
        super().__init__(options.projections, options.gates, options.rule, fast, traits.mixes_tokens)
        self.writes_are_on = True  # see `memory.writes`
        self.dim, self.num_views, self.layout = options.projections.dim, options.num_views, options.layout
        check_renewed(options.rule, self.layout, "batch_size")
        if options.rule.window > 1 and options.gates.accept_weight_residual:
            raise ValueError(
                "window must be 1 with accept_weight_residual=True, where every chunk is surprised at another memory, "
                f"got {options.rule.window}"
            )
        self.sharding = options.sharding
        self.sharding.check(options.projections, self.layout, options.gates.accept_weight_residual)
        self.has_learned_gain, self.max_weight_growth = model.has_learned_gain, options.renewal.max_weight_growth
        self.keeps_lengths, self.capacity = options.renewal.keeps_lengths, options.capacity
        if self.capacity is not None:
            excluded = (self.sharding.shard is not None, self.keeps_lengths, options.gates.accept_weight_residual)
            self.capacity.check(form, options.rule, self.layout, *excluded)

        # The model is only a form: its weights are lent by the memory while it runs, so it is no submodule.
        self.loss_fn = options.loss_fn
        given = None if isinstance(model.model, str) else model.model  # one by name is made by the library
        self._form, self._given = (form,), (given, model.has_residual_norm)
        heads_axis = (self.heads,) if model.is_per_head else ()
        initial = [p.detach().expand((*heads_axis, *p.shape)).clone() for p in fast.values()]
        self.memory_model_parameters = nn.ParameterList(initial)
        self.transition_gate = nn.Parameter(torch.tensor(TRANSITION)) if options.renewal.is_gated else None
        self.evolution = Engine(
            options.engine,
            form,
            traits,
            options.loss_fn,
            options.rule,
            options.max_grad_norm,
            options.use_accelerated_scan,
        )

    def reset_parameters(self) -> None:
        """Only what it owns itself: the memory that it begins with, a transition gate and the gain of a norm."""
        self.begin_form()
        for parameter, form in zip(self.memory_model_parameters, self.fast_forms().values(), strict=True):
            write(parameter, form.detach().expand(parameter.shape))
        if self.transition_gate is not None:
            nn.init.constant_(self.transition_gate, TRANSITION)
        if self.memory_norm_gamma is not None:
            nn.init.zeros_(self.memory_norm_gamma)

    @torch.no_grad()
    def begin_form(self) -> None:
        """A model of the user's begins as it was given, or, if it was on the meta device, as it says itself."""
        form, (given, is_wrapped) = self.memory_model, self._given
        if any(p.is_meta for p in form.parameters()):  # left there, where weights were assigned
            form.to_empty(device=self.memory_model_parameters[0].device)
        if given is None or any(p.is_meta for p in given.parameters()):
            reset_parameters(form)
            return
        if is_wrapped:
            reset_parameters(form.get_submodule("norm"))
            form = form.get_submodule("model")
        for own, parameter in zip(form.parameters(), given.parameters(), strict=True):
            own.copy_(parameter)

    # ---- the memory model and its weights

    @property
    def memory_model(self) -> nn.Module:
        """The form of the memory; what it starts with is in `memory_model_parameters`."""
        return self._form[0]

    @property
    def engine(self) -> EngineName:
        """How the weights evolve: factored (never built), dense or general."""
        return self.evolution.name

    def compile_loop(self) -> None:
        """Run renewals of the base by a step that `torch.compile` compiles, for each form of its tensors once."""
        if not self.sizes.has_loop:
            raise ValueError(
                "compile_loop needs a memory whose renewals go through a loop: an MLP with a rule of shared gates, "
                f"without max_grad_norm; got engine {self.engine!r} with other options"
            )
        self.evolution.compile_loop()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters, and so of inputs."""
        return self.memory_model_parameters[0].dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of weights and gates while they are in use: at least float32."""
        return at_least_float32(self.dtype)

    def fast_forms(self) -> dict[str, nn.Parameter]:
        """The parameters of the memory model that storing changes; their values here do not matter."""
        return fast_parameters(self.memory_model, self.has_learned_gain)

    def initial_weights(self) -> Weights:
        """The learned memory of each head.  name -> (h ...)"""
        forms = self.fast_forms()
        has_heads = self.memory_model_parameters[0].ndim > next(iter(forms.values())).ndim
        return {
            name: self.rule.begun((p if has_heads else p.expand((self.heads, *form.shape))).to(self.weight_dtype))
            for (name, form), p in zip(forms.items(), self.memory_model_parameters, strict=True)
        }

    def init_weights(self, batch: int, num_seen: int = 0) -> Weights:
        """What a memory that has stored nothing consists of, after so many tokens.  name -> (b·h ...)"""
        value_checks.check_whole(batch=batch)
        weights = self.initial_weights()
        if self.capacity is not None:
            weights = self.capacity.of(weights, self.memory_model, num_seen)
        return {name: w.repeat(batch, *[1] * (w.ndim - 1)) for name, w in weights.items()}

    def init_momentum(self, batch: int) -> Weights:
        """The momenta of a memory that has seen nothing.  name -> (o b·h ...); empty without momentum"""
        weights = self.init_weights(batch)
        if self.rule.num_momenta == 0:
            return {}
        return {name: w.new_zeros(()).expand(self.rule.num_momenta, *w.shape) for name, w in weights.items()}

    def init_state(self, batch: int, num_seen: int = 0) -> NeuralMemState:
        """A memory that has seen nothing.  num_seen: tokens before, which open its capacity, though it knows nothing"""
        self.check_can_learn()
        weights = self.init_weights(batch, num_seen)
        views = () if self.num_views is None else (2,)
        waiting = self.memory_model_parameters[0].new_zeros(*views, batch, 0, self.dim)
        updates, tails = Updates(0, 0, weights, []), self.fresh_tails(batch)
        recent = fresh_recent(self, batch, self.layout.store_chunk, next(iter(weights.values())))
        span = None if self.sharding.key_span is None else self.fresh_span(batch, tails)
        current = (weights, self.init_momentum(batch))
        return NeuralMemState(0, weights, waiting, current, updates, tails=tails, recent=recent, span=span)

    def fresh_span(self, batch: int, tails: Tails) -> KeySpan:
        """No keys yet."""
        like, d = self.memory_model_parameters[0], self.dim_head
        return KeySpan(like.new_zeros(batch * self.heads, d, d, dtype=self.weight_dtype), tails.keys)

    def told(self, tokens: StoredTokens, span: KeySpan | None, first: int) -> Told | None:
        """Tokens as what queries are projected on; None: they are not.  first: the position of the first, from 0"""
        if span is None:
            return None
        return Told(tokens, span, first, self.layout.store_chunk if self.sharding.key_span == "chunk" else None)

    def begins(self, state: NeuralMemState | None) -> bool:
        """Whether the memory of a state is its learned start."""
        return state is None or (self.sharding.shard is not None and state.num_seen % self.sharding.shard == 0)

    def reset(self, state: AnyState, rows: Tensor | None = None) -> AnyState:
        """Let some sequences of a batch forget everything, waiting tokens included, as where a new document begins.

        rows: (b) bool, None: all. Positions are common to a batch and go on, so chunks and batches keep their borders;
        in a `RaggedState` every sequence has a position of its own, and begins anew with that, too.
        """
        batch = state.batch
        if isinstance(state, RaggedState):
            return state.restart([True] * batch if rows is None else rows)
        rows = torch.ones(batch, dtype=torch.bool, device=state.waiting.device) if rows is None else rows
        tensor_checks.check_mask("rows", rows, (batch,))
        return restarted(state, self.init_state(batch, state.num_seen), rows)

    def waiting_tokens(self, state: NeuralMemState) -> StoredTokens:
        """Tokens that wait for their chunk to be complete."""
        keys, values = (state.waiting, state.waiting) if self.num_views is None else state.waiting.unbind(0)
        return StoredTokens(keys, values, state.cache_store_mask)

    def renewal(self, batch: int) -> Renewal:
        """What happens where a new batch begins: a memory's current weights become its base."""
        limit = None
        if self.max_weight_growth is not None:
            limit = (self.max_weight_growth * total_norm(self.initial_weights())).repeat(batch)
        lengths = lengths_of(self.init_weights(batch)) if self.keeps_lengths else None
        return Renewal(self.transition_gate, limit, lengths)

    @property
    def sizes(self) -> Sizes:
        """What the planner has to know of this memory."""
        forms = list(self.fast_forms().values())
        factored: Representation = (
            "channels" if any(gate.varies == "channel" for gate in self.rule.gates) else "factored"
        )
        return Sizes(
            heads=self.heads,
            writes_per_chunk=self.layout.store_chunk * self.num_kv_per_token,
            matrices=tuple((p.shape[0], p.shape[1]) for p in forms if p.ndim == 2),
            num_elements=sum(p.numel() for p in forms),
            num_channels=sum(p.shape[-1] if p.ndim else 1 for p in forms),
            representation=factored if self.engine == "factored" else "built",
            num_slots=1 + self.rule.num_momenta,
            can_fold=self.engine == "factored"
            and factored == "factored"
            and not self.rule.uses_start
            and self.rule.window == 1,
            has_loop=self.evolution.has_loop and not self.keeps_lengths,
            is_linear=self.evolution.can_solve,
            not_solved=self.why_not_solved,
        )

    @property
    def why_not_solved(self) -> str:
        """What keeps the renewals of a linear memory from being solved for: what is not linear in its weights."""
        acts = "acts at every renewal, so they run one by one"
        if self.max_weight_growth is not None:
            return f"max_weight_growth {acts}; without it (None) those of this linear memory are solved for"
        if self.keeps_lengths:
            return f"keep_lengths {acts}"
        return "" if self.transition_gate is None else f"gated_transition {acts}"

    # ---- what comes in

    def weight_shapes(self, batch: int, *chunks: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a batch's weights, or of those over chunks."""
        return {name: (batch * self.heads, *chunks, *form.shape) for name, form in self.fast_forms().items()}

    def check_input(self, seq: Tensor, store_seq: Tensor | None) -> None:
        """What is read, and what is stored instead, if it differs."""
        views = self.num_views
        tensor_checks.check_sequence("seq", seq, views=views, dim=self.dim, dtype=self.dtype)
        if store_seq is not None:
            stored_views = None if views is None else 2
            tensor_checks.check_sequence("store_seq", store_seq, views=stored_views, dim=self.dim, dtype=self.dtype)
            first = 0 if views is None else 1
            tensor_checks.check_same_tokens("store_seq", store_seq.shape[first:-1], seq.shape[first:-1])

    def checked_state(self, state: NeuralMemState, batch: int) -> NeuralMemState:
        """A state that this module, for this batch, could have returned."""
        if not isinstance(state, NeuralMemState):
            raise TypeError(f"state must be a NeuralMemState, got {type(state).__name__}")
        tensor_checks.check_batch("state", state.batch, batch)
        tensor_checks.check_stored_before("state.seq_index", state.seq_index, self.layout.store_chunk)
        shapes, orders = self.weight_shapes(batch), self.rule.num_momenta
        tensor_checks.check_weights("state.weights", state.base, shapes, self.weight_dtype)
        tensor_checks.check_weights("state.states[0]", state.current, shapes, self.weight_dtype)
        of_momenta = {name: (orders, *shape) for name, shape in shapes.items()} if orders else {}
        tensor_checks.check_weights("state.states[1]", state.momenta, of_momenta, self.weight_dtype)
        views = None if self.num_views is None else 2
        tensor_checks.check_waiting(state.waiting, views=views, dim=self.dim, chunk=self.layout.store_chunk)
        self.check_span(state.span, batch)
        for name, tail, fresh in zip(Tails._fields, state.tails, self.fresh_tails(batch), strict=True):
            tensor_checks.check_tail(f"state.tails.{name}", tail, None if fresh is None else fresh.shape)
        check_recent(state.recent, fresh_recent(self, batch, self.layout.store_chunk, next(iter(state.base.values()))))
        return state.outside_inference()

    def check_span(self, span: KeySpan | None, batch: int) -> None:
        """The keys of a span that this module could have seen."""
        expected, d = self.sharding.key_span, self.dim_head
        if (span is None) != (expected is None):
            got = "without" if span is None else "with"
            raise ValueError(f"state must be of a memory with qk_projection={expected!r}, got one {got} a span of keys")
        if span is not None and span.total.shape != (shape := (batch * self.heads, d, d)):
            raise ValueError(f"state.span.total must have the shape {shape}, got {tuple(span.total.shape)}")

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

    def check_can_learn(self) -> None:
        """Refuse a memory whose weights are all zero and so have no gradient, as storage is that nobody has set.

        It looks at values once, when a stream begins after the module was made, moved or loaded, and never while it is
        compiled or captured as a graph: an accelerator is held up once.
        """
        if torch.compiler.is_compiling() or self.is_known_to_learn:  # in this order, or a graph would depend on it
            return
        weights = list(self.memory_model_parameters)
        if not all(map(can_be_looked_at, weights)):
            return
        if not any(bool(weight.any()) for weight in weights if weight.ndim > 1) and not learns_from(
            self.memory_model, self.loss_fn, self.dim_head, self.initial_weights()
        ):
            raise ValueError(
                "memory_model_parameters must not all be zero, from where this memory has no gradient and can never "
                "learn, got zeros; a module made without storage is set by titans_pytorch.reset_parameters(module)"
            )
        self.is_known_to_learn = True

    def layout_of(self, ttt_batch_size: int | None) -> Layout:
        """How time is cut in a call that may have a batch size of its own."""
        if ttt_batch_size is None:
            return self.layout
        value_checks.check_whole(ttt_batch_size=ttt_batch_size)
        value_checks.check_multiple("ttt_batch_size", ttt_batch_size, self.layout.store_chunk)
        layout = self.layout._replace(batch=ttt_batch_size)
        check_renewed(self.rule, layout, "ttt_batch_size")
        if self.sharding.shard is not None and self.sharding.shard % ttt_batch_size:
            raise ValueError(f"ttt_batch_size must divide the shard ({self.sharding.shard}), got {ttt_batch_size}")
        return layout

    # ---- as a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryCore:
        """The form goes where the weights go, also where they left it behind on the meta device (assign=True)."""

        def to_form(t: Tensor) -> Tensor:
            return fn(torch.zeros_like(t, device="cpu") if t.is_meta and not is_on_meta else t)

        is_on_meta = self.memory_model_parameters[0].is_meta
        self.is_known_to_learn = False
        self.memory_model._apply(to_form, recurse)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Published checkpoints hold a second copy of the memory model, which does not count."""
        self.is_known_to_learn = False
        for key in [key for key in state_dict if key.startswith(f"{prefix}memory_model.")]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
