"""What memories are surprised by is collected while a model runs as ever, and storing can be given a price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.training_runs import logged, text, train, weights
from titans_pytorch import NeuralMemory, TitansConfig, TitansMAG, recorded_surprises, storing_costs, writes_off
from titans_pytorch.memory.costs import COSTS
from titans_pytorch.memory.recorded import mean_step

SEQ = torch.randn(2, 40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CONFIG = TitansConfig(dim=16, depth=2, window=8, heads=2, memory_chunk=4, memory_refresh=8)


@pytest.fixture
def memory() -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(8, 4, batch_size=8, heads=2, dim_head=4).double()


@pytest.fixture
def model() -> TitansMAG:
    torch.manual_seed(0)
    return TitansMAG(32, CONFIG).double()


def ids_of(rows: int = 2, tokens: int = 33) -> Tensor:
    return torch.randint(0, 32, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_every_call_gives_what_it_would_return(memory: NeuralMemory) -> None:
    first, state = memory(SEQ[:, :18])
    with recorded_surprises(memory) as found:
        again, after = memory(SEQ[:, :18])
        memory(SEQ[:, 18:], state=after)
    *_, expected = memory(SEQ[:, :18], return_surprises=True)
    *_, and_then = memory(SEQ[:, 18:], state=state, return_surprises=True)
    assert_close(again, first, rtol=0, atol=0)
    assert_close([tuple(each) for each in found], [expected, and_then], rtol=0, atol=0)


def test_who_asks_for_surprises_gets_them_and_afterwards_nothing_is_collected(memory: NeuralMemory) -> None:
    with recorded_surprises(memory) as found:
        _, _, (loss, steps) = memory(SEQ, return_surprises=True)
        with pytest.raises(ValueError, match="features"):
            memory(SEQ[..., :4])
        assert len(memory(SEQ)) == 2
    memory(SEQ)
    assert len(found) == 2
    assert_close(tuple(found[0]), (loss, steps), rtol=0, atol=0)


def test_all_memories_of_a_model_are_heard(model: TitansMAG) -> None:
    with recorded_surprises(model) as found:
        model.loss(ids_of())
    persistent, read = (2, 2, CONFIG.num_persistent), (2, 2, 32)
    assert [each.steps.shape for each in found] == [persistent, read] * 2
    assert all(each.loss.shape == each.steps.shape for each in found)
    assert_close(mean_step(found), torch.cat([each.steps.flatten() for each in found]).mean())


def gradients_of(model: TitansMAG, cost: float) -> dict[str, Tensor]:
    """Of the cost alone."""
    model.zero_grad()
    with storing_costs(model, cost) as so_far:
        loss = model.loss(ids_of())
    total = loss * 0 + so_far()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_cost_bears_on_step_sizes_and_on_what_they_are_made_from(model: TitansMAG) -> None:
    found = gradients_of(model, 2.0)
    moved = {name for name, grad in found.items() if grad.abs().max() > 0}
    assert all(f"backbone.blocks.{n}.mixer.memory.to_adaptive_step.0.bias" in moved for n in (0, 1))
    last = {name for name in moved if name.startswith("backbone.blocks.1.mixer.")}
    assert {name.split(".", 4)[-1] for name in last} == {
        *("memory.to_adaptive_step.0.weight", "memory.to_adaptive_step.0.bias"),
        *("memory.store_norm.weight", "persistent"),
    }
    assert_close(found, {name: 2 * grad for name, grad in gradients_of(model, 1.0).items()})


def test_a_cost_of_nothing_is_nothing(model: TitansMAG) -> None:
    with storing_costs(model, 0.0) as cost:
        model.loss(ids_of())
    assert cost() == 0
    with storing_costs(model, 1.0) as cost, writes_off(model):
        model.loss(ids_of())
    assert cost() == 0
    with storing_costs(torch.nn.Linear(2, 2), 1.0) as cost:
        pass
    assert cost() == 0


@pytest.mark.parametrize(
    "cost, error, message",
    [(-1.0, ValueError, "cost must be at least 0, got -1.0"), ("1", TypeError, "cost must be a number, got '1'")],
)
def test_a_price_is_a_number_of_at_least_zero(cost: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), storing_costs(torch.nn.Linear(2, 2), cost):
        pass


def test_the_gradient_of_a_cost_survives_spans_that_are_computed_again(
    model: TitansMAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients_of(model, 1.0)
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(kept_elements=1, span_tokens=64))
    assert_close(gradients_of(model, 1.0), expected)


def test_the_gradient_of_a_cost_survives_checkpointing(memory: NeuralMemory) -> None:
    def gradient(checkpoints: bool) -> Tensor:
        memory.zero_grad()
        with storing_costs(memory, 1.0) as cost:
            read = checkpoint(lambda seq: memory(seq)[0], SEQ, use_reentrant=False) if checkpoints else memory(SEQ)[0]
        (read.mean() + cost()).backward()
        grad = memory.to_adaptive_step[0].weight.grad
        assert grad is not None
        return grad.clone()

    assert_close(gradient(True), gradient(False))


def test_training_with_a_cost_stores_less_and_reports_the_loss_alone(tmp_path: Path) -> None:
    data = text(tmp_path / "text.txt")
    options = ["--steps", "6", "--lr", "0.01", "--warmup", "0", "--lr-end", "1"]
    assert train(tmp_path / "free", data, *options) == 0
    assert train(tmp_path / "dear", data, *options, "--step-cost", "100") == 0
    free, dear = logged(tmp_path / "free"), logged(tmp_path / "dear")
    assert dear[0] == free[0]  # the cost begins at nothing
    assert abs(dear[2]["loss"] - free[2]["loss"]) < 1

    def gate(name: str) -> float:
        found = {
            key: value for key, value in weights(tmp_path / name).items() if key.endswith("to_adaptive_step.0.bias")
        }
        return float(torch.stack([value.mean() for key, value in found.items() if "optimizer" not in key]).mean())

    assert gate("dear") < gate("free") - 0.01
