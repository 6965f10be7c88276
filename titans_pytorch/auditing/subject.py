"""What is audited: a disturbed copy of a module in float64, two inputs, and how a change of its outputs is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]
"""(module, inputs) -> outputs (b t ...)"""

NOISE = 0.1  # on parameters and inputs, relative to their own size


@dataclass(frozen=True)
class Subject:
    """The disturbed float64 copy, two inputs that differ in every token, and its outputs for the first of them."""

    module: nn.Module
    forward: Forward
    inputs: Tensor
    others: Tensor
    clean: Tensor
    generator: Generator
    notes: dict[str, str] = field(default_factory=dict)

    def answer(self, inputs: Tensor) -> Tensor:
        return per_token(self.forward(self.module, inputs), inputs)

    def attempt(self, kind: str, inputs: Tensor) -> Tensor | None:
        """The answer to inputs that a module may refuse; that it did is noted once per kind."""
        try:
            return self.answer(inputs)
        except Exception as error:
            self.notes.setdefault(kind, f"refuses {kind}, inputs {tuple(inputs.shape)}: {error!r}")
            return None

    def changes(self, outputs: Tensor, clean: Tensor) -> Tensor:
        """How far each output is off, relative to the size of all clean outputs.  (b t ...) -> (b t)"""
        return largest(outputs - clean) / size(self.clean)


def prepared(
    module: nn.Module, inputs: Tensor, forward: Forward, num_tokens: int | None, tolerance: float, generator: Generator
) -> Subject:
    """Copy and disturb the module and the inputs; refuse what no question can be asked about."""

    def noise(like: Tensor) -> Tensor:
        return size(like) * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(NOISE * noise(parameter))
    if num_tokens is None:
        inputs = inputs.detach().double()
        inputs = inputs + NOISE * noise(inputs)
        others = inputs + noise(inputs)
    else:
        shift = torch.randint(1, num_tokens, inputs.shape, generator=generator).to(inputs.device)
        others = ((inputs + shift) % num_tokens).to(inputs.dtype)
    if len(inputs) == 1:
        inputs, others = torch.cat((inputs, others)), torch.cat((others, inputs))

    clean = per_token(forward(module, inputs), inputs)
    if not clean.isfinite().all():
        raise ValueError("outputs must be finite to be audited, got NaN or infinity for the given inputs")
    subject = Subject(module, forward, inputs, others, clean, generator)
    if (off := subject.changes(subject.answer(inputs), clean).max()) > tolerance:
        raise ValueError(f"module must answer the same inputs alike, got a change of {off:.1e}: is dropout on?")
    return subject


def per_token(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Outputs in float64 and without their graph, one per input token.  (b t ...)"""
    if outputs.shape[:2] != inputs.shape[:2]:
        raise ValueError(f"outputs must be (b t ...) like inputs {tuple(inputs.shape)}, got {tuple(outputs.shape)}")
    return outputs.detach().double()


def largest(values: Tensor) -> Tensor:
    """The largest absolute value per token, NaN counting as infinite.  (b t ...) -> (b t)"""
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).reshape(*values.shape[:2], -1).amax(-1)


def size(values: Tensor) -> Tensor:
    """The root mean square, or 1 where everything is 0."""
    size = values.square().mean().sqrt()
    return torch.where(size > 0, size, 1.0)
