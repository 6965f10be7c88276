"""A linear memory that is solved for is the delta rule of the papers, written token by token from their equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.support.streams import randn
from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.rules.gates import Gates


class Given:
    """Writes, gates and queries of two rows as they come, with what gradients are asked of."""

    def __init__(self, has_momentum: bool, forgets: bool, rule: str = "titans", num: int = 23, width: int = 5) -> None:
        rows, self.num, self.rule = 2, num, rule
        self.keys, self.queries = (F.normalize(randn(rows, num, width, seed=s), dim=-1) for s in (0, 1))
        self.values, self.start = randn(rows, num, width, seed=2), randn(rows, width, width, seed=3)
        self.beta = torch.rand(rows, num, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.eta, self.kept = (F.logsigmoid(randn(rows, num, seed=s)) for s in (5, 6))
        self.has_momentum, self.forgets = has_momentum, forgets
        names = ["keys", "queries", "values", "start", "beta"]
        self.names = names + ["eta"] * has_momentum + ["kept"] * forgets
        for name in self.names:
            getattr(self, name).requires_grad_()

    def solved(self, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
        """By the library, with the paper's loss, whose gradient has a factor 2.  -> reads (r n d), last weights"""
        model = dict(model=MemoryMLP(5, 1), mem_model_norm_add_residual=False, loss="sse", rule=self.rule)
        engine = NeuralMemory(5, 1, 1, **model, momentum=self.has_momentum).evolution
        factors = {"keep": (self.kept if self.forgets else torch.zeros_like(self.kept))[None]}
        factors |= {"momentum": self.eta[None]} if self.has_momentum else {}
        rates, gates = (
            PerParameter.shared(["weights.0"], x) for x in (self.beta[..., None] / 2, Gates(factors, {}, None))
        )
        writes = Writes(self.keys[:, :, None], self.values[:, :, None], rates, gates, {}, None, {})
        weights = {"weights.0": self.start}
        block, _ = engine.store_solved(Carry(weights, weights, {}, {}), writes, num_blocks)
        reads = engine.read(block, self.queries[:, :, None], slice(0, self.num), {})
        return reads.squeeze(2), block.finish().weights["weights.0"]

    def gradients(self, found: tuple[Tensor, Tensor]) -> list[Tensor]:
        total = sum((x * randn(*x.shape, seed=9)).sum() for x in found)
        return list(torch.autograd.grad(total, [getattr(self, name) for name in self.names]))


def by_the_book(g: Given) -> tuple[Tensor, Tensor]:
    """Token by token: S <- eta S + beta k (v - k W), W <- keep W + S; each query sees what came before its token."""
    reads, last = [], []
    for row in range(len(g.keys)):
        w, s, of_row = g.start[row], torch.zeros_like(g.start[row]), []
        for t in range(g.num):
            of_row.append(g.queries[row, t] @ w)
            k, v = g.keys[row, t], g.values[row, t]
            surprise = g.beta[row, t] * torch.outer(k, v - k @ w)
            s = g.eta[row, t].exp() * s + surprise if g.has_momentum else surprise
            w = (g.kept[row, t].exp() * w if g.forgets else w) + s
        reads.append(torch.stack(of_row))
        last.append(w)
    return torch.stack(reads), torch.stack(last)


def by_delta_rule(g: Given) -> tuple[Tensor, Tensor]:
    """W_t = (1 - beta k k^T) W_{t-1} + beta k v^T"""
    reads, last = [], []
    for row in range(len(g.keys)):
        w, of_row = g.start[row], []
        for t in range(g.num):
            of_row.append(g.queries[row, t] @ w)
            k, beta = g.keys[row, t], g.beta[row, t]
            w = (torch.eye(5, dtype=w.dtype) - beta * torch.outer(k, k)) @ w + beta * torch.outer(k, g.values[row, t])
        reads.append(torch.stack(of_row))
        last.append(w)
    return torch.stack(reads), torch.stack(last)


@pytest.mark.parametrize("num_blocks", [1, 23])
@pytest.mark.parametrize("forgets", [True, False], ids=["forgetting", "keeping all"])
@pytest.mark.parametrize("has_momentum", [True, False], ids=["momentum", "no momentum"])
def test_it_is_the_rule_token_by_token(has_momentum: bool, forgets: bool, num_blocks: int) -> None:
    g = Given(has_momentum, forgets)
    found, expected = g.solved(num_blocks), by_the_book(g)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_close(g.gradients(found), g.gradients(expected), rtol=1e-11, atol=1e-11)


def test_without_momentum_and_forgetting_it_is_the_delta_rule() -> None:
    g = Given(False, False)
    found, expected = g.solved(), by_delta_rule(g)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_close(g.gradients(found), g.gradients(expected), rtol=1e-11, atol=1e-11)


def by_gated_delta_rule(g: Given) -> tuple[Tensor, Tensor]:
    """W_t = a (1 - beta k k^T) W_{t-1} + beta k v^T, a what is kept (arXiv 2412.06464, eq. 10, with W its transpose)"""
    reads, last = [], []
    for row in range(len(g.keys)):
        w, of_row = g.start[row], []
        for t in range(g.num):
            of_row.append(g.queries[row, t] @ w)
            k, beta, kept = g.keys[row, t], g.beta[row, t], g.kept[row, t].exp()
            erased = torch.eye(5, dtype=w.dtype) - beta * torch.outer(k, k)
            w = kept * erased @ w + beta * torch.outer(k, g.values[row, t])
        reads.append(torch.stack(of_row))
        last.append(w)
    return torch.stack(reads), torch.stack(last)


@pytest.mark.parametrize("num_blocks", [1, 23])
def test_surprised_after_forgetting_and_without_momentum_it_is_the_gated_delta_rule(num_blocks: int) -> None:
    g = Given(False, True, "gated_delta")
    found, expected = g.solved(num_blocks), by_gated_delta_rule(g)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_close(g.gradients(found), g.gradients(expected), rtol=1e-11, atol=1e-11)


def test_surprised_before_forgetting_it_is_the_gated_delta_rule_with_other_steps_and_values() -> None:
    """a W - beta k (k W - v) is a (W - (beta / a) k (k W - v)): what Titans says of its rule without momentum."""
    g, same = Given(False, True), Given(False, True, "gated_delta")
    kept = g.kept.detach().exp()
    same.beta, same.values = g.beta.detach() / kept, g.values.detach() * kept[..., None]
    assert_close(g.solved(), by_gated_delta_rule(same), rtol=1e-11, atol=1e-11)


def test_with_momentum_errors_are_taken_after_forgetting() -> None:
    """S <- eta S + beta k (v - a k W), W <- a W + S"""
    g = Given(True, True, "gated_delta")
    reads, last = g.solved()
    w, s = g.start[0], torch.zeros_like(g.start[0])
    for t in range(g.num):
        assert_close(reads[0, t], g.queries[0, t] @ w, rtol=1e-12, atol=1e-12)
        k, kept = g.keys[0, t], g.kept[0, t].exp()
        s = g.eta[0, t].exp() * s + g.beta[0, t] * torch.outer(k, g.values[0, t] - kept * k @ w)
        w = kept * w + s
    assert_close(last[0], w, rtol=1e-12, atol=1e-12)


def test_at_full_step_a_key_is_answered_with_what_was_stored_last() -> None:
    """What a delta rule is for: beta 1, keys of length 1."""
    g = Given(False, False)
    with torch.no_grad():
        g.beta.fill_(1.0)
        g.keys[:, -3] = g.keys[:, -1]
    last = g.solved()[1]
    assert_close(torch.einsum("ri,rij->rj", g.keys[:, -1], last), g.values[:, -1], rtol=1e-10, atol=1e-10)
