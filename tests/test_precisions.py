"""A memory in half precision: under autocast, as a module of bfloat16, and how far float32 drifts from float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.test_ecosystem import CONFIGURATIONS, memory, tokens
from titans_pytorch import NeuralMemory


def rms_error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


# One batch: renewing the base feeds rounding back through a loop that may amplify it.
CALM = dict(dim=32, dim_head=16, heads=2, chunk_size=4, default_step_transform_max_lr=0.05)


def test_bfloat16_autocast_is_close_and_trains() -> None:
    torch.manual_seed(0)
    built = NeuralMemory(**CALM)
    seq = torch.randn(2, 64, 32)
    expected, _ = built(seq)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = built(seq)
    assert rms_error(got, expected) < 0.02
    assert all(w.dtype == torch.float32 for w in (*state.states[0].values(), *state.states[1].values()))
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (built(tokens(2, 64, 32, seed=step))[0].float() - 1).square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in built.parameters())
        optimizer.step()
    assert all(p.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_bfloat16_module_keeps_its_memory_in_float32(name: str) -> None:
    built = memory(name).bfloat16()
    retrieved, state = built(tokens().bfloat16())
    assert retrieved.dtype == torch.bfloat16
    assert retrieved.isfinite().all()
    for weights in (state.weights, *state.states, dict(state.updates)):
        assert all(w.dtype == torch.float32 for w in weights.values())
    retrieved, _ = built(tokens(2, 3, 6).bfloat16(), state=state)
    retrieved.float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in built.parameters())


def test_a_bfloat16_module_is_close_to_a_float32_one() -> None:
    torch.manual_seed(0)
    built, seq = NeuralMemory(**CALM).bfloat16(), torch.randn(2, 64, 32).bfloat16()
    got, _ = built(seq)
    assert rms_error(got, built.float()(seq.float())[0]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, max_lr", [(None, 0.05), (64, 0.001)])
def test_float32_stays_close_to_float64_over_16k_tokens(batch_size: int | None, max_lr: float) -> None:
    """Where the base is renewed, steps have to be small: an inner loop that diverges is chaotic in any precision."""
    torch.manual_seed(0)
    built = NeuralMemory(16, 16, batch_size, default_step_transform_max_lr=max_lr)
    seq = torch.randn(1, 16_384, 16)
    with torch.no_grad():
        single, _ = built(seq)
        double, _ = built.double()(seq.double())
    assert rms_error(single.double(), double) < 1e-3
    assert rms_error(single[:, -64:].double(), double[:, -64:]) < 1e-3


def test_moving_the_module_moves_the_form_of_its_memory() -> None:
    built = memory()
    assert {p.dtype for p in built.double().memory_model.parameters()} == {torch.float64}
    meta = memory().to("meta")
    assert {p.device.type for p in (*meta.parameters(), *meta.memory_model.parameters())} == {"meta"}
    assert meta(torch.empty(2, 9, 6, device="meta"))[0].shape == (2, 9, 6)
