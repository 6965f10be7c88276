"""Mutants of what is stored: gradients, rates, keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, wrapped, writes_become
from titans_pytorch import losses
from titans_pytorch.fast_weights import closed_form
from titans_pytorch.fast_weights import engine as engine_module
from titans_pytorch.fast_weights import surprises as surprises_module
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.losses import Huber, Power
from titans_pytorch.memory import steps
from titans_pytorch.memory.projections import Projections


@mutant("plain", "general")
def climbs_instead_of_descending(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, engine_module, "surprises_of", lambda original, found, *args: negated(original(found, *args)))


def negated(surprises: Surprises) -> Surprises:
    factors = {name: Factors(-f.left, f.right) for name, f in surprises.factors.items()}
    return Surprises(factors, {name: -t for name, t in surprises.tensors.items()})


@mutant("plain")
def left_and_right_factors_swap(patcher: pytest.MonkeyPatch) -> None:
    """Of square matrices, which shapes cannot tell apart."""

    def swapped(f: Factors) -> Factors:
        return Factors(f.right, f.left) if f.left.shape == f.right.shape else Factors(f.left * 1.01, f.right)

    wrapped(
        patcher,
        engine_module,
        "surprises_of",
        lambda original, found, *args: original(
            found._replace(factors={n: swapped(f) for n, f in found.factors.items()}), *args
        ),
    )


@mutant("plain", "general")
def vectors_are_not_surprised(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        engine_module,
        "surprises_of",
        lambda original, found, *args: original(
            found._replace(tensors={n: t * 0 for n, t in found.tensors.items()}), *args
        ),
    )


@mutant("plain")
def rates_are_ignored(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, rates=lambda rates: rates.map(lambda rate: torch.full_like(rate, 0.2)))


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
    patcher.setattr(surprises_module, "smooth_limit", lambda norm, limit: torch.ones_like(norm))


@mutant("rich")
def gradients_are_clipped_hard(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(surprises_module, "smooth_limit", lambda norm, limit: (limit / norm.clamp(min=1e-9)).clamp(max=1.0))


@mutant("rich")
def modulation_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, modulation=lambda shares: {})


@mutant("rich")
def modulation_is_assigned_in_reverse(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, modulation=lambda shares: dict(zip(shares, reversed(shares.values()), strict=True)))


@mutant("rich", "general")
def the_residual_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Engine, carry: Any, writes: Any, residual: Any, *more: Any) -> Any:
        return original(self, carry, writes, None, *more)

    wrapped(patcher, Engine, "store", change)


@mutant("rich", "general")
def the_residual_is_not_mixed(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, mix=lambda mix: None if mix is None else torch.ones_like(mix))


@mutant("lookahead and views")
def the_last_key_is_not_dropped(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, *args: Any) -> Any:
        self.looks_ahead = False
        return original(self, *args)

    wrapped(patcher, Projections, "project_writes", change)


# the gradient in closed form


@mutant("plain", "paper", "rich")
def the_norms_gradient_does_not_know_of_the_mean(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, of_normed: Tensor, *args: Tensor) -> Tensor:
        return original(of_normed, *args) + of_normed.mean(dim=-1, keepdim=True) * 0.1

    wrapped(patcher, closed_form, "norm_gradient", change)


@mutant("plain", "paper", "rich")
def the_norms_gradient_does_not_know_of_the_length(patcher: pytest.MonkeyPatch) -> None:
    """What lies along the normed vector, which scaling would take away again, is left in."""

    def change(original: Any, of_normed: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return (of_normed - of_normed.mean(dim=-1, keepdim=True)) * scale

    wrapped(patcher, closed_form, "norm_gradient", change)


@mutant("plain", "paper")
def errors_do_not_pass_the_gain(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, of_normed: Tensor, *args: Tensor) -> Tensor:
        return original(of_normed * 1.1, *args)

    wrapped(patcher, closed_form, "norm_gradient", change)


@mutant("plain", "paper, square", "rich")
def the_error_has_half_its_size(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        loss, error = original(*args)
        return loss, error / 2

    wrapped(patcher, ClosedMLP, "loss_and_error", change)


@mutant("huber")
def huber_is_a_square_everywhere(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(Huber, "gradient", lambda self, prediction, value: losses.of_mean(prediction, value))


@mutant("lp")
def powers_lose_one_too_few(patcher: pytest.MonkeyPatch) -> None:
    """x |x|^(p-1) in place of x |x|^(p-2)"""

    def change(original: Any, self: Power, prediction: Tensor, value: Tensor) -> Tensor:
        return original(self, prediction, value) * (prediction - value).abs()

    wrapped(patcher, Power, "gradient", change)


@mutant("cosine")
def what_is_along_the_answer_counts(patcher: pytest.MonkeyPatch) -> None:
    patcher.setitem(losses.GRADIENTS, losses.cosine_distance, lambda prediction, value: -losses.direction(value))


@mutant("dot")
def answers_are_pushed_from_their_values(patcher: pytest.MonkeyPatch) -> None:
    patcher.setitem(losses.GRADIENTS, losses.dot_product, lambda prediction, value: value)


@mutant("sparse")
def sparse_steps_go_below_nothing(patcher: pytest.MonkeyPatch) -> None:
    off = steps.SPARSE_BELOW
    patcher.setitem(steps.STEPS, "sparse", lambda raw, max_lr: (raw.sigmoid() - off) / (1 - off) * max_lr)


@mutant("sparse")
def sparse_steps_jump_where_they_begin(patcher: pytest.MonkeyPatch) -> None:
    patcher.setitem(steps.STEPS, "sparse", lambda raw, max_lr: raw.sigmoid() * (raw.sigmoid() > 1 / 11) * max_lr)


@mutant("sparse")
def sparse_steps_begin_elsewhere(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(steps, "SPARSE_BELOW", 0.1)
