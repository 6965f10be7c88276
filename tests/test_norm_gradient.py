"""The gradient of a norm inside a memory: right as often as anybody differentiates it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.operations import operations
from titans_pytorch import NeuralMemory
from titans_pytorch.fast_weights.norms import norm, norm_gradient, projected
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


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": None}, {"spectral_norm_surprises": True}, {"engine": "dense"}],
    ids=["renewed", "one base", "orthogonal steps", "built"],
)
def test_a_memory_with_a_norm_can_be_differentiated_twice(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of loops, as the error of a loop says; it differentiates the norm a third time."""
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(series_elements=0))
    torch.manual_seed(0)
    memory = NeuralMemory(4, 2, **{"batch_size": 4, **options}).double()
    seq = torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda seq: memory(seq)[0], (seq,))


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
