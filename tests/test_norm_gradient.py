"""The gradient of a norm inside a memory: right as often as anybody differentiates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks.operations import operations
from titans_pytorch import NeuralMemory
from titans_pytorch.fast_weights.norms import NORM_EPS, layer_norm, norm, norm_gradient, projected
from titans_pytorch.memory.costs import COSTS


def given(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    p, x = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    return p, x, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("kind", ["drawn", "no gradient", "all alike"])
def test_its_gradient_is_that_of_torch(kind: str) -> None:
    p, x, q = given(3, 4, 5)
    p = torch.zeros_like(p).requires_grad_() if kind == "no gradient" else p
    x = torch.full_like(x, 2.0).requires_grad_() if kind == "all alike" else x
    _, mean, scale = norm(x)
    found, expected = (torch.autograd.grad(way(p, x, mean, scale), (p, x), q) for way in (norm_gradient, projected))
    assert_close(found, expected)
    assert all(torch.isfinite(each).all() for each in found)


def test_it_takes_fewer_operations() -> None:
    p, x, q = given(3, 4, 5)
    _, mean, scale = norm(x)

    def training(way: object) -> int:
        return operations(lambda: torch.autograd.grad(way(p, x, mean, scale), (p, x), q))

    assert training(norm_gradient) <= 19 < training(projected)


def plain(x: Tensor) -> Tensor:
    """A layer norm as it is written in books."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()


@pytest.mark.parametrize(
    "transforms", [(jacrev,) * 3, (jacfwd,) * 3, (jacrev, jacfwd, jacrev), (jacfwd, jacrev, jacfwd)]
)
def test_its_third_derivative_is_right_forwards_and_backwards(transforms: tuple[Any, ...]) -> None:
    _, x, w = given(5)

    def derivative(way: Callable[[Tensor], Tensor]) -> Tensor:
        def wanted(x: Tensor) -> Tensor:
            return (way(x).sin() * w).sum()

        for transform in transforms:
            wanted = transform(wanted)
        return wanted(x.detach())

    assert_close(derivative(layer_norm), derivative(plain))
    assert_close(derivative(lambda x: vmap(layer_norm)(x.expand(2, 5))[1]), derivative(plain))


@pytest.mark.parametrize("is_autocasting", [False, True])
def test_so_are_those_of_autograd(is_autocasting: bool) -> None:
    _, x, w = given(3, 5)

    def third(way: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=is_autocasting):
            found = (way(x).sin() * w).sum()
            for _ in range(3):
                (gradient,) = torch.autograd.grad(found, x, create_graph=True)
                found = (gradient.cos() * w).sum()
        return gradient

    assert_close(third(layer_norm), third(plain))


@torch.no_grad()
def test_it_is_the_norm_of_torch_over_any_axes() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layer_norm(x, 2, 0.1), F.layer_norm(x, (4, 5), eps=0.1))


class Normed(nn.Module):
    """A memory model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


MEMORIES: dict[str, dict[str, Any]] = {
    "renewed": {},
    "one base": {"batch_size": None},
    "orthogonal steps": {"spectral_norm_surprises": True},
    "built": {"engine": "dense"},
    "general": {"engine": "general"},
    "swiglu": {"model": "swiglu"},
    "attention": {"model": "attention"},
    "one's own": {"model": Normed()},
}


@pytest.mark.parametrize("options", MEMORIES.values(), ids=MEMORIES)
def test_a_memory_with_a_norm_can_be_differentiated_twice(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of loops, as the error of a loop says; it differentiates the norm a third time."""
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(series_elements=0))
    torch.manual_seed(0)
    memory = NeuralMemory(4, 2, **{"batch_size": 4, **options}).double()
    seq = torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda seq: memory(seq)[0], (seq,))


@pytest.mark.parametrize("name", ["renewed", "general", "swiglu", "one's own"])
def test_transforms_find_the_second_derivative_of_a_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(series_elements=0))
    torch.manual_seed(0)
    memory = NeuralMemory(4, 2, **{"batch_size": 4, **MEMORIES[name]}).double()
    seq = torch.randn(1, 6, 4, dtype=torch.float64)

    def objective(seq: Tensor) -> Tensor:
        return memory(seq)[0].sin().sum()

    assert_close(jacrev(jacrev(objective))(seq), torch.autograd.functional.hessian(objective, seq))


@pytest.mark.parametrize("name", ["general", "swiglu", "attention"])
def test_memories_have_shapes_where_nothing_else_is_there(name: str) -> None:
    with torch.device("meta"):
        assert NeuralMemory(4, 2, **MEMORIES[name])(torch.randn(1, 8, 4))[0].shape == (1, 8, 4)


def test_half_precision_stays_close() -> None:
    p, x, q = given(3, 64)
    _, mean, scale = norm(x)
    expected = torch.autograd.grad(norm_gradient(p, x, mean, scale), (p, x), q)
    half = [each.detach().bfloat16().requires_grad_() for each in (p, x)]
    _, mean, scale = norm(half[1])
    found = torch.autograd.grad(norm_gradient(*half, mean, scale), half, q.bfloat16())
    for mine, plain in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - plain).norm() < 0.03 * plain.norm()
