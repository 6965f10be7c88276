"""How a rule of the library is broken, and who has to notice: what all mutants are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import PerParameter
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.rules.titans import Titans
from titans_pytorch.memory.projections import Projections

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
    wrapped(patcher, Projections, "gates", lambda original, *args: original(*args).map(change))


def factor_becomes(patcher: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """The logarithms of one of the rule's factors are others."""
    gates_become(patcher, lambda gates: gates._replace(factors=gates.factors | {name: change(gates.factors[name])}))


def reversed_names(each: PerParameter[Any]) -> PerParameter[Any]:
    """Parameters trade what they have."""
    return PerParameter(dict(zip(each.each, reversed(each.each.values()), strict=True)), each.is_shared)


def equations_become(patcher: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """An equation of the rule is another, however it is run: without the closed form, which would not know of it."""
    wrapped(patcher, Titans, name, change)
    patcher.setattr(Titans, "coefficients", Rule.coefficients)


def writes_become(patcher: pytest.MonkeyPatch, **changes: Callable[[Any], Any]) -> None:
    def change(original: Any, *args: Any) -> Any:
        projected = original(*args)
        new = {name: value(getattr(projected.writes, name)) for name, value in changes.items()}
        return projected._replace(writes=projected.writes._replace(**new))

    wrapped(patcher, Projections, "project_writes", change)


def complement(log_gate: Tensor) -> Tensor:
    return torch.log1p(-log_gate.exp())


def with_gate(make: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def change(original: Any, self: Projections, *args: Any) -> Tensor:
        gate, self.retrieve_gate = self.retrieve_gate, make(self.retrieve_gate)
        try:
            return original(self, *args)
        finally:
            self.retrieve_gate = gate

    return change
