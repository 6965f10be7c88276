"""Mutants of windows of surprises, of what they keep between calls, of powers of keys and of gated orthogonal steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import gates_become, mutant, wrapped, writes_become
from titans_pytorch.fast_weights import engine
from titans_pytorch.fast_weights.blocks import dense
from titans_pytorch.fast_weights.rules import atlas, omega, orthogonal
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.memory.key_powers import KeyPowers
from titans_pytorch.memory.recent import RecentWrites

WINDOWS = ("window", "window, dense", "window, gates of channels", "window of a gated delta rule", "atlas")


def tables_become(patcher: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """How much each chunk (row) counts of each, the last column being that of the last chunk."""
    for module in (omega, dense):
        wrapped(patcher, module, "counted", lambda original, *args: change(original(*args)))


def scale_becomes(patcher: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor]) -> None:
    def changed(gates: Gates) -> Gates:
        return gates._replace(shares=gates.shares | {name: change(gates.shares[name])})

    gates_become(patcher, changed)


@mutant(*WINDOWS)
def windows_are_off_by_one(patcher: pytest.MonkeyPatch) -> None:
    tables_become(patcher, lambda table: table.roll(-1, dims=-1))


@mutant(*WINDOWS)
def windows_are_one_too_short(patcher: pytest.MonkeyPatch) -> None:
    scale_becomes(patcher, "window", lambda scale: torch.cat((scale[:-1], scale[-1:] * 0)))


@mutant("window", "window, dense", "window, gates of channels", "atlas")
def windows_look_back_the_other_way_round(patcher: pytest.MonkeyPatch) -> None:
    scale_becomes(patcher, "window", lambda scale: scale.flip(0))


@mutant(*WINDOWS)
def windows_are_not_gated(patcher: pytest.MonkeyPatch) -> None:
    scale_becomes(patcher, "window", torch.ones_like)


@mutant(*WINDOWS)
def a_chunk_is_gated_in_its_own_step(patcher: pytest.MonkeyPatch) -> None:
    tables_become(patcher, lambda table: table * 0.7)


@mutant(*WINDOWS)
def windows_end_where_blocks_begin(patcher: pytest.MonkeyPatch) -> None:
    writes_of_blocks_become(patcher, lambda writes, n: writes.rates.map(lambda rate: cut(rate, n)))


def writes_of_blocks_become(patcher: pytest.MonkeyPatch, change: Callable[[Any, int], Any]) -> None:
    def changed(original: Any, self: Any, carry: Any, writes: Any, *args: Any) -> Any:
        return original(self, carry, writes._replace(rates=change(writes, writes.num_older)), *args)

    wrapped(patcher, engine.Engine, "store", changed)


def cut(rate: Tensor, num_older: int) -> Tensor:
    """Without the step sizes of chunks before a block."""
    return torch.cat((rate[:, :num_older] * 0, rate[:, num_older:]), dim=1)


@mutant(*WINDOWS)
def what_is_recent_stays_as_it_was(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(RecentWrites, "after", lambda self, writes: self)


@mutant("window")
def what_was_recent_is_modulated_as_what_is_new(patcher: pytest.MonkeyPatch) -> None:
    def changed(original: Any, self: RecentWrites, writes: Any) -> Any:
        found = original(self, writes)
        last = {name: torch.full_like(share, 0.5) for name, share in found.modulation.items()}
        own = {name: torch.cat((last[name][:, : found.num_older], share), dim=1) for name, share in writes.modulation.items()}  # fmt: skip  # noqa: E501
        return found._replace(modulation=own)

    wrapped(patcher, RecentWrites, "before", changed)


@mutant("window", "window, gates of channels", "window of a gated delta rule")
def momenta_do_not_see_the_window(patcher: pytest.MonkeyPatch) -> None:
    def changed(original: Any, shares: Any, gates: Any, window: int) -> Any:
        found, older = original(shares, gates, window), window - 1
        last = torch.nn.functional.pad(shares.last_surprise, (older, 0))
        return found._replace(last_surprise=last)

    wrapped(patcher, engine, "shares_of_window", changed)


@mutant("window")
def powers_are_one_too_few(patcher: pytest.MonkeyPatch) -> None:
    def forward(self: KeyPowers, x: Tensor) -> Tensor:
        return sum(a * x ** (i + 1) for i, a in enumerate(self.coefficients[:-1]))

    patcher.setattr(KeyPowers, "forward", forward)


@mutant("window")
def powers_begin_at_the_second(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, KeyPowers, "forward", lambda original, self, x: x * original(self, x))


@mutant("window")
def values_have_powers_too(patcher: pytest.MonkeyPatch) -> None:
    writes_become(patcher, values=lambda values: values + values.square())


@mutant("atlas")
def orthogonal_steps_have_one_length(patcher: pytest.MonkeyPatch) -> None:
    scale_becomes(patcher, "length", torch.ones_like)


@mutant("atlas")
def lengths_scale_what_is_left_too(patcher: pytest.MonkeyPatch) -> None:
    def changed(original: Any, keep: Tensor, length: Tensor) -> Tensor:
        return original(keep, length) * length.mean()

    wrapped(patcher, atlas, "scaled_steps", changed)


@mutant("atlas")
def steps_are_as_long_as_momenta(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, orthogonal, "orthogonalised", lambda original, t: t)
