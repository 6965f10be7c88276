"""Memories of Miras: thresholds of tokens (Yaad), norms (Moneta), shares (Memora), and any loss with any of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.testing import assert_close

from tests.support.configurations import Case, RuleUnderTest, cases, with_rule
from tests.support.rules_by_the_book import MEMORA, MEMORA_MOVING, MONETA
from tests.support.streams import disturbed, in_pieces, randn
from tests.test_exactness import check
from titans_pytorch import NeuralMemory, TitansConfig, TitansLMM, audit, load_state, save_state
from titans_pytorch.memory.projections import StoredTokens

EXACT = dict(rtol=1e-9, atol=1e-9)
KINDS = ("yaad", "moneta", "memora")


def built_in_chunks(case: Case, rule: RuleUnderTest) -> Case:
    """The same with a rule that is not linear, with steps small enough for its weights to stay of their size."""
    engine = "general" if case.engine == "general" else "dense"
    options = case.options | {"default_step_transform_max_lr": 0.05}
    if rule.window > 1:
        options |= {"accept_weight_residual": False}
    return with_rule(replace(case, options=options, engine=engine), rule)


@pytest.mark.parametrize("rule", [MONETA, MEMORA, MEMORA_MOVING])
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_retentions_equal_the_oracle(rule: RuleUnderTest, case: Case) -> None:
    check(built_in_chunks(case, rule))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_thresholds_of_tokens_equal_the_oracle(case: Case) -> None:
    check(replace(case, options=case.options | {"loss": "yaad", "summed_loss": False}))


# ---- token by token, from the equations


def linear(**more: Any) -> NeuralMemory:
    """A linear memory that is surprised at every token."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(model="linear", mem_model_norm_add_residual=False, max_weight_growth=None)
    options |= dict(momentum=False, default_step_transform_max_lr=0.2)
    return disturbed(NeuralMemory(5, 1, 1, **options | more).double())


def by_the_book(memory: NeuralMemory, x: Tensor, kind: str) -> Tensor:
    """Eqs. 24 to 27 with one memory, token by token.  -> (t d d)"""
    tokens = StoredTokens(x[None], x[None], None)
    writes = memory.project_writes(tokens, 1, torch.float64, memory.fresh_tails(1)).writes
    keys, values, theta = writes.keys[0, :, 0], writes.values[0, :, 0], writes.rates.any[0, :, 0]
    kept = 1 - memory.to_decay_factor[0](memory.store_norm(x)).sigmoid().flatten()
    learned = memory.memory_model_parameters[0][0]
    w = learned if kind != "memora" else (learned * 5**0.5).softmax(dim=0) * 5**0.5
    a = w / (w**4).sum().sqrt()  # of which W = A / |A|_4^2
    delta = None if memory.to_threshold is None else memory.to_threshold[0](memory.store_norm(x)).exp().log1p()
    memories = []
    for t in range(len(x)):
        error = keys[t] @ w - values[t]
        if kind == "yaad":
            size = (error.square().mean() + 1e-6).sqrt()
            slope = 2 * error / 5 if size <= delta[t] else 2 * delta[t] * error / (5 * size)  # (26)
            w = kept[t] * w - theta[t] * torch.outer(keys[t], slope)
        elif kind == "moneta":
            sizes = (error.square() + 1e-6).sqrt()
            slope = 3 * error * sizes / 5
            a = kept[t] * a - theta[t] * torch.outer(keys[t], slope)  # (24)
            w = a / (a**4).sum() ** 0.5  # (25)
        else:
            slope = 2 * error / 5
            w = (kept[t] * w.log() - theta[t] * torch.outer(keys[t], slope)).softmax(dim=0) * 5**0.5  # (27)
        memories.append(w)
    return torch.stack(memories)


@pytest.mark.parametrize("kind, options", [
    ("yaad", dict(loss="yaad")), ("moneta", dict(loss="lp:3", rule="lq:4")), ("memora", dict(rule="kl")),
])  # fmt: skip
def test_they_are_the_equations_token_by_token(kind: str, options: dict[str, Any]) -> None:
    memory, x = linear(**options), randn(17, 5)
    expected, state = by_the_book(memory, x, kind), None
    for t in range(17):
        _, state = memory(x[None, t : t + 1], state=state)
        assert_close(state.current["weights.0"][0], expected[t], **EXACT)
    wanted = [memory.memory_model_parameters[0], memory.to_keys.weight, memory.to_values.weight]
    wanted += [] if memory.to_threshold is None else [memory.to_threshold[0].weight]
    left, right = (
        torch.autograd.grad((m * randn(5, 5, seed=3)).sum(), wanted)
        for m in (state.current["weights.0"][0], expected[-1])
    )
    assert_close(left, right, rtol=1e-7, atol=1e-8)


# ---- limits


def answers(memory: NeuralMemory, like: NeuralMemory | None = None) -> Tensor:
    """What it reads, with the parameters of another."""
    if like is not None:
        memory.load_state_dict(like.state_dict(), strict=False)
    return memory(randn(2, 21, 8))[0]


def small(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    return disturbed(NeuralMemory(8, 3, 6, heads=2, default_step_transform_max_lr=0.2, **options).double(), 0.2)


@pytest.mark.parametrize("engine", ["factored", "dense", "general"])
def test_where_thresholds_are_far_away_it_is_titans(engine: str) -> None:
    titans, yaad = small(engine=engine), small(engine=engine, loss="yaad")
    torch.nn.init.constant_(yaad.to_threshold[0].weight, 0.0)
    torch.nn.init.constant_(yaad.to_threshold[0].bias, 1e9)
    assert_close(answers(yaad, titans), answers(titans), **EXACT)


@pytest.mark.parametrize("momentum", [True, False])
def test_the_retention_of_the_2_norm_is_that_of_titans(momentum: bool) -> None:
    titans, of_2 = small(momentum=momentum), small(momentum=momentum, rule="lq:2")
    assert_close(answers(of_2, titans), answers(titans), **EXACT)


def test_the_2nd_power_with_the_2_norm_is_titans() -> None:
    titans, both = small(), small(rule="lq:2", loss="lp:2")
    assert_close(answers(both, titans), answers(titans), **EXACT)


def test_where_nothing_moves_shares_stay_and_all_forgotten_they_are_equal() -> None:
    memory = NeuralMemory(8, 1, rule="kl", momentum=False, init_adaptive_step_bias=-80.0, init_decay_bias=-80.0)
    start = memory.double().init_weights(1)
    _, state = memory(randn(1, 5, 8))
    assert_close(state.current, start, rtol=1e-12, atol=1e-12)
    torch.nn.init.constant_(memory.to_decay_factor[0].bias, 80.0)
    _, state = memory(randn(1, 5, 8))
    for weight in (w for w in state.current.values() if w.ndim == 3):
        assert_close(weight, torch.full_like(weight, weight.shape[1] ** -0.5))


def test_columns_stay_shares_of_the_root_of_their_length() -> None:
    _, state = small(rule="kl")(randn(2, 30, 8))
    for weight in (w for w in state.current.values() if w.ndim == 3):
        assert (weight > 0).all()
        assert_close(weight.sum(dim=1), torch.full_like(weight[:, 0], weight.shape[1] ** 0.5))


# ---- any loss with any retention, in pieces

LOSSES = ["mse", "sse", "huber:0.5", "yaad", "lp:3", "dot", "cosine"]
RULES = ["titans", "decay_to_start", "gated_delta", "atlas", "lq:4", "lq:1.5", "kl"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_any_loss_goes_with_any_retention(rule: str, loss: str) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(8, 2, 2, rule=rule, loss=loss, window=2, default_step_transform_max_lr=0.02).double()
    x = randn(1, 11, 8)
    whole, _ = memory(x)
    assert whole.isfinite().all()
    assert_close(in_pieces(memory, x, (3, 1, 7))[0], whole, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_presets_stream_are_causal_and_go_through_files(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    memory = disturbed(NeuralMemory.miras(kind, 8, 2, chunk_size=4).double(), 0.1)
    x = randn(2, 21, 8)
    whole, (_, state) = memory(x)[0], memory(x[:, :9])
    assert_close(in_pieces(memory, x, (1,) * 21)[0], whole, **EXACT)
    save_state(state, tmp_path / "state")
    assert_close(memory(x[:, 9:], state=load_state(tmp_path / "state"))[0], whole[:, 9:], **EXACT)
    memory.float().save_pretrained(tmp_path)
    assert_close(NeuralMemory.from_pretrained(tmp_path)(x.float())[0], memory(x.float())[0])
    assert audit(memory.double(), x).passed


@pytest.mark.parametrize("kind", KINDS)
def test_families_of_them(kind: str) -> None:
    model = TitansLMM(7, TitansConfig.miras(kind, 16, 1, heads=2))
    model(torch.randint(0, 7, (2, 40)))[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- what cannot be


@pytest.mark.parametrize(
    "rule, words",
    [
        ("lq:3", "rule 'lq' must have a number above 1 behind its colon, and not 3, where weights forget"),
        ("lq:1", "rule 'lq' must have a number above 1"),
        ("lq:inf", "rule 'lq' must have a number above 1"),
        ("lq:", "rule 'lq' must have a number above 1 .* got 'lq:'"),
        ("kl:2", "rule must be one of 'atlas', .* 'titans', lq with a number as in 'lq:4', or a Rule, got 'kl:2'"),
    ],
)
def test_rules_that_cannot_be_are_refused(rule: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NeuralMemory(8, rule=rule)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="'factored' cannot be used with a retention that is not linear in weights"):
        NeuralMemory(8, rule="kl", engine="factored")
    with pytest.raises(ValueError, match="kind must be one of 'yaad', 'moneta', 'memora', got 'mora'"):
        NeuralMemory.miras("mora", 8)
    with pytest.raises(ValueError, match="memory_rule must be one of 'atlas'"):
        TitansConfig(dim=8, depth=1, memory_rule="kl:2")
