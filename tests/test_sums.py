"""Sums over the chunks of a block, and their gradients that are written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_pytorch.fast_weights.blocks.sums import Parts, Steps, sums, sums_and_last
from titans_pytorch.fast_weights.surprises import Factors

ROWS, SUMS, CHUNKS = 2, 4, 3
SHAPES = {"numbers": (), "vectors": (5,), "matrices": (5, 2)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def drawn(kind: str, num_parts: int) -> tuple[Tensor, Steps, Parts]:
    torch.manual_seed(0)
    shape = SHAPES["matrices" if kind == "factors" else kind]
    parts = [(random(ROWS, SUMS), random(ROWS, *shape)) for _ in range(num_parts)]
    factors = Factors(random(ROWS, CHUNKS, 3, 5), random(ROWS, CHUNKS, 3, 2))
    return random(ROWS, SUMS, CHUNKS), factors if kind == "factors" else random(ROWS, CHUNKS, *shape), parts


def leaves(share: Tensor, steps: Steps, parts: Parts) -> list[Tensor]:
    given = list(steps) if isinstance(steps, Factors) else [steps]
    return [share, *given, *(tensor for part in parts for tensor in part)]


@pytest.mark.parametrize("num_parts", [0, 1, 2])
@pytest.mark.parametrize("kind", [*SHAPES, "factors"])
def test_sums_and_their_gradients_are_those_of_plain_formulas(kind: str, num_parts: int) -> None:
    """Whatever of them is used: all sums, the last alone, or both."""
    share, steps, parts = drawn(kind, num_parts)
    given = leaves(share, steps, parts)
    expected = sums(share, steps.matrices() if isinstance(steps, Factors) else steps, parts)
    found, last = sums_and_last(share, steps, parts)
    assert torch.equal(found, expected)
    assert torch.equal(last, expected[:, -1])
    pairs = [(found.sin(), expected.sin()), (last.sin(), expected[:, -1].sin())]
    pairs.append(
        (torch.cat((found, last.unsqueeze(1)), dim=1).cos(), torch.cat((expected, expected[:, -1:]), dim=1).cos())
    )
    for mine, plain in pairs:
        later = torch.randn_like(mine)
        assert_close(
            torch.autograd.grad(mine, given, later, retain_graph=True),
            torch.autograd.grad(plain, given, later, retain_graph=True),
        )


@pytest.mark.parametrize("kind", ["vectors", "factors"])
def test_gradients_of_sums_are_differentiable_again(kind: str) -> None:
    share, steps, parts = drawn(kind, 2)

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        share, *rest = given
        made = Factors(*rest[:2]) if kind == "factors" else rest[0]
        first = 2 if kind == "factors" else 1
        return sums_and_last(share, made, [(rest[first], rest[first + 1]), (rest[first + 2], rest[first + 3])])

    assert torch.autograd.gradgradcheck(run, leaves(share, steps, parts))


@pytest.mark.parametrize("kind", ["vectors", "factors"])
def test_many_gradients_of_sums_can_be_asked_for_at_once(kind: str) -> None:
    share, steps, parts = drawn(kind, 2)
    found, last = sums_and_last(share, steps, parts)
    total, many = found.sin() + last.sin().unsqueeze(1), torch.randn(3, *found.shape, dtype=found.dtype)
    given = leaves(share, steps, parts)
    at_once = torch.autograd.grad(total, given, many, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(total, given, each, retain_graph=True) for each in many]
    assert_close(at_once, tuple(map(torch.stack, zip(*one_by_one, strict=True))))


def test_what_needs_no_gradient_gets_none() -> None:
    share, steps, parts = drawn("factors", 1)
    found, last = sums_and_last(share.detach(), Factors(*(factor.detach() for factor in steps)), parts)
    (found.sum() + last.sum()).backward()
    assert share.grad is None
    assert all(factor.grad is None for factor in steps)
    assert_close(parts[0][1].grad, (parts[0][0].sum(dim=1) + parts[0][0][:, -1])[:, None, None].expand(ROWS, 5, 2))


def test_steps_that_are_products_are_not_kept() -> None:
    """A graph holds their factors, which are small."""
    share, _, _ = drawn("factors", 0)
    left, right = (torch.randn(ROWS, CHUNKS, 1, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, _ = sums_and_last(share, Factors(left, right))
    kept = [tensor.untyped_storage().nbytes() for tensor in found.grad_fn.saved_tensors]
    assert sum(kept) < found.numel() * found.element_size() / 10
