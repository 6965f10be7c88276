"""Mutants of the paper's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import (
    factor_becomes,
    gates_become,
    mutant,
    reversed_names,
    with_gate,
    wrapped,
    writes_become,
)
from titans_pytorch import losses
from titans_pytorch.fast_weights import scale
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import PerParameter
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.memory import convolution, head_norms, options, streaming
from titans_pytorch.memory.projections import Projections


def with_shared_rates(writes: Any) -> Any:
    """All parameters have the rates of the first."""
    return writes._replace(rates=PerParameter.shared(writes.rates.each, writes.rates.any))


def traded(patcher: pytest.MonkeyPatch, name: str) -> None:
    """Parameters have each other's factor of this name."""

    def change(gates: PerParameter[Gates]) -> PerParameter[Gates]:
        others = reversed_names(gates)
        each = {p: own._replace(factors=own.factors | {name: others[p].factors[name]}) for p, own in gates.each.items()}
        return PerParameter(each, gates.is_shared)

    writes_become(patcher, gates=change)


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

    wrapped(patcher, convolution.ConvolvedLinear, "forward", change)


@mutant(*PAPER_CASES)
def queries_and_keys_are_not_of_length_1(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(head_norms.L2Norm, "forward", lambda self, x: x)


@mutant(*PAPER_CASES)
def lengths_are_means(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(head_norms.L2Norm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:]))


@mutant(*PAPER_CASES)
def the_summed_loss_is_a_mean(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(options, "summed_squared_error", losses.mean_squared_error)


@mutant("plain", "general")
def the_mean_loss_is_a_sum(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Engine, "__init__", lambda original, self, name, model, traits, loss_fn, *args: original(
        self, name, model, traits, losses.summed_squared_error, *args))  # fmt: skip


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def parameters_trade_step_sizes(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=reversed_names)


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def all_parameters_step_as_the_first(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=lambda rates: PerParameter.shared(rates.each, rates.any))


@mutant("paper", "paper, mixing tokens", "gates of parameters")
def the_rates_of_the_first_parameter_are_reported(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        streaming,
        "report_of",
        lambda original, projected, loss: original(
            projected._replace(writes=with_shared_rates(projected.writes)), loss
        ),
    )


@mutant(*PAPER_CASES, "paper, mixing tokens", "gates of parameters")
def parameters_trade_momenta(patcher: pytest.MonkeyPatch) -> None:
    traded(patcher, "momentum")


@mutant("gates of parameters")
def parameters_trade_forgetting(patcher: pytest.MonkeyPatch) -> None:
    traded(patcher, "keep")


@mutant("gates of parameters")
def forgetting_is_momentum(patcher: pytest.MonkeyPatch) -> None:
    gates_become(patcher, lambda gates: gates._replace(factors=gates.factors | {"keep": gates.factors["momentum"][:1]}))


@mutant(*PAPER_CASES, "paper, mixing tokens")
def channels_are_forgotten_in_reverse(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "keep", lambda log: log.flip(2))


@mutant(*PAPER_CASES, "paper, mixing tokens")
def channels_are_forgotten_on_average(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "keep", lambda log: log.mean(dim=2, keepdim=True).expand_as(log))


@mutant("paper, square")
def rows_are_forgotten_not_columns(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, scale: Tensor, weights: Tensor) -> Tensor:
        scale = original(scale, weights)
        return scale.mT if scale.ndim == 3 else scale

    wrapped(patcher, scale, "along", change)


@mutant("paper, in no loop")
def channels_forget_what_comes_later_too(patcher: pytest.MonkeyPatch) -> None:
    """What is stored is forgotten from the start of its block on, not from its own chunk on."""

    def change(original: Any, self: Engine, gates: Gates) -> Any:
        found = original(self, gates)
        return found._replace(surprise=found.surprise * found.initial.unsqueeze(-1))

    wrapped(patcher, Engine, "shares", change)


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
