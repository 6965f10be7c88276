"""Losses and memory models by name: gradients, limits, names in files, and sentences for what is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.streams import randn
from titans_pytorch import NeuralMemory, TitansConfig, TitansLMM, losses, memory_models
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.losses import loss_by_name

NAMES = ["mse", "sse", "huber", "huber:0.3", "huber:inf", "yaad", "lp", "lp:1", "lp:2", "lp:4.5", "dot", "cosine"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_losses(name: str) -> None:
    loss = loss_by_name(name)
    prediction, value = randn(4, 5, seed=1).requires_grad_(), randn(4, 5, seed=2)
    (expected,) = torch.autograd.grad(loss(prediction, value).sum(), prediction)
    gradient = losses.gradient_of(loss)
    assert gradient is not None
    assert_close(gradient(prediction, value), expected)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_their_gradients_are_finite_at_zero_twice(name: str) -> None:
    loss = loss_by_name(name)
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(loss(zero, torch.zeros_like(zero)).sum(), zero, create_graph=True)
    assert first.isfinite().all()
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.square().sum() + first.sum(), zero)
        assert second.isfinite().all()


def built(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(6, 2, 2, default_step_transform_max_lr=0.3, **options).double()


def results(**options: Any) -> list[Tensor]:
    memory, seq = built(**options), randn(2, 13, 6).requires_grad_()
    reads, _, (loss, _) = memory(seq, return_surprises=True)
    return [reads, loss, *torch.autograd.grad(reads.square().sum() + loss.sum(), [seq, *memory.parameters()])]


@pytest.mark.parametrize("limit", ["huber:inf", "lp:2", "huber:1e9"])
def test_limits_are_the_mean_squared_error(limit: str) -> None:
    assert_close(results(loss=limit), results(loss="mse"), rtol=1e-9, atol=1e-9)


def test_a_small_threshold_asks_for_directions_alone() -> None:
    """What huber:d is, far away: 2 d |x|, so 2 d of its gradient's size for every feature."""
    prediction, value = randn(3, 4).requires_grad_(), randn(3, 4, seed=1) + 10
    (found,) = torch.autograd.grad(loss_by_name("huber:1e-3")(prediction, value).sum(), prediction)
    assert_close(found, torch.full_like(found, -2e-3 / 4))


def test_the_cosine_does_not_see_lengths_and_the_dot_product_does_not_see_the_memory() -> None:
    prediction, value = randn(3, 4), randn(3, 4, seed=1)
    assert_close(
        loss_by_name("cosine")(7 * prediction, 3 * value),
        loss_by_name("cosine")(prediction, value),
        rtol=1e-4,
        atol=1e-5,
    )
    assert_close(losses.of_dot_product(prediction, value), losses.of_dot_product(2 * prediction, value))


def test_a_linear_memory_with_the_dot_product_is_linear_attention() -> None:
    """W_t = keep W_{t-1} + theta k v^T, however often the base is renewed, as no gradient depends on it."""
    options: dict[str, Any] = dict(model="linear", mem_model_norm_add_residual=False, loss="dot", momentum=False)
    torch.manual_seed(0)
    memory, seq = NeuralMemory(6, 1, max_weight_growth=None, **options).double(), randn(1, 13, 6)
    reads, state, (_, rates) = memory(seq, return_surprises=True)
    assert_close(memory(seq, ttt_batch_size=1)[0], reads)
    stored = memory.store_norm(seq)
    keys, values = memory.to_keys(stored)[0], memory.to_values(stored)[0]
    kept = 1 - memory.to_decay_factor(stored).flatten().sigmoid()
    w = memory.init_weights(1)["weights.0"][0]
    for t in range(13):
        w = kept[t] * w + rates[0, 0, t] * torch.outer(keys[t], values[t])
    assert_close(state.current["weights.0"][0], w)


@pytest.mark.parametrize("name", NAMES)
def test_their_gradients_are_written_out(name: str) -> None:
    assert isinstance(built(loss=name).evolution.model, ClosedMLP)


@pytest.mark.parametrize("name, goes", [("mse", True), ("sse", True), ("huber:inf", False), ("dot", False)])
def test_sums_and_means_of_squares_go_through_loops(name: str, goes: bool) -> None:
    assert built(loss=name).sizes.has_loop == goes


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "hinge",
            "loss must be one of 'cosine', 'dot', 'huber', 'lp', 'mse', 'sse', 'yaad', or huber or lp with a number",
        ),
        ("huber:", "loss 'huber' must have a positive number, or inf behind its colon, got 'huber:'"),
        ("huber:0", "loss 'huber' must have a positive number"),
        ("huber:-1", "loss 'huber' must have a positive number"),
        ("lp:0.5", "loss 'lp' must have a number of at least 1 behind its colon, got 'lp:0.5'"),
        ("lp:inf", "loss 'lp' must have a number of at least 1"),
        ("mse:2", "loss must be one of"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_sentence(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NeuralMemory(6, loss=name)
    with pytest.raises(ValueError, match=f"memory_{words}"):
        TitansConfig(dim=8, depth=1, memory_loss=name)


@pytest.mark.parametrize("loss", ["huber:0.5", "lp", "cosine"])
@pytest.mark.parametrize("model", ["swiglu", "linear"])
def test_names_are_saved(tmp_path: Path, loss: str, model: str) -> None:
    memory, seq = NeuralMemory(6, 2, loss=loss, model=model), torch.randn(1, 9, 6)
    memory.save_pretrained(tmp_path / "memory")
    assert_close(NeuralMemory.from_pretrained(tmp_path / "memory")(seq)[0], memory(seq)[0])
    config = TitansConfig(dim=8, depth=1, heads=2, memory_loss=loss, memory_model=model)
    lm, ids = TitansLMM(5, config), torch.randint(5, (1, 9))
    lm.save_pretrained(tmp_path / "model")
    assert TitansLMM.from_pretrained(tmp_path / "model").config == config
    assert_close(TitansLMM.from_pretrained(tmp_path / "model")(ids).outputs, lm(ids).outputs)


# memory models


@pytest.mark.parametrize("name", memory_models.MODELS)
def test_memory_models_have_names(name: str) -> None:
    """In a memory and in a config, where sizes are what the config says if a model has them."""
    memory = NeuralMemory(8, 2, model=name, mem_model_norm_add_residual=False)
    memory(torch.randn(1, 5, 8))
    assert type(memory.memory_model) is type(memory_models.MODELS[name](8, **({"depth": 1} if name == "mlp" else {})))
    config = TitansConfig(dim=8, depth=1, heads=2, memory_model=name, memory_depth=2, memory_expansion=2.0)
    model = TitansLMM(5, config)
    model.loss(torch.randint(5, (2, 12))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_default_is_the_mlp_by_name() -> None:
    memories = []
    for model in (None, "mlp"):
        torch.manual_seed(0)
        memories.append(NeuralMemory(6, 2, model=model))
    seq = torch.randn(1, 9, 6)
    assert torch.equal(memories[0](seq)[0], memories[1](seq)[0])


def test_arguments_of_a_model_by_name() -> None:
    deep = NeuralMemory(8, model="mlp", default_model_kwargs=dict(depth=3, expansion_factor=1.0))
    assert len(deep.memory_model.model.weights) == 3
    with pytest.raises(TypeError, match="a memory model 'linear' takes no arguments, got depth"):
        NeuralMemory(8, model="linear", default_model_kwargs=dict(depth=3))
    with pytest.raises(TypeError, match="a memory model 'factorized' takes depth, k, got width"):
        NeuralMemory(8, model="factorized", default_model_kwargs=dict(depth=1, width=3))


def test_what_is_no_model_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"model must be an nn.Module or one of 'attention', .*, got 'rnn'"):
        NeuralMemory(8, model="rnn")
    with pytest.raises(TypeError, match="a name, got int"):
        NeuralMemory(8, model=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_model must be one of"):
        TitansConfig(dim=8, depth=1, memory_model="rnn")
    with pytest.raises(ValueError, match="must be new, got 'mlp'"):
        memory_models.register_memory_model("mlp", memory_models.MemoryMLP)


def test_a_linear_memory_of_a_config_is_linear() -> None:
    config = TitansConfig.delta(16, 1, heads=2)
    memory = TitansLMM(5, config).backbone.blocks[0].mixer.memory
    assert "renewals solved for" in memory.plan(1, 100).explain()
    assert isinstance(memory.memory_model, memory_models.MemoryMLP)
    assert memory.rule.forgets_first


def test_gates_of_every_token_forget_as_much() -> None:
    config = TitansConfig(
        dim=16, depth=1, heads=2, memory_chunk=8, memory_refresh=16, token_gates=True, decay_bias=-2.0
    )
    memory = TitansLMM(5, config).backbone.blocks[0].mixer.memory
    assert memory.layout == (1, 1, 16, 1)
    (bias,) = {float(b) for b in memory.to_decay_factor[0].bias.detach()}
    assert (1 - torch.tensor(bias).sigmoid()) ** 8 == pytest.approx(1 - float(torch.tensor(-2.0).sigmoid()), rel=1e-5)
    paper = NeuralMemory.paper(16, 2, token_gates=True)
    assert paper.layout == (1, 1, 16, 1)
    assert not any(gate.varies == "channel" for gate in paper.rule.gates)
