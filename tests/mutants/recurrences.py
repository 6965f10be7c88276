"""Mutants of how weights evolve: forgetting, momentum and their gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import complement, gates_become, mutant, wrapped
from titans_pytorch.fast_weights import general
from titans_pytorch.fast_weights.rules import recurrence
from titans_pytorch.memory import gates as gates_module


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
