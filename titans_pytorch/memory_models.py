"""What a memory is: small networks that map `(... n d) -> (... n d)` and whose weights are what they remember.

Any `nn.Module` of that kind without buffers will do; these are the ones that come with the library. All of them use a
weight as `x @ w`, so that no chunk's gradient matrix ever has to be built (see `fast_weights`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.checks.value_checks import check_positive
from titans_pytorch.losses import direction
from titans_pytorch.pretrained import Described

NORM_GAIN = "norm.gamma"
"""Name of the gain of `ResidualNorm`"""

NORM_EPS = 1e-5
"""What layer norms add to a variance"""


def weights_of(shapes: Iterable[tuple[int, int]]) -> nn.ParameterList:
    """Matrices that `begin` gives their values."""
    return nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)


def begin(model: nn.Module) -> None:
    """All matrices of a memory model Xavier-uniform, in the order in which they are made."""
    listed = [p for each in model.modules() if isinstance(each, nn.ParameterList) for p in each]
    for weight in (*listed, *model.parameters(recurse=False)):
        nn.init.xavier_uniform_(weight)


def l2_normalised(x: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero, with a zero gradient of any order.  x: (... d)"""
    square = x.square().sum(dim=-1, keepdim=True)
    is_zero = square == 0
    return x * square.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)


class LayerNorm(nn.Module):
    """Layer norm whose gain is `1 + gamma`: a memory starts with the plain norm and may learn a gain.  x: (... n d)"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (self.gamma + 1)


class ResidualNorm(Described, nn.Module):
    """`LayerNorm(model(x)) + x`, the form in which the paper uses its memory.  x: (... n d)"""

    def __init__(self, dim: int, model: nn.Module) -> None:
        super().__init__()
        check_positive(dim=dim)
        self.norm = LayerNorm(dim)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.model(x)) + x


class MemoryMLP(Described, nn.Module):
    """`depth` matrices dim -> hidden -> ... -> dim with GELU between them.  x: (... n d)"""

    def __init__(self, dim: int, depth: int, expansion_factor: float = 2.0) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, expansion_factor=expansion_factor)
        widths = [dim, *[int(dim * expansion_factor)] * (depth - 1), dim]
        self.weights = weights_of(pairwise(widths))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer, weight in enumerate(self.weights):
            x = (F.gelu(x) if layer > 0 else x) @ weight
        return x

    @property
    def hidden_axes(self) -> dict[str, tuple[int, ...]]:
        """Which axes of each weight are hidden units, as a memory that grows has to know."""
        last = len(self.weights) - 1
        return {f"weights.{i}": (0,) * (i > 0) + (1,) * (i < last) for i in range(last + 1)}


class GatedResidualMemoryMLP(Described, nn.Module):
    """Residual MLP layers that gate between their input and their output, then a projection.  x: (... n d)"""

    def __init__(self, dim: int, depth: int = 1, expansion_factor: float = 4.0) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, expansion_factor=expansion_factor)
        hidden = int(dim * expansion_factor)
        shapes = ((dim, hidden), (hidden, dim), (2 * dim, dim))
        self.weights = nn.ModuleList(weights_of(shapes) for _ in range(depth))
        self.final_proj = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.weights:
            to_hidden, to_out, to_gate = layer.parameters()
            out = F.gelu(x @ to_hidden) @ to_out
            gate = (torch.cat((out, x), dim=-1) @ to_gate).sigmoid()
            x = torch.lerp(x, out, gate)
        return x @ self.final_proj


class FactorizedMemoryMLP(Described, nn.Module):
    """Layers of rank `k`, GELU before every one but the first: a smaller memory of the same width.  x: (... n d)"""

    def __init__(self, dim: int, depth: int = 2, k: int = 32) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, k=k)
        shapes = ((dim, k), (k, dim))
        self.weights = nn.ModuleList(weights_of(shapes) for _ in range(depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.weights):
            down, up = layer.parameters()
            x = (F.gelu(x) if index > 0 else x) @ down @ up
        return x


class MemoryGLU(Described, nn.Module):
    """`(silu(x W1) * (x W3)) W2`, the memory of LaCT (arXiv 2505.23884).  x: (... n d)"""

    def __init__(self, dim: int, expansion_factor: float = 2.0) -> None:
        super().__init__()
        check_positive(dim=dim, expansion_factor=expansion_factor)
        hidden = int(dim * expansion_factor)
        self.weights = weights_of(((dim, hidden), (dim, hidden), (hidden, dim)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        to_gate, to_hidden, to_out = self.weights
        return (F.silu(x @ to_gate) * (x @ to_hidden)) @ to_out

    @property
    def hidden_axes(self) -> dict[str, tuple[int, ...]]:
        """Which axes of each weight are hidden units, as a memory that grows has to know."""
        return {"weights.0": (1,), "weights.1": (1,), "weights.2": (0,)}


class MemorySwiGluMLP(Described, nn.Module):
    """Residual gated feed-forwards with a norm at the end, two thirds as wide for equal parameters.  x: (... n d)"""

    def __init__(self, dim: int, depth: int = 1, expansion_factor: float = 4.0) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, expansion_factor=expansion_factor)
        hidden = int(dim * expansion_factor * 2 / 3)
        shapes = ((dim, 2 * hidden), (hidden, dim))
        self.weights = nn.ModuleList(weights_of(shapes) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.weights:
            to_hidden, to_out = layer.parameters()
            hidden, gate = (x @ to_hidden).chunk(2, dim=-1)
            x = x + (hidden * F.gelu(gate)) @ to_out
        return self.norm(x)


def hidden_keys(x: Tensor) -> Tensor:
    """What a layer of a `LayerwiseMemory` is given: directions, as keys of a delta rule have to be.  x: (... d)"""
    return direction(F.gelu(x))


class LayerwiseMemory(Described, nn.Module):
    """`depth` matrices, each of which is taught the value by itself (docs/rules.md).  x: (... n d)"""

    def __init__(self, dim: int, depth: int = 2) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth)
        self.weights = weights_of([(dim, dim)] * depth)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer, weight in enumerate(self.weights):
            x = (hidden_keys(x) if layer > 0 else x) @ weight
        return x


class MemoryAttention(Described, nn.Module):
    """Causal attention over the tokens of a chunk, with a feed-forward in parallel.  x: (... n d)"""

    def __init__(self, dim: int, scale: float = 8.0, expansion_factor: float = 2.0) -> None:
        super().__init__()
        check_positive(dim=dim, scale=scale, expansion_factor=expansion_factor)
        self.scale = scale
        hidden = int(dim * expansion_factor)
        shapes = ((dim, dim), (dim, dim), (dim, dim), (dim, hidden), (hidden, dim))
        self.weights = weights_of(shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        to_queries, to_keys, to_values, to_hidden, to_out = self.weights
        queries, keys = l2_normalised(x @ to_queries), l2_normalised(x @ to_keys)
        similarity = queries @ keys.mT * self.scale
        future = torch.ones(similarity.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attention = similarity.masked_fill(future, -torch.inf).softmax(dim=-1)
        return attention @ (x @ to_values) + F.gelu(x @ to_hidden) @ to_out


def linear_memory(dim: int) -> MemoryMLP:
    """One matrix."""
    return MemoryMLP(dim, depth=1)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MemoryMLP,
    "linear": linear_memory,
    "gated": GatedResidualMemoryMLP,
    "factorized": FactorizedMemoryMLP,
    "swiglu": MemorySwiGluMLP,
    "glu": MemoryGLU,
    "attention": MemoryAttention,
    "layerwise": LayerwiseMemory,
}
"""Memory models by name, each made from a width and arguments of its own"""


ALONE = ("linear", "layerwise", "glu")
"""Those that models of the family use without a norm around them, as the papers that they are from do"""


def register_memory_model(name: str, make: Callable[..., nn.Module]) -> None:
    """Make a memory model known by name, so that it can be chosen and saved.  make: (dim, ...) -> the model"""
    if name in MODELS:
        raise ValueError(f"a memory model's name must be new, got {name!r}, which is taken; taken are {sorted(MODELS)}")
    MODELS[name] = make


def memory_model_by_name(name: str, dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A memory model that is known, of this width."""
    if name not in MODELS:
        raise ValueError(f"model must be an nn.Module or one of {', '.join(map(repr, sorted(MODELS)))}, got {name!r}")
    known = arguments_of(name)
    if unknown := [argument for argument in arguments if argument not in known]:
        raise TypeError(f"a memory model {name!r} takes {', '.join(known) or 'no arguments'}, got {', '.join(unknown)}")
    return MODELS[name](dim, **arguments)


def arguments_of(name: str) -> list[str]:
    """What can be said of a memory model besides its width."""
    return list(inspect.signature(MODELS[name]).parameters)[1:]
