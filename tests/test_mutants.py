"""The suite objects: each rule of the library is broken on purpose, and a few comparisons with the oracle notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.configurations import DIM_HEAD, OPTIONS, Case
from tests.test_exactness import check
from titans_pytorch import convolution, losses, neural_memory, options, projections, streaming
from titans_pytorch import gates as gates_module
from titans_pytorch.fast_weights import engine as engine_module
from titans_pytorch.fast_weights import general, limits, recurrence, scaled_sum, schedule, single, spectral, taps
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.recurrence import Gates
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.projections import MultiheadRMSNorm, Projections
from titans_pytorch.reading import Reader

PLAIN = {name: values[0] for name, values in OPTIONS.items() if name not in ("mask", "store_seq", "batches")} | {
    "dim": 4,
    "dim_head": DIM_HEAD,
    "chunk_size": 2,
    "batch_size": None,
    "default_step_transform_max_lr": 0.4,
    "default_model_kwargs": dict(depth=2, expansion_factor=1.5),
}
RICH = PLAIN | {
    "dim": 6,
    "heads": 2,
    "chunk_size": 3,
    "batch_size": 6,
    "momentum_order": 2,
    "learned_momentum_combine": True,
    "learned_combine_include_zeroth": True,
    "per_parameter_lr_modulation": True,
    "attn_pool_chunks": True,
    "num_kv_per_token": 2,
    "post_rmsnorm": True,
    "qk_rmsnorm": True,
    "max_grad_norm": 0.5,
    "accept_weight_residual": True,
    "gated_transition": True,
    "max_weight_growth": 1.02,
}

PAPER = PLAIN | {
    "dim": 6,
    "heads": 2,
    "chunk_size": 3,
    "batch_size": 6,
    "activation": "SiLU",
    "qk_l2norm": True,
    "conv_size": 4,
    "summed_loss": True,
    "per_parameter_gates": True,
    "channelwise_decay": True,
    "learned_norm_gain": True,
    "gated_output": True,
    "default_step_transform_max_lr": 0.1,
}


def case(
    chosen: dict[str, Any],
    split: tuple[int, ...] = (5, 1, 7),
    engine: str = "factored",
    mask: bool = False,
    store: bool = False,
    seed: int = 3,
) -> Case:
    return Case(chosen, 2, sum(split), split, seed, mask, store, engine)


CASES = {
    "plain": case(PLAIN | {"batch_size": 4}),
    "rich": case(RICH, mask=True, seed=4),
    "lookahead and views": case(
        PLAIN | {"store_with_lookahead_value": True, "qkv_receives_diff_views": True, "chunk_size": 4}, store=True
    ),
    "grown": case(PLAIN | {"batch_size": 4, "max_weight_growth": 1.02, "default_step_transform_max_lr": 4.0}),
    "read apart": case(PLAIN | {"chunk_size": (3, 2), "momentum": False}),
    "attention": case(PLAIN | {"model": "attention", "chunk_size": 4}, mask=True, seed=4),
    "spectral": case(PLAIN | {"spectral_norm_surprises": True, "batch_size": 4}, engine="dense"),
    "general": case(PLAIN | {"model": "opaque", "accept_weight_residual": True}, engine="general", mask=True, seed=4),
    "paper": case(PAPER, mask=True),
    "paper, one chunk a batch": case(PAPER | {"batch_size": 3}),
    "paper, dense": case(PAPER, engine="dense"),
    "paper, square": case(
        PAPER | {"batch_size": 3, "default_model_kwargs": dict(depth=1), "per_parameter_gates": False}
    ),
    "paper, general": case(PAPER, engine="general"),
    "paper, mixing tokens": case(PAPER | {"model": "attention", "learned_norm_gain": False}),
    "gates of parameters": case(PAPER | {"channelwise_decay": False, "momentum_order": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_library_as_it_is_passes(name: str) -> None:
    check(CASES[name])


Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[Patch, tuple[str, ...]]] = {}


def mutant(*names: str) -> Callable[[Patch], Patch]:
    """A way to break the library, and the cases of which at least one has to notice."""

    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__.replace("_", " ")] = (patch, names)
        return patch

    return register


def wrapped(patcher: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """`owner.name` becomes change(original, ...)."""
    original = getattr(owner, name)
    patcher.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def gates_become(patcher: pytest.MonkeyPatch, change: Callable[[Gates], Gates]) -> None:
    wrapped(patcher, Projections, "gates", lambda original, *args: tuple(map(change, original(*args))))


def writes_become(patcher: pytest.MonkeyPatch, **changes: Callable[[Any], Any]) -> None:
    def change(original: Any, *args: Any) -> Any:
        projected = original(*args)
        new = {name: value(getattr(projected.writes, name)) for name, value in changes.items()}
        return projected._replace(writes=projected.writes._replace(**new))

    wrapped(patcher, Projections, "project_writes", change)


def complement(log_gate: Tensor) -> Tensor:
    return torch.log1p(-log_gate.exp())


# surprise


@mutant("plain", "general")
def climbs_instead_of_descending(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, engine_module, "steps_of", lambda original, found, *args: negated(original(found, *args)))


def negated(surprises: taps.Surprises) -> taps.Surprises:
    factors = {name: taps.Factors(-f.left, f.right) for name, f in surprises.factors.items()}
    return taps.Surprises(factors, {name: -t for name, t in surprises.tensors.items()})


@mutant("plain")
def left_and_right_factors_swap(patcher: pytest.MonkeyPatch) -> None:
    """Of square matrices, which shapes cannot tell apart."""

    def swapped(f: taps.Factors) -> taps.Factors:
        return taps.Factors(f.right, f.left) if f.left.shape == f.right.shape else taps.Factors(f.left * 1.01, f.right)

    wrapped(
        patcher,
        engine_module,
        "steps_of",
        lambda original, found, *args: original(
            found._replace(factors={n: swapped(f) for n, f in found.factors.items()}), *args
        ),
    )


@mutant("plain", "general")
def vectors_are_not_surprised(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        engine_module,
        "steps_of",
        lambda original, found, *args: original(
            found._replace(tensors={n: t * 0 for n, t in found.tensors.items()}), *args
        ),
    )


@mutant("plain")
def rates_are_ignored(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=lambda rates: tuple(torch.full_like(rate, 0.2) for rate in rates))


@mutant("plain")
def keys_are_values(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "project_writes",
        lambda original, *args: (lambda p: p._replace(writes=p.writes._replace(values=p.writes.keys)))(original(*args)),
    )


@mutant("rich")
def writes_of_a_token_trade_values(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, values=lambda v: v.unflatten(2, (-1, 2)).flip(3).flatten(2, 3))


@mutant("rich")
def the_norm_of_gradients_is_not_limited(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(engine_module, "smooth_limit", lambda norm, limit: torch.ones_like(norm))


@mutant("rich")
def gradients_are_clipped_hard(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(engine_module, "smooth_limit", lambda norm, limit: (limit / norm.clamp(min=1e-9)).clamp(max=1.0))


@mutant("rich")
def modulation_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, modulation=lambda shares: {})


@mutant("rich")
def modulation_is_assigned_in_reverse(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, modulation=lambda shares: dict(zip(shares, reversed(shares.values()), strict=True)))


@mutant("rich", "general")
def the_residual_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher, Engine, "store", lambda original, self, carry, writes, residual=None: original(self, carry, writes)
    )


@mutant("rich", "general")
def the_residual_is_not_mixed(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, mix=lambda mix: None if mix is None else torch.ones_like(mix))


@mutant("lookahead and views")
def the_last_key_is_not_dropped(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, *args: Any) -> Any:
        self.looks_ahead = False
        return original(self, *args)

    wrapped(patcher, Projections, "project_writes", change)


# gates


@mutant("plain", "spectral")
def decay_is_its_complement(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_keep=complement(gates.log_keep)))


@mutant("plain", "read apart")
def nothing_is_forgotten(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_keep=gates.log_keep * 0))


@mutant("plain")
def momentum_is_its_complement(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_momentum=complement(gates.log_momentum)))


@mutant("plain", "general")
def momentum_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_momentum=gates.log_momentum - 50))


@mutant("rich")
def orders_of_momentum_trade_gates(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_momentum=gates.log_momentum.flip(0)))


@mutant("rich")
def orders_are_combined_equally(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(combine=torch.full_like(gates.combine, 1 / len(gates.combine))))


@mutant("rich")
def the_zeroth_order_comes_last(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(combine=gates.combine.roll(1, 0)))


@mutant("plain")
def gates_belong_to_the_next_chunk(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_keep=gates.log_keep.roll(-1, -1)))


@mutant("plain", "general")
def products_of_gates_include_their_own(patcher: pytest.MonkeyPatch) -> None:
    """prod_{k=i..j} in place of prod_{k=i+1..j}"""

    def change(original: Any, log_gates: Tensor) -> Tensor:
        first = torch.nn.functional.pad(log_gates, (1, 0)).exp()
        return original(log_gates) * first.unsqueeze(-2)

    for module in (recurrence, general):
        if hasattr(module, "products"):
            wrapped(patcher, module, "products", change)


@mutant("plain")
def the_gates_triangle_is_upside_down(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, recurrence, "products", lambda original, log_gates: original(log_gates).mT)


@mutant("rich")
def gates_see_the_mean_not_the_pool(patcher: pytest.MonkeyPatch) -> None:
    mean = gates_module.AveragePool()
    patcher.setattr(gates_module.AttentionPool, "forward", lambda self, *args: mean(*args))


@mutant("rich", "attention", "general")
def the_pool_sees_masked_tokens(patcher: pytest.MonkeyPatch) -> None:
    for pool in (gates_module.AveragePool, gates_module.AttentionPool):
        wrapped(patcher, pool, "forward", lambda original, self, x, is_stored=None: original(self, x))


# the options of the paper

PAPER_CASES = ("paper", "paper, one chunk a batch", "paper, dense", "paper, general")


def convolutions_become(patcher: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    wrapped(patcher, convolution.CausalConvolution, "forward", change)


@mutant(*PAPER_CASES)
def convolutions_are_shifted_by_one(patcher: pytest.MonkeyPatch) -> None:
    """Every token sees the one before it as if it were itself."""

    def change(original: Any, self: Any, x: Tensor, tail: Tensor) -> Any:
        late = torch.cat((tail[:, -1:], x[:, :-1]), dim=1)
        return original(self, late, tail)[0], original(self, x, tail)[1]

    convolutions_become(patcher, change)


@mutant(*PAPER_CASES)
def convolutions_forget_their_tails(patcher: pytest.MonkeyPatch) -> None:
    convolutions_become(patcher, lambda original, self, x, tail: (original(self, x, tail)[0], tail * 0))


@mutant(*PAPER_CASES)
def convolutions_keep_the_tail_they_were_given(patcher: pytest.MonkeyPatch) -> None:
    convolutions_become(patcher, lambda original, self, x, tail: (original(self, x, tail)[0], tail))


@mutant(*PAPER_CASES)
def convolutions_are_correlations(patcher: pytest.MonkeyPatch) -> None:
    """The newest token at the other end of the kernel."""

    def change(original: Any, self: Any, x: Tensor, tail: Tensor) -> Any:
        seen = torch.cat((tail, x), dim=1)
        last = len(self.weight) - 1
        out = sum(seen[:, lag : lag + x.shape[1]] * self.weight[lag] for lag in range(last + 1))
        return out, seen[:, x.shape[1] :]

    convolutions_become(patcher, change)


@mutant(*PAPER_CASES)
def keys_take_the_tail_of_values(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, tokens: Any, chunk: int, dtype: Any, tails: Any) -> Any:
        return original(self, tokens, chunk, dtype, tails._replace(keys=tails.values))

    wrapped(patcher, Projections, "project_writes", change)


@mutant("paper")
def convolutions_see_masked_tokens(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Projections, "normed", lambda original, self, tokens, is_stored: original(self, tokens, None))


@mutant("paper", "paper, one chunk a batch", "paper, dense")
def the_activation_comes_before_the_convolution(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Tensor, tail: Tensor) -> Any:
        return self.convolution(self.activation(self.linear(x)), tail)

    wrapped(patcher, convolution.Projection, "forward", change)


@mutant(*PAPER_CASES)
def queries_and_keys_are_not_of_length_1(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(projections.L2Norm, "forward", lambda self, x: x)


@mutant(*PAPER_CASES)
def lengths_are_means(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(projections.L2Norm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:]))


@mutant(*PAPER_CASES)
def the_summed_loss_is_a_mean(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(options, "summed_squared_error", losses.mean_squared_error)


@mutant("plain", "general")
def the_mean_loss_is_a_sum(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Engine, "__init__", lambda original, self, name, model, traits, loss_fn, rules: original(
        self, name, model, traits, losses.summed_squared_error, rules))  # fmt: skip


def swapped(each: tuple[Any, ...]) -> tuple[Any, ...]:
    return each[::-1]


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def parameters_trade_step_sizes(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=swapped)


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def all_parameters_step_as_the_first(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=lambda rates: rates[:1])


@mutant("paper", "paper, mixing tokens", "gates of parameters")
def the_rates_of_the_first_parameter_are_reported(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        streaming,
        "surprise_of",
        lambda original, projected, loss: original(
            projected._replace(writes=projected.writes._replace(rates=projected.writes.rates[:1])), loss
        ),
    )


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def parameters_trade_momenta(patcher: pytest.MonkeyPatch) -> None:
    def change(gates: tuple[Gates, ...]) -> tuple[Gates, ...]:
        return tuple(
            own._replace(log_momentum=other.log_momentum) for own, other in zip(gates, gates[::-1], strict=True)
        )

    writes_become(patcher, gates=change)


@mutant("gates of parameters")
def parameters_trade_forgetting(patcher: pytest.MonkeyPatch) -> None:
    def change(gates: tuple[Gates, ...]) -> tuple[Gates, ...]:
        return tuple(own._replace(log_keep=other.log_keep) for own, other in zip(gates, gates[::-1], strict=True))

    writes_become(patcher, gates=change)


@mutant("gates of parameters")
def forgetting_is_momentum(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_keep=gates.log_momentum[0]))


@mutant(*PAPER_CASES, "paper, mixing tokens")
def channels_are_forgotten_in_reverse(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(log_keep=gates.log_keep.flip(1)))


@mutant(*PAPER_CASES, "paper, mixing tokens")
def channels_are_forgotten_on_average(patcher: pytest.MonkeyPatch) -> None:
    gates_become(
        patcher,
        lambda gates: gates._replace(log_keep=gates.log_keep.mean(dim=1, keepdim=True).expand_as(gates.log_keep)),
    )


@mutant("paper, square")
def rows_are_forgotten_not_columns(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, scale: Tensor, weights: Tensor) -> Tensor:
        scale = original(scale, weights)
        return scale.mT if scale.ndim == 3 else scale

    for module in (scaled_sum, single):
        wrapped(patcher, module, "along", change)


@mutant("paper")
def channels_forget_what_comes_later_too(patcher: pytest.MonkeyPatch) -> None:
    """What is stored is forgotten from the start of its block on, not from its own chunk on."""

    def change(original: Any, gates: Gates) -> Any:
        found = original(gates)
        return found._replace(surprise=found.surprise * found.initial.unsqueeze(-1))

    wrapped(patcher, engine_module, "unroll_channels", change)


@mutant(*PAPER_CASES)
def the_gain_is_a_fast_weight(patcher: pytest.MonkeyPatch) -> None:
    """Or rather: it moves, by the mean of what is stored."""

    def change(original: Any, self: Projections, batch: int, dtype: Any) -> Any:
        return {name: gain * 1.1 + 0.05 for name, gain in original(self, batch, dtype).items()}

    wrapped(patcher, Projections, "slow_weights", change)


@mutant(*PAPER_CASES)
def heads_trade_their_gains(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, batch: int, dtype: Any) -> Any:
        return {name: gain.flip(0) for name, gain in original(self, batch, dtype).items()}

    wrapped(patcher, Projections, "slow_weights", change)


@mutant(*PAPER_CASES)
def outputs_are_gated_by_silu(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Projections, "merge", with_gate(lambda gate: gate[:-1].append(torch.nn.SiLU())))


@mutant(*PAPER_CASES)
def outputs_are_not_gated(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Projections, "merge", with_gate(lambda gate: None))


def with_gate(make: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def change(original: Any, self: Projections, *args: Any) -> Tensor:
        gate, self.retrieve_gate = self.retrieve_gate, make(self.retrieve_gate)
        try:
            return original(self, *args)
        finally:
            self.retrieve_gate = gate

    return change


# masks


@mutant("rich", "attention", "general")
def the_mask_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "project_writes",
        lambda original, self, tokens, *args: original(self, tokens._replace(is_stored=None), *args),
    )


@mutant("rich", "general")
def the_mask_is_inverted(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, tokens: Any, *args: Any) -> Any:
        mask = None if tokens.is_stored is None else ~tokens.is_stored
        return original(self, tokens._replace(is_stored=mask), *args)

    wrapped(patcher, Projections, "project_writes", change)


@mutant("rich", "general", "attention")
def masked_chunks_still_decay(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "gates",
        lambda original, self, pooled, poison, is_stored, dtype: original(self, pooled, poison, None, dtype),
    )


@mutant("attention")
def masked_tokens_are_attended(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, *args: Any) -> Any:
        self.compacts_masked = False
        return original(self, *args)

    wrapped(patcher, Projections, "without_masked", change)


# batches


@mutant("plain", "rich")
def the_base_is_never_renewed(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, NeuralMemory, "renew", lambda original, self, carry: carry)


@mutant("rich")
def the_transition_is_not_gated(patcher: pytest.MonkeyPatch) -> None:
    for module in (neural_memory, limits):
        wrapped(patcher, module, "renewed", lambda original, carry, gate, *args: original(carry, None, *args))


@mutant("grown")
def growth_is_not_limited(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(limits, "limit_growth", lambda weights, initial, max_growth: weights)


@mutant("plain", "rich")
def batches_begin_a_chunk_late(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, schedule, "batches", lambda original, layout, start, end: original(layout, start + 1, end + 1))


# reading


@mutant("plain", "attention")
def reads_come_a_chunk_early(patcher: pytest.MonkeyPatch) -> None:
    """Seeing the weights before the chunk that a token completes."""
    shifted_reads(patcher, -1)


@mutant("plain", "attention")
def reads_come_a_chunk_late(patcher: pytest.MonkeyPatch) -> None:
    """A look into the future of the block."""
    shifted_reads(patcher, 1)


def shifted_reads(patcher: pytest.MonkeyPatch, shift: int) -> None:
    def change(original: Any, self: Engine, block: Any, queries: Tensor, rows: Any, slow: Any) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        if block.num_chunks:
            rows = (rows + shift).clamp(0, block.num_chunks)
        return original(self, block, queries, rows, slow)

    wrapped(patcher, Engine, "read", change)


@mutant("read apart")
def reading_chunks_are_storing_chunks(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(
        Reader, "rows", lambda self, plan: (torch.arange(plan.first_group, plan.last_group) - plan.first_chunk).clamp(0)
    )


@mutant("attention")
def the_first_group_begins_with_its_first_query(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(Reader, "begun", lambda self, like: like[:, :1])


@mutant("rich")
def reads_are_not_normed(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(MultiheadRMSNorm, "forward", lambda self, x: x * (self.gamma + 1))


@mutant("rich")
def heads_are_not_gated(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Projections, "merge", with_gate(lambda gate: None))


@mutant("plain")
def the_carry_is_dropped_between_calls(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        NeuralMemory,
        "checked_state",
        lambda original, self, state, batch: self.init_state(batch)._replace(
            seq_index=state.seq_index, cache_store_segment=state.cache_store_segment
        ),
    )


@mutant("plain")
def waiting_tokens_are_dropped_between_calls(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: NeuralMemory, state: Any, batch: int) -> Any:
        return state._replace(cache_store_segment=state.cache_store_segment * 0)

    wrapped(patcher, NeuralMemory, "checked_state", change)


@mutant("spectral")
def steps_are_not_orthogonal(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(general, "orthogonalised", lambda t: t)


@mutant("spectral")
def one_newton_schulz_iteration_less(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(spectral, "NUM_ITERATIONS", 4)


@mutant("lookahead and views")
def all_see_the_view_of_the_queries(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "project_writes",
        lambda original, self, tokens, *args: original(self, tokens._replace(values=tokens.keys), *args),
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, cases = MUTANTS[name]
    patch(monkeypatch)
    survived = []
    for case_name in cases:
        try:
            check(CASES[case_name])
        except (AssertionError, RuntimeError, ValueError, IndexError):
            continue
        survived.append(case_name)
    assert not survived, f"lives through {survived}"
