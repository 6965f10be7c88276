"""Memories whose layers are taught one by one: DeltaTTT by the book, every engine, precision, pieces, the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.support.streams import in_pieces, randn
from tests.test_loop import compare, results
from titans_pytorch import NeuralMemory, TitansBackbone, TitansConfig
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.memory.costs import COSTS

ROWS, TOKENS, WIDTH = 2, 24, 5
FORM: dict[str, Any] = dict(model="layerwise", mem_model_norm_add_residual=False, max_weight_growth=None, loss="sse")


def directions(x: Tensor) -> Tensor:
    return x / ((x**2).sum(dim=-1, keepdim=True) + 1e-6).sqrt()


class Given:
    """What two layers are given: keys, values, queries, first weights, and a step of each layer for every token."""

    def __init__(self) -> None:
        self.keys, self.queries = (F.normalize(randn(ROWS, TOKENS, WIDTH, seed=s), dim=-1) for s in (0, 1))
        self.values, self.a, self.b = randn(ROWS, TOKENS, WIDTH, seed=2), *randn(2, ROWS, WIDTH, WIDTH, seed=3)
        self.alpha, self.beta = torch.rand(
            2, ROWS, TOKENS, generator=torch.Generator().manual_seed(4), dtype=torch.float64
        )
        for tensor in vars(self).values():
            tensor.requires_grad_()

    def gradients(self, found: tuple[Tensor, ...]) -> list[Tensor]:
        total = sum((x * randn(*x.shape, seed=9)).sum() for x in found)
        return list(torch.autograd.grad(total, list(vars(self).values())))


def by_the_book(g: Given) -> tuple[Tensor, Tensor, Tensor]:
    """A <- A + alpha k (v - k A), h = act(k A), B <- B + beta h (v - h B), the A before the token (arXiv 2610.08553)

    Each query sees what came before its token: act(q A) B.  -> reads, last A and B
    """
    reads, last_a, last_b = [], [], []
    for row in range(ROWS):
        a, b, of_row = g.a[row], g.b[row], []
        for t in range(TOKENS):
            of_row.append(directions(F.gelu(g.queries[row, t] @ a)) @ b)
            k, v = g.keys[row, t], g.values[row, t]
            h = directions(F.gelu(k @ a))
            a = a + g.alpha[row, t] * torch.outer(k, v - k @ a)
            b = b + g.beta[row, t] * torch.outer(h, v - h @ b)
        reads.append(torch.stack(of_row))
        last_a.append(a)
        last_b.append(b)
    return torch.stack(reads), torch.stack(last_a), torch.stack(last_b)


def by_the_library(g: Given, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    engine = NeuralMemory(WIDTH, 1, 1, **FORM, momentum=False, per_parameter_gates=True).evolution
    rates = PerParameter({"weights.0": g.alpha[..., None] / 2, "weights.1": g.beta[..., None] / 2}, False)
    gates = PerParameter.shared(rates.each, Gates({"keep": torch.zeros(1, ROWS, TOKENS).double()}, {}, None))
    writes = Writes(g.keys[:, :, None], g.values[:, :, None], rates, gates, {}, None, {})
    weights = {"weights.0": g.a, "weights.1": g.b}
    block, _ = engine.store_solved(Carry(weights, weights, {}, {}), writes, num_blocks)
    reads = engine.read(block, g.queries[:, :, None], slice(0, TOKENS), {}).squeeze(2)
    return reads, *block.finish().weights.values()


@pytest.mark.parametrize("num_blocks", [1, 3, 24])
def test_it_is_deltattt_token_by_token(num_blocks: int) -> None:
    g = Given()
    found, expected = by_the_library(g, num_blocks), by_the_book(g)
    assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert_close(g.gradients(found), g.gradients(expected), rtol=1e-10, atol=1e-10)


def memory(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory.delta(64, heads=2, model="layerwise", per_parameter_gates=True, **options)


def test_every_way_gives_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    built, seq = memory(momentum=True).double(), randn(2, 90, 64)
    solved = results(built, seq)
    assert "renewals solved for" in built.plan(2, 90).explain()
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(solved_writes=(0, 0)))
    compare(results(built, seq), solved, 1e-9)
    for engine in ("dense", "general"):
        other = memory(momentum=True, engine=engine).double()
        compare(results(other, seq), solved, 1e-9)


def test_pieces_give_what_one_call_gives() -> None:
    built, seq = memory().double(), randn(2, 100, 64)
    expected, _ = built(seq)
    for lengths in ([1] * 5 + [95], [33, 32, 35]):
        assert_close(in_pieces(built, seq, lengths)[0], expected, rtol=1e-9, atol=1e-9)


def test_float32_stays_near_float64() -> None:
    built, seq = memory(), torch.randn(2, 1024, 64)
    found = results(built, seq)
    compare(found, results(built.double(), seq.double()), 2e-4)


def test_what_is_not_finite_reaches_nothing_before_it() -> None:
    built, seq = memory(), torch.randn(2, 80, 64)
    clean = built(seq)[0]
    seq[0, 20] = torch.nan
    reads = built(seq)[0]
    assert torch.equal(reads[0, :20], clean[0, :20])
    assert_close(reads[1], clean[1])
    assert reads[0, 20:].isnan().all()


def test_models_of_the_family_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Engine.store_solved
    monkeypatch.setattr(Engine, "store_solved", lambda *args: calls.append(1) or original(*args))
    config = TitansConfig.delta(16, 1, heads=2, window=8, memory_model="layerwise", memory_depth=3)
    model, x = TitansBackbone("mag", config).double(), randn(2, 30, 16)
    whole = model(x).outputs
    assert_close(in_pieces(model, x, [7, 1, 22])[0], whole, rtol=1e-9, atol=1e-9)
    assert calls


def test_what_it_cannot_be_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="a layerwise memory needs mem_model_norm_add_residual=False"):
        NeuralMemory(8, model="layerwise")
    with pytest.raises(ValueError, match="a layerwise memory needs a loss of the library by name"):
        NeuralMemory(
            8, model="layerwise", mem_model_norm_add_residual=False, store_memory_loss_fn=lambda p, v: (p - v).mean(-1)
        )
