"""Residual streams against the package hyper-connections, which makes their parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from benchmarks.operations import operations
from tests.support.streams import disturbed
from titans_pytorch.mac import gradients
from titans_pytorch.mac.gradients import added, coefficients, mixed, with_lengths
from titans_pytorch.mac.residual_streams import (
    SINKHORN_ITERATIONS,
    combined,
    doubly_stochastic,
    expand,
    make_connection,
    make_expansion,
    open_branch,
)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("writes", [True, False])
def test_streams_are_those_of_the_package(count: int, writes: bool) -> None:
    torch.manual_seed(0)
    connect, package_expand, package_reduce = mc_get_init_and_expand_reduce_stream_functions(
        count, dim=6, add_stream_embed=True, disable=count == 1, sinkhorn_iters=20
    )
    connection = connect(layer_index=1, add_branch_out_to_residual=writes)
    disturbed(nn.ModuleList((connection, package_expand)), 0.5)
    x, answer = torch.randn(2, 2, 5, 6)

    streams = expand(package_expand, x)
    packed = package_expand(x)
    assert_close(rearrange(streams, "b n s d -> (b s) n d"), packed)
    branch, (package_input, add) = open_branch(connection, streams), connection(packed)
    assert_close(branch.input, package_input, rtol=1e-5, atol=1e-5)
    if writes:
        written = branch.add(answer)
        assert_close(rearrange(written, "b n s d -> (b s) n d"), add(answer), rtol=1e-5, atol=1e-5)
        assert_close(written.sum(dim=2), package_reduce(add(answer)), rtol=1e-5, atol=1e-5)
    elif count > 1:
        assert branch.streams is streams


def test_rows_and_columns_sum_to_one() -> None:
    mixing = doubly_stochastic(torch.randn(3, 4, 4, dtype=torch.float64))
    assert_close(mixing.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert_close(mixing.sum(-2), torch.ones(3, 4, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert doubly_stochastic(torch.full((4, 4), -1e4)).isfinite().all()
    assert doubly_stochastic(1e3 * torch.randn(5, 4, 4)).isfinite().all()


def test_scaling_takes_one_operation_for_rows_and_one_for_columns() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert operations(lambda: doubly_stochastic(logits.detach())) == 2 * SINKHORN_ITERATIONS + 1
    gradient = torch.randn_like(logits)
    both = operations(lambda: torch.autograd.grad(doubly_stochastic(logits), logits, gradient))
    assert both == 2 * (2 * SINKHORN_ITERATIONS + 1)


def streams_and_map() -> tuple[Tensor, Tensor, Tensor]:
    """Streams, of which one vector is zero and one is shorter than any that is divided by, a map and its constants."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 3, 2, 4), (5, 4), (2, 5)))
    x[0, 0, 0], x[0, 1, 1] = 0.0, 1e-14 * x[0, 1, 1]
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def streams_and_answer() -> tuple[Tensor, Tensor, Tensor]:
    """Streams, what is added to them, and the share of each."""
    shapes = ((1, 3, 2, 4), (1, 3, 1, 4), (1, 3, 2, 1))
    streams, answer, shares = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return streams, answer, shares


def mixed_in_pairs(streams: Tensor, answer: Tensor, shares: Tensor) -> Tensor:
    """Two candidates, for `mixed`."""
    return mixed(shares.mT, [streams[:, :, 0], answer.squeeze(2)])


def test_gradients_by_hand_are_those_of_autograd() -> None:
    """Also of a vector of no length, and of one so short that it is not divided by its length."""
    of_map, of_sum = streams_and_map(), streams_and_answer()
    streams, answer, shares = of_sum
    for by_hand, by_autograd, inputs in (
        (coefficients(*of_map), with_lengths(*of_map)[0], of_map),
        (added(*of_sum), streams.addcmul(answer, shares, value=2), of_sum),
    ):
        assert torch.equal(by_hand, by_autograd)
        later = torch.randn_like(by_hand)
        assert_close(torch.autograd.grad(by_hand, inputs, later), torch.autograd.grad(by_autograd, inputs, later))


def test_gradients_by_hand_can_be_differentiated_themselves() -> None:
    x, weight, bias = streams_and_map()
    longer = (x.detach() + 0.5).requires_grad_()  # a length of zero has no second derivative
    assert torch.autograd.gradgradcheck(coefficients, (longer, weight, bias))
    assert torch.autograd.gradgradcheck(added, streams_and_answer())


@pytest.mark.parametrize("together", [1, 2**20], ids=["one by one", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_mixed_under_autocast_as_by_autograd(
    together: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax gives weights in float32 on some devices, and in half precision on others."""
    monkeypatch.setattr(gradients, "TOGETHER", together)
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 3, 5, dtype=dtype, requires_grad=True)
    candidates = [torch.randn(2, 3, 2, dtype=kind, requires_grad=True) for kind in (torch.float32, torch.bfloat16)] * 2
    candidates.append(torch.randn(2, 3, 2, requires_grad=True))
    inputs = (weights, *candidates)
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = mixed(weights, candidates)
        by_autograd = weights @ torch.stack([candidate.float() for candidate in candidates], dim=2)
    assert by_hand.dtype == by_autograd.dtype == torch.bfloat16
    assert_close(by_hand, by_autograd, rtol=0.02, atol=0.05)
    later = torch.randn_like(by_hand)
    found = torch.autograd.grad(by_hand, inputs, later)
    assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in inputs]
    assert_close(found, torch.autograd.grad(by_autograd, inputs, later), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("carried", [coefficients, added, mixed_in_pairs])
def test_derivatives_can_be_carried_forward(carried: Callable[..., Tensor]) -> None:
    inputs = streams_and_map() if carried is coefficients else streams_and_answer()
    moves = tuple(torch.randn_like(tensor) for tensor in inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, move) for tensor, move in zip(inputs, moves, strict=True)]
        found = forward_ad.unpack_dual(carried(*duals)).tangent
    _, expected = torch.func.jvp(carried, tuple(tensor.detach() for tensor in inputs), moves)
    assert_close(found, expected)


@pytest.mark.parametrize("together", [1, 30, 2**20], ids=["one by one", "some", "all"])
def test_views_are_mixed_by_hand_as_at_once(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "TOGETHER", together)
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    candidates = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    inputs = (weights, *candidates)
    by_hand, by_autograd = mixed(weights, candidates), weights @ torch.stack(candidates, dim=2)
    assert_close(by_hand, by_autograd)
    with torch.no_grad():
        assert_close(mixed(weights, candidates), by_autograd)
    later = torch.randn_like(by_hand)
    assert_close(torch.autograd.grad(by_hand, inputs, later), torch.autograd.grad(by_autograd, inputs, later))
    assert torch.autograd.gradgradcheck(lambda weights, *candidates: mixed(weights, list(candidates)), inputs)


def test_gradients_by_hand_take_fewer_operations() -> None:
    of_map, of_sum = streams_and_map(), streams_and_answer()
    streams, answer, shares = of_sum

    def backward(out: Tensor, inputs: tuple[Tensor, ...]) -> int:
        gradient = torch.ones_like(out)
        return operations(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))

    assert backward(coefficients(*of_map), of_map) == 14
    assert backward(with_lengths(*of_map)[0], of_map) == 19
    assert backward(added(*of_sum), of_sum) == 4
    assert backward(streams.addcmul(answer, shares, value=2), of_sum) == 6


@pytest.mark.parametrize("writes", [True, False])
def test_what_tokens_do_not_change_can_be_known_before(writes: bool) -> None:
    connection = disturbed(make_connection(3, dim=6, number=1, writes=writes), 0.5)
    streams = torch.randn(2, 5, 3, 6)
    assert_close(open_branch(connection, streams, combined(connection)), open_branch(connection, streams))
    with torch.no_grad():
        known = combined(connection)
        saved = operations(lambda: combined(connection))
        assert operations(lambda: open_branch(connection, streams, known)) == (48 if writes else 7)
        assert operations(lambda: open_branch(connection, streams)) == (48 if writes else 7) + saved


@pytest.mark.parametrize("writes", [True, False])
def test_the_package_still_has_the_parameters_that_are_computed_with(writes: bool) -> None:
    connection = make_connection(3, dim=6, number=1, writes=writes)
    expected = {
        "norm.gamma": (6,),
        "static_alpha": (3, 4),
        "dynamic_alpha_fn": (1, 6, 4),
        "pre_branch_scale": (1,),
        "residual_scale": (1,),
    }
    if writes:
        expected |= {"static_beta": (3,), "dynamic_beta_fn": (6,), "h_post_scale": ()}
    assert {name: tuple(parameter.shape) for name, parameter in connection.named_parameters()} == expected
    assert connection.add_branch_out_to_residual is writes
    assert connection.static_alpha[1 % 3, 0] == 1  # the stream that this branch reads first
    assert make_expansion(3, dim=6).stream_embed.shape == (3, 6)
