"""Every option, engine and split against the oracle: outputs, reports, final state and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.testing import assert_close

from tests.support.configurations import Case, build, by_oracle, cases, inputs
from tests.support.streams import pieces
from titans_pytorch import NeuralMemory
from titans_pytorch.memory.costs import COSTS

VALUES = dict(rtol=1e-9, atol=1e-9)
GRADIENTS = dict(rtol=1e-7, atol=1e-7)


def previous_layer(case: Case) -> NeuralMemory | None:
    """Whose weights a weight residual takes."""
    if not case.options["accept_weight_residual"]:
        return None
    memory = build(case, accept_weight_residual=False)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(1.1)
    return memory


def streamed(case: Case, memory: NeuralMemory, previous: NeuralMemory | None, fed: Any) -> dict[str, Any]:
    """Feed a sequence in the pieces of the case, each with the state that the piece before it returned."""
    state, before = None, None
    parts: list[tuple[Tensor, ...]] = []
    for stretch in pieces(case.split):
        piece, call = fed.piece(stretch), {}
        if previous is not None:
            _, before = previous(**piece, state=before)
            call["prev_weights"] = before
        retrieved, state, (loss, rates) = memory(**piece, state=state, return_surprises=True, **call)
        parts.append((retrieved, loss, rates))
    retrieved, loss, rates = (
        torch.cat(part, dim=axis) for part, axis in zip(zip(*parts, strict=True), (1, 2, 2), strict=True)
    )
    return {
        "retrieved": retrieved,
        "loss": loss,
        "rates": rates,
        "base": state.weights,
        "last": state.states[0],
        "momenta": state.states[1],
    }


def gradients_of(result: dict[str, Any], wanted: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Of a random sum of outputs, losses and the final state."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [result["retrieved"], result["loss"], *result["last"].values(), *result["momenta"].values()]
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in tensors)
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(wanted.items(), found, strict=True)}


def streamed_without_gradients(case: Case, *args: Any) -> dict[str, Any]:
    """The same where no backward pass can follow: loops read while they run, one or a few renewals at a time."""
    read_elements = (1, 400, COSTS["cpu"].read_elements)[case.seed % 3]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(read_elements=read_elements))
        return streamed(case, *args)


def check(case: Case) -> None:
    memory, previous, fed = build(case), previous_layer(case), inputs(case)
    prev_updates = (
        None if previous is None else by_oracle(case, previous, fed, None, accept_weight_residual=False).updates
    )
    expected = vars(by_oracle(case, memory, fed, prev_updates))
    got = streamed(case, memory, previous, fed)
    without = streamed_without_gradients(case, memory, previous, fed)
    for name in ("retrieved", "loss", "rates", "base", "last", "momenta"):
        assert_close(got[name], expected[name], msg=lambda m, name=name: f"{name}: {m}", **VALUES)
        assert_close(without[name], expected[name], msg=lambda m, name=name: f"{name}, no gradient: {m}", **VALUES)

    wanted = dict(memory.named_parameters()) | {"seq": fed.seq}
    if previous is not None:
        wanted |= {f"previous {name}": p for name, p in previous.named_parameters()}
    if fed.store_seq is not None:
        wanted["store_seq"] = fed.store_seq
    left, right = (gradients_of(result, wanted, case.seed) for result in (got, expected))
    for name in wanted:
        scale = max(1.0, right[name].abs().max().item())
        assert_close(left[name] / scale, right[name] / scale, msg=lambda m, name=name: f"grad {name}: {m}", **GRADIENTS)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_of_any_configuration_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_many_more_configurations_equal_the_oracle(case: Case) -> None:
    check(case)
