"""What a memory's answer to a key is held to: its value.  `NeuralMemory(loss=...)` takes losses by name.

Some have a number behind a colon: "huber:0.5", "lp:3". A loss that is known here says its own gradient as well, which a
memory whose gradients are written out (`fast_weights.closed_form`) asks for; any other function is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pytorch.public_names import register_named

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, value), both (... d) -> loss of each token (...)"""

SMALL = 1e-6
"""Square below which a number is small: where powers and lengths of it are smooth instead"""


def mean_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The default key-value loss of each token.  (... d), (... d) -> (...)"""
    return (prediction - value).square().mean(dim=-1)


def summed_squared_error(prediction: Tensor, value: Tensor) -> Tensor:
    """The loss of each token as the paper has it (eq. 12).  (... d), (... d) -> (...)"""
    return (prediction - value).square().sum(dim=-1)


def dot_product(prediction: Tensor, value: Tensor) -> Tensor:
    """How little an answer points where its value does, by its length too (Hebb; arXiv 2505.23884).  -> (...)"""
    return -(prediction * value).sum(dim=-1)


def cosine_distance(prediction: Tensor, value: Tensor) -> Tensor:
    """1 minus the cosine between an answer and its value, whatever their lengths.  (... d), (... d) -> (...)"""
    return 1 - (direction(prediction) * direction(value)).sum(dim=-1)


@dataclass(frozen=True)
class Huber:
    """Squares up to a threshold and straight on from there, the mean over features (arXiv 2504.13173, Yaad)."""

    threshold: float = 1.0

    def __call__(self, prediction: Tensor, value: Tensor) -> Tensor:
        size = (prediction - value).abs()
        within = size.clamp(max=self.threshold)
        return (within * (2 * size - within)).mean(dim=-1)

    def gradient(self, prediction: Tensor, value: Tensor) -> Tensor:
        difference = prediction - value
        return difference.clamp(-self.threshold, self.threshold) * (2 / difference.shape[-1])


@dataclass(frozen=True)
class HuberOfTokens:
    """Squares up to a threshold of the token and straight on from there (arXiv 2504.13173, eq. 26, Yaad).

    The threshold is one of the root of the mean square of all features, so that what is far off keeps its direction. In
    eq. 26 what lies beyond it is the sum of absolute values, whose gradient is another one at the threshold itself.
    """

    thresholds: Tensor | None = None  # (...)  None: far away

    def of(self, thresholds: Tensor) -> HuberOfTokens:
        """The loss of tokens with these thresholds.  (...)"""
        return HuberOfTokens(thresholds)

    def __call__(self, prediction: Tensor, value: Tensor) -> Tensor:
        square = (prediction - value).square().mean(dim=-1)
        if self.thresholds is None:
            return square
        size = (square + SMALL).sqrt()
        return torch.where(size <= self.thresholds, square, self.thresholds * (2 * size - self.thresholds))

    def gradient(self, prediction: Tensor, value: Tensor) -> Tensor:
        difference = prediction - value
        slope = difference * (2 / difference.shape[-1])
        if self.thresholds is None:
            return slope
        size = (difference.square().mean(dim=-1) + SMALL).sqrt()
        return slope * (self.thresholds / size).clamp(max=1.0).unsqueeze(-1)


@dataclass(frozen=True)
class Power:
    """The mean of a power of the differences (arXiv 2504.13173, Moneta), smooth at zero: of sqrt(x^2 + 1e-6)."""

    power: float = 3.0

    def __call__(self, prediction: Tensor, value: Tensor) -> Tensor:
        half = self.power / 2
        return ((prediction - value).square() + SMALL).pow(half).mean(dim=-1) - SMALL**half

    def gradient(self, prediction: Tensor, value: Tensor) -> Tensor:
        difference = prediction - value
        steepness = (difference.square() + SMALL).pow(self.power / 2 - 1)
        return difference * steepness * (self.power / difference.shape[-1])


def direction(x: Tensor) -> Tensor:
    """A vector of length 1, shorter only where it is next to nothing.  (... d) -> (... d)"""
    return x * length(x).reciprocal()


def length(x: Tensor) -> Tensor:
    """(... d) -> (... 1)"""
    return (x.square().sum(dim=-1, keepdim=True) + SMALL).sqrt()


def of_mean(prediction: Tensor, value: Tensor) -> Tensor:
    """The gradient of the mean squared error."""
    return (prediction - value) * (2 / prediction.shape[-1])


def of_sum(prediction: Tensor, value: Tensor) -> Tensor:
    """The gradient of the summed squared error."""
    return (prediction - value) * 2.0


def of_dot_product(prediction: Tensor, value: Tensor) -> Tensor:
    """The gradient of the dot product: the same whatever the memory says."""
    return -value


def of_cosine(prediction: Tensor, value: Tensor) -> Tensor:
    """The gradient of the cosine distance: what of the value's direction is across the answer's."""
    towards, norm = direction(value), length(prediction)
    answered = prediction / norm
    along = (answered * towards).sum(dim=-1, keepdim=True)
    return (along * answered - towards) / norm


GRADIENTS: dict[Loss, Loss] = {
    mean_squared_error: of_mean,
    summed_squared_error: of_sum,
    dot_product: of_dot_product,
    cosine_distance: of_cosine,
}


def gradient_of(loss: Loss) -> Loss | None:
    """The gradient of a loss with respect to predictions (... d), if it is known."""
    if isinstance(loss, (Huber, HuberOfTokens, Power)):
        return loss.gradient
    return next((gradient for known, gradient in GRADIENTS.items() if known is loss), None)


def known_gradient_of(loss: Loss) -> Loss:
    """The gradient of a loss of this file."""
    found = gradient_of(loss)
    if found is None:
        raise ValueError(f"the gradient of a loss must be known here, got {loss!r}")
    return found


def is_quadratic(loss: Loss) -> bool:
    """Whether the gradient of a loss is a difference times a number."""
    return loss in (mean_squared_error, summed_squared_error)


LOSSES: dict[str, Loss] = {}
KINDS: dict[str, tuple[Callable[[float], Loss], float]] = {"huber": (Huber, 0.0), "lp": (Power, 1.0)}
"""Losses with a number, by name, and the least that it may be"""


def register_loss(name: str, loss: Loss) -> None:
    """Make a loss known by name, so that it can be chosen and saved.  loss: (... d), (... d) -> (...)"""
    if name in LOSSES:
        raise ValueError(f"a loss's name must be new, got {name!r}, which is taken; taken are {sorted(LOSSES)}")
    LOSSES[name] = register_named(name, loss)


def loss_by_name(name: str, argument: str = "loss") -> Loss:
    """A loss that is known: huber, or huber:0.5 with a number of its own."""
    if name in LOSSES:
        return LOSSES[name]
    kind, _, number = str(name).partition(":")
    if kind not in KINDS:
        known = ", ".join(map(repr, sorted(LOSSES)))
        raise ValueError(f"{argument} must be one of {known}, or huber or lp with a number as in 'lp:4', got {name!r}")
    make, least = KINDS[kind]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not value >= least or value == 0 or (kind == "lp" and math.isinf(value)):
        allowed = "a positive number, or inf" if kind == "huber" else "a number of at least 1"
        raise ValueError(f"{argument} {kind!r} must have {allowed} behind its colon, got {name!r}")
    return make(value)


register_loss("mse", mean_squared_error)
register_loss("sse", summed_squared_error)
register_loss("dot", dot_product)
register_loss("cosine", cosine_distance)
register_loss("huber", Huber())
register_loss("yaad", HuberOfTokens())
register_loss("lp", Power())
