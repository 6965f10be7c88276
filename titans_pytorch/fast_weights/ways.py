"""Which way a memory's weights evolve: chosen once, from what the memory model does and what the rule needs.

factored   weights are never built                          (models that use their matrices as `x @ W`, linear rules)
dense      each chunk's weights are built from the factors  (the same models, for rules that act on each step)
general    each chunk's gradient and weights are built      (any other model)
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from titans_pytorch.fast_weights.closed_form import ClosedMLP, has_closed_form
from titans_pytorch.fast_weights.interface import LossFn
from titans_pytorch.fast_weights.layerwise import LayerwiseMLP
from titans_pytorch.fast_weights.opaque import OpaqueModel
from titans_pytorch.fast_weights.probe import ModelTraits
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.taps import TappedModel
from titans_pytorch.memory_models import LayerwiseMemory

EngineName = Literal["factored", "dense", "general"]
Runner = OpaqueModel | TappedModel | ClosedMLP


def runner(name: EngineName, model: nn.Module, traits: ModelTraits, loss_fn: LossFn) -> Runner:
    """Whoever runs the memory model: by the gradient that is known, by its products, or as it is."""
    if isinstance(model, LayerwiseMemory):  # what it is surprised at is no gradient of what it answers
        return LayerwiseMLP(model, loss_fn)
    if name == "general" or traits.uses is None:
        return OpaqueModel(model, loss_fn)
    if has_closed_form(model, loss_fn):
        return ClosedMLP(model, loss_fn)
    return TappedModel(model, traits.uses, loss_fn)


def fitting(name: EngineName | None, traits: ModelTraits, rule: Rule) -> EngineName:
    """The engine that is asked for, if it can; None: the fastest that can."""
    if name is None:
        return "general" if traits.uses is None else "factored" if rule.is_factored else "dense"
    if name not in ("factored", "dense", "general"):
        raise ValueError(f"engine must be 'factored', 'dense' or 'general', got {name!r}")
    if name == "factored" and not rule.is_factored:
        raise ValueError(f"engine 'factored' cannot be used with {rule.why_built}, got both: use 'dense' or 'general'")
    if traits.uses is None and name != "general":
        raise ValueError(f"engine {name!r} needs a memory model that uses its matrices as x @ w; got 'general' only")
    return name
