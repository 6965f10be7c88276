"""Memory models: what ours compute, what a user may bring and which engine runs it, and what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.support.oracle import oracle
from tests.support.streams import randn
from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    ResidualNorm,
)

D = 4


# ours: names, shapes, formulas

SHAPES: dict[str, tuple[nn.Module, dict[str, tuple[int, ...]]]] = {
    "mlp": (MemoryMLP(6, depth=3), {"weights.0": (6, 12), "weights.1": (12, 12), "weights.2": (12, 6)}),
    "linear": (MemoryMLP(6, depth=1), {"weights.0": (6, 6)}),
    "gated": (
        GatedResidualMemoryMLP(6, depth=1),
        {"final_proj": (6, 6), "weights.0.0": (6, 24), "weights.0.1": (24, 6), "weights.0.2": (12, 6)},
    ),
    "factorized": (
        FactorizedMemoryMLP(6, depth=2),
        {"weights.0.0": (6, 32), "weights.0.1": (32, 6), "weights.1.0": (6, 32), "weights.1.1": (32, 6)},
    ),
    "swiglu": (MemorySwiGluMLP(6), {"weights.0.0": (6, 32), "weights.0.1": (16, 6), "norm.gamma": (6,)}),
    "attention": (
        MemoryAttention(6),
        {**{f"weights.{i}": (6, 6) for i in range(3)}, "weights.3": (6, 12), "weights.4": (12, 6)},
    ),
    "residual": (ResidualNorm(6, MemoryMLP(6, depth=1)), {"norm.gamma": (6,), "model.weights.0": (6, 6)}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_names_order_and_shapes_of_the_parameters(name: str) -> None:
    model, expected = SHAPES[name]
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == expected
    assert [key for key, _ in model.named_parameters()] == list(expected)
    assert not list(model.buffers())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6), (2, 1, 6)])
def test_any_leading_axes(name: str, shape: tuple[int, ...]) -> None:
    model, x = SHAPES[name][0], torch.randn(shape)
    out = model(x)
    assert out.shape == x.shape
    alone = torch.stack([model(part) for part in x.reshape(-1, *shape[-2:])])
    assert_close(out, alone.reshape(shape))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_formulas() -> None:
    x = randn(3, D)
    for model in (MemoryMLP(D, 2), ResidualNorm(D, MemoryMLP(D, 2))):
        w = [p.detach() for p in model.double().parameters()][-2:]
        out = gelu(x @ w[0]) @ w[1]
        assert_close(model(x), out if isinstance(model, MemoryMLP) else layer_norm(out) + x)
    w = list(factorized.double().parameters()) if (factorized := FactorizedMemoryMLP(D, 2, k=3)) else []
    assert_close(factorized(x), gelu(x @ w[0] @ w[1]) @ w[2] @ w[3])
    gated = GatedResidualMemoryMLP(D, 1).double()
    final, w0, w1, w2 = gated.parameters()
    out = gelu(x @ w0) @ w1
    gate = (torch.cat((out, x), -1) @ w2).sigmoid()
    assert_close(gated(x), (x + gate * (out - x)) @ final)
    swiglu = MemorySwiGluMLP(D).double()
    w0, w1, gamma = swiglu.parameters()
    hidden, gate = (x @ w0).chunk(2, -1)
    assert_close(swiglu(x), layer_norm(x + (hidden * gelu(gate)) @ w1) * (gamma + 1))
    attention = MemoryAttention(D).double()
    q, k, v, w0, w1 = attention.parameters()
    scores = F.normalize(x @ q, dim=-1) @ F.normalize(x @ k, dim=-1).T * 8
    weights = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    assert_close(attention(x), weights @ (x @ v) + gelu(x @ w0) @ w1)


def test_weights_start_xavier_uniform() -> None:
    torch.manual_seed(0)
    for weight in MemoryMLP(60, depth=2).parameters():
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound


# a user's own: the engine that is chosen, and the answer of the oracle


class Affine(nn.Module):
    """Matrix from the left with a bias, as a user would write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D) / 2), nn.Parameter(torch.randn(D) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.mT).mT + self.bias


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(torch.randn(D, 5) / 2), nn.Parameter(torch.randn(D, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...i,ij->...j", x, self.into).sin()
        return torch.einsum("...j,ij->...i", hidden, self.out)


class Tied(nn.Module):
    """Encoder and decoder share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh() @ self.weight.T


class TiedLayers(nn.Module):
    """One `nn.Parameter` registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(D, D) / 2), nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.weight) + self.shift


class Experts(nn.Module):
    """A parameter with three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.gate = nn.Parameter(torch.randn(3, D, D) / 2), nn.Parameter(torch.randn(D, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eij,...e->...j", x, self.weights, (x @ self.gate).softmax(-1))


class Cosine(nn.Module):
    """Normalises its weight: not a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / self.weight.norm(dim=0, keepdim=True))


class RunningSum(nn.Module):
    """Mixes tokens, causally."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weight).tanh()).cumsum(dim=-2)


class Unused(nn.Module):
    """A parameter that nothing depends on is only forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.extra = nn.Parameter(torch.randn(D, D) / 2), nn.Parameter(torch.randn(D, D) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


OWN: dict[str, tuple[Any, str]] = {
    "nn.Linear": (lambda: nn.Linear(D, D), "factored"),
    "nn.Linear without bias": (lambda: nn.Linear(D, D, bias=False), "factored"),
    "nn.Sequential": (lambda: nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D)), "factored"),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D, eps=1e-5)), "factored"),
    "nn.PReLU": (lambda: nn.Sequential(nn.Linear(D, 6), nn.PReLU(), nn.Linear(6, D)), "general"),
    "matrix from the left": (Affine, "factored"),
    "einsum": (Einsum, "factored"),
    "tied from both sides": (Tied, "factored"),
    "tied layers": (TiedLayers, "factored"),
    "scalars": (Scalars, "factored"),
    "three axes": (Experts, "general"),
    "not a product": (Cosine, "general"),
    "mixes tokens": (RunningSum, "factored"),
    "unused": (Unused, "factored"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_own_model(name: str) -> None:
    make, engine = OWN[name]
    torch.manual_seed(0)
    options = dict(dim=6, dim_head=D, heads=2, chunk_size=3, batch_size=6)
    memory = NeuralMemory(**options, model=make()).double()
    assert memory.engine == engine
    seq = randn(2, 10, 6).requires_grad_()
    expected = oracle(dict(memory.named_parameters()), memory.memory_model, seq, **options, max_weight_growth=10.0)
    retrieved, state = memory(seq[:, :4])
    rest, state = memory(seq[:, 4:], state=state)
    retrieved = torch.cat((retrieved, rest), dim=1)
    assert_close(retrieved, expected.retrieved, rtol=1e-9, atol=1e-10)
    assert_close(state.states[0], expected.last, rtol=1e-9, atol=1e-10)
    wanted, probe = [seq, *(p for p in memory.parameters())], randn(2, 10, 6, seed=3)
    got, right = (
        torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (retrieved, expected.retrieved)
    )
    assert_close(got, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "linear", "gated", "factorized", "swiglu", "attention"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_ours_are_all_factored_and_spectral_steps_are_built(name: str, wrapped: bool) -> None:
    options = dict(model=SHAPES[name][0], mem_model_norm_add_residual=wrapped)
    assert NeuralMemory(6, 2, **options).engine == "factored"
    assert NeuralMemory(6, 2, **options, spectral_norm_surprises=True).engine == "dense"
    assert NeuralMemory(6, 2, **options, engine="general").engine == "general"


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_an_engine_that_cannot_run_a_model_is_refused(engine: str) -> None:
    with pytest.raises(ValueError, match=f"(?=.*{engine})(?=.*general)"):
        NeuralMemory(D, 2, model=Cosine(), engine=engine)


def test_looking_at_a_model_leaves_it_and_the_random_state_alone() -> None:
    model = nn.Linear(D, D)
    before, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    NeuralMemory(D, 2, model=model)
    torch.manual_seed(5)
    first = NeuralMemory(D, 2).to_keys.weight
    torch.manual_seed(5)
    assert torch.equal(first, NeuralMemory(D, 2).to_keys.weight)
    torch.random.set_rng_state(state)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# what cannot be a memory


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TwoSided(nn.Module):
    """Attention without a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight @ x.mT).softmax(-1) @ x


class BatchMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight - (x.mean(dim=0, keepdim=True) if x.ndim > 2 else 0)


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ self.weight + y


class GivesTuple(TakesTwo):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return x @ self.weight, None


class Branches(TakesTwo):
    """Looks at numbers, which cannot be done for many memories at once."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x @ self.weight.tanh() if self.weight.sum().item() > 0 else x @ self.weight.sin()


def integers() -> nn.Module:
    model = nn.Linear(D, D)
    model.table = nn.Parameter(torch.zeros(D, dtype=torch.long), requires_grad=False)
    return model


UNFIT: dict[str, tuple[Any, str]] = {
    "buffers": (Counter, "buffers.*steps"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)), "buffers.*running_mean"),
    "dropout": (lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)), "deterministic.*dropout"),
    "not causal": (TwoSided, "causal"),
    "another shape": (lambda: nn.Linear(D, D + 1), rf"keep the shape.*\(3, {D + 1}\)"),
    "another input width": (lambda: nn.Linear(D + 1, D), "fails on inputs"),
    "no parameters": (nn.Identity, "no parameters"),
    "mixes the batch": (BatchMean, "batch"),
    "two arguments": (TakesTwo, "fails on inputs"),
    "a tuple": (GivesTuple, "keep the shape.*tuple"),
    "a branch on numbers": (Branches, "vmap"),
    "integers": (integers, "floating-point.*table"),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_a_memory_is_refused_with_the_reason(name: str, residual: bool) -> None:
    make, reason = UNFIT[name]
    if residual and name in ("another shape", "a tuple"):
        reason = "fails on inputs|keep the shape|memory model"
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        NeuralMemory(D, 2, model=make(), mem_model_norm_add_residual=residual)


def test_dropout_that_is_switched_off_is_fine() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)).eval()
    memory = NeuralMemory(D, 2, model=model)
    seq = torch.randn(1, 6, D)
    for mode in (True, False):  # training the network around it does not switch the memory's dropout on
        memory.train(mode)
        assert torch.equal(memory(seq)[0], memory(seq)[0])


@torch.no_grad()
def test_a_matrix_that_two_layers_share_learns_from_both() -> None:
    """As it does where nothing is known of the model; the gradient that is written out is for matrices of their own."""
    torch.manual_seed(0)
    shared = MemoryMLP(6, depth=2, expansion_factor=1.0)
    shared.weights[1] = shared.weights[0]
    answers = []
    for engine in ("factored", "general"):
        torch.manual_seed(1)
        memory = NeuralMemory(6, chunk_size=4, batch_size=8, model=shared, engine=engine).double()  # type: ignore[arg-type]
        answers.append(memory(torch.randn(2, 21, 6, dtype=torch.float64))[0])
    assert_close(*answers, rtol=1e-9, atol=1e-10)
