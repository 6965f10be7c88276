"""Windows of surprises (Omega), powers of keys, gated orthogonal steps (Atlas): oracle, paper, limits, states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support.configurations import Case, RuleUnderTest, cases, with_rule
from tests.support.rules_by_the_book import ATLAS, DECAY_TO_START_WINDOW, GATED_DELTA_WINDOW
from tests.support.streams import disturbed, in_pieces, randn
from tests.test_exactness import check
from titans_pytorch import NeuralMemory, TitansConfig, TitansLMM, audit, load_state, save_state
from titans_pytorch.memory.key_powers import KeyPowers
from titans_pytorch.memory.pieces import StoredTokens

EXACT = dict(rtol=1e-10, atol=1e-10)
NEVER, ALWAYS = -80.0, 80.0


def looking_back(case: Case) -> Case:
    """A drawn case whose windows are longer than a chunk."""
    return replace(case, options=case.options | {"accept_weight_residual": False, "window": 2 + case.seed % 3})


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases().map(looking_back))
def test_any_window_in_any_pieces_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases().map(looking_back))
def test_many_more_windows_equal_the_oracle(case: Case) -> None:
    check(case)


def ruled(case: Case, rule: RuleUnderTest) -> Case:
    """The same with a rule that has a window."""
    chunk = case.options["chunk_size"]
    store = chunk if isinstance(chunk, int) else chunk[1]
    options: dict[str, Any] = {"accept_weight_residual": False}
    if rule is GATED_DELTA_WINDOW:
        options["batch_size"] = store
    if rule is ATLAS:  # as for all orthogonal steps (`legal`)
        options["default_step_transform_max_lr"] = 0.05
        case = replace(case, engine="general" if case.engine == "general" else "dense")
    return with_rule(replace(case, options=case.options | options), rule)


@pytest.mark.parametrize("rule", [ATLAS, DECAY_TO_START_WINDOW, GATED_DELTA_WINDOW])
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_other_rules_look_back_as_far(rule: RuleUnderTest, case: Case) -> None:
    check(ruled(case, rule))


# ---- token by token, from the equations


def linear(window: int, **more: Any) -> NeuralMemory:
    """A linear memory with gates of every token and steps of the summed loss."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(
        model="linear", mem_model_norm_add_residual=False, loss="sse", max_weight_growth=None
    )
    built = NeuralMemory(5, 1, **options | dict(default_step_transform_max_lr=0.2, window=window) | more)
    return disturbed(built.double())


def omega_by_the_book(memory: NeuralMemory, x: Tensor, batch: int) -> Tensor:
    """M_t = (1 - alpha_t) M_{t-1} + S_t, S_t = eta_t S_{t-1} - sum_i gamma_i^(t) grad |k_i M - v_i|^2 at M_{t'}

    -> the memories after every token (t d d)
    """
    tokens = StoredTokens(x[None], x[None], None)
    writes = memory.project_writes(tokens, 1, torch.float64, memory.fresh_tails(1)).writes
    keys, values = writes.keys[0, :, 0], writes.values[0, :, 0]
    theta = writes.rates.any[0, :, 0]
    normed = memory.store_norm(x)
    alpha, eta, looks = (
        torch.sigmoid(getattr(memory, name)[0](normed)) if getattr(memory, name) is not None else None
        for name in ("to_decay_factor", "to_momentum", "to_window")
    )
    (m,) = (w[0] for w in memory.init_weights(1).values())
    base, s, memories = m, torch.zeros_like(m), []
    for t in range(len(x)):
        step = torch.zeros_like(m)
        for i in range(max(0, t - memory.rule.window + 1), t + 1):
            gamma = theta[i] * (1.0 if i == t else looks[t, t - i - 1])
            step = step - gamma * 2 * torch.outer(keys[i], keys[i] @ base - values[i])
        s = step if eta is None else eta[t] * s + step
        m = (1 - alpha[t]) * m + s
        if (t + 1) % batch == 0:
            base = m
        memories.append(m)
    return torch.stack(memories)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize("window", [2, 5])
def test_it_is_the_omega_rule_token_by_token(window: int, has_momentum: bool, batch: int) -> None:
    memory, x = linear(window, batch_size=batch, momentum=has_momentum), randn(17, 5)
    expected = omega_by_the_book(memory, x, batch)
    state = None
    for t in range(17):
        _, state = memory(x[None, t : t + 1], state=state)
        assert_close(state.current["weights.0"][0], expected[t], **EXACT)
    wanted = list(memory.parameters())[:5]
    left, right = (
        torch.autograd.grad((m * randn(5, 5, seed=3)).sum(), wanted, allow_unused=True)
        for m in (state.current["weights.0"][0], expected[-1])
    )
    for got, own in zip(left, right, strict=True):
        assert (got is None) == (own is None)
        if got is not None:
            assert_close(got, own, rtol=1e-7, atol=1e-9)


# ---- limits


@pytest.mark.parametrize("options", [{}, {"rule": "decay_to_start"}, {"engine": "dense", "batch_size": 6}])
def test_a_window_that_is_shut_is_the_rule_without(options: dict[str, Any]) -> None:
    plain = disturbed(NeuralMemory(8, 3, heads=2, **options).double())
    shut = NeuralMemory(8, 3, heads=2, window=4, **options).double()
    missing, unexpected = shut.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["to_window.0.bias", "to_window.0.weight"], [])
    torch.nn.init.constant_(shut.to_window[0].weight, 0.0)
    torch.nn.init.constant_(shut.to_window[0].bias, NEVER)
    x = randn(2, 20, 8)
    assert_close(shut(x)[0], plain(x)[0], **EXACT)


def test_a_window_of_one_has_no_gate() -> None:
    memory = NeuralMemory(8, 3, window=1)
    assert not hasattr(memory, "to_window")
    assert memory(randn(1, 7, 8).float())[1].recent is None


def test_an_open_window_without_momentum_at_one_base_is_a_step_that_is_repeated() -> None:
    """Nothing is forgotten, every surprise is counted in as many steps as the window is long."""
    memory = linear(3, momentum=False, batch_size=None, init_decay_bias=NEVER)
    for layer, bias in ((memory.to_window, ALWAYS), (memory.to_decay_factor, NEVER)):
        torch.nn.init.constant_(layer[0].weight, 0.0)
        torch.nn.init.constant_(layer[0].bias, bias)
    once = linear(1, momentum=False, batch_size=None, init_decay_bias=NEVER)
    once.load_state_dict(memory.state_dict(), strict=False)
    x = randn(1, 12, 5)
    start = memory.init_weights(1)["weights.0"]
    states = [each(x)[1].updates["weights.0"][0] - start for each in (memory, once)]
    steps = states[1].diff(dim=0)
    repeated = sum(torch.cat((torch.zeros(lag, 5, 5).double(), steps[: len(steps) - lag])) for lag in range(3))
    assert_close(states[0].diff(dim=0), repeated, **EXACT)


def test_the_first_power_alone_changes_nothing() -> None:
    powers = KeyPowers(3, 2).double()
    torch.nn.init.zeros_(powers.coefficients[1:])
    x = randn(1, 2, 4, 5)
    assert torch.equal(powers(x), x)


def test_powers_begin_as_the_series_of_the_exponential_function() -> None:
    x = randn(1, 2, 4, 5) / 10
    assert_close(KeyPowers(8, 2).double()(x), x.expm1(), rtol=1e-6, atol=1e-9)


# ---- streams


@pytest.mark.parametrize("preset", [NeuralMemory.omeganet, NeuralMemory.atlas])
@pytest.mark.parametrize("token_gates", [True, False])
def test_presets_stream_and_are_causal(preset: Any, token_gates: bool) -> None:
    torch.manual_seed(0)
    memory = disturbed(preset(8, 2, chunk_size=4, token_gates=token_gates).double(), 0.1)
    x = randn(2, 21, 8)
    whole, last = memory(x)
    for lengths in ((1,) * 21, (6, 1, 3, 11)):
        found, state = in_pieces(memory, x, lengths)
        assert_close(found, whole, rtol=1e-9, atol=1e-9)
        for got, expected in zip(state.recent[:3], last.recent[:3], strict=True):
            assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert audit(memory, x).passed


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(1, 19), rows=st.lists(st.integers(0, 1), min_size=1, max_size=3))
def test_a_state_is_saved_forked_and_reset_with_what_its_window_sees(cut: int, rows: list[int]) -> None:
    torch.manual_seed(0)
    memory = disturbed(NeuralMemory.omeganet(8, 2, chunk_size=4, window=5).double(), 0.1)
    x = randn(2, 20, 8)
    whole, (_, state) = memory(x)[0], memory(x[:, :cut])
    assert_close(memory(x[rows, cut:], state=state.select(rows))[0], whole[rows, cut:], rtol=1e-9, atol=1e-9)
    reset = memory.reset(state, torch.tensor([True, False]))
    fresh, border = memory(x[:1, cut:])[0], cut % 4 == 0
    found = memory(x[:, cut:], state=reset)[0]
    assert_close(found[1], whole[1, cut:], rtol=1e-9, atol=1e-9)
    if border:  # where it begins at a position at which chunks and batches begin, too
        assert_close(found[:1], fresh, rtol=1e-9, atol=1e-9)


def test_a_state_goes_through_a_file(tmp_path: Any) -> None:
    memory = NeuralMemory.atlas(8, 2, chunk_size=4)
    x = randn(2, 20, 8).float()
    _, state = memory(x[:, :11])
    save_state(state, tmp_path / "state")
    found = memory(x[:, 11:], state=load_state(tmp_path / "state"))[0]
    assert_close(found, memory(x[:, 11:], state=state)[0], rtol=0, atol=0)


def test_a_memory_is_saved_and_loaded_by_name(tmp_path: Any) -> None:
    memory = NeuralMemory.atlas(8, 2, chunk_size=4)
    memory.save_pretrained(tmp_path)
    x = randn(1, 9, 8).float()
    assert_close(NeuralMemory.from_pretrained(tmp_path)(x)[0], memory(x)[0])


@pytest.mark.parametrize("preset", [TitansConfig.omeganet, TitansConfig.atlas])
def test_families_of_them(preset: Any) -> None:
    config = preset(16, 1, heads=2, memory_options={"window": 2})
    model = TitansLMM(7, config)
    memory = model.backbone.blocks[0].mixer.memory
    assert memory.rule.window == 2
    assert isinstance(memory.key_powers, KeyPowers)
    assert memory.layout == (1, 1, 16, 1)
    ids = torch.randint(0, 7, (2, 40))
    model(ids)[0].square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- what cannot be


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(window=0), ValueError, "window must be positive, got 0"),
        (dict(window=2.0), TypeError, "window must be a whole number, got 2.0"),
        (dict(key_powers=0), ValueError, "key_powers must be positive, got 0"),
        (dict(window=3, accept_weight_residual=True), ValueError, "window must be 1 with accept_weight_residual=True"),
        (dict(rule="atlas", spectral_norm_surprises=True), ValueError, "must be False with rule='atlas'"),
        (dict(rule="atlas", engine="factored"), ValueError, "engine 'factored' cannot be used with"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NeuralMemory(8, 2, **options)


def test_a_state_of_another_window_is_refused() -> None:
    x = torch.randn(1, 9, 8)
    states = {window: NeuralMemory(8, 2, window=window)(x)[1] for window in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"state\.recent must be given with this module's window"):
        NeuralMemory(8, 2, window=3)(x, state=states[1])
    with pytest.raises(ValueError, match=r"state\.recent must be None with this module's window"):
        NeuralMemory(8, 2)(x, state=states[3])
    with pytest.raises(ValueError, match=r"state\.recent\.keys must have the shape \(1, 2, 2, 8\) of this module"):
        NeuralMemory(8, 2, window=3)(x, state=states[2])
