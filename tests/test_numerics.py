"""Laws of a causal memory, and numbers that stay finite at the edges and over long streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.configurations import MODELS
from tests.support.streams import randn
from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.auditing.audit import audit, padded_with_mask, stream_with_state

EXACT = dict(rtol=1e-9, atol=1e-10)
CALM = dict(default_step_transform_max_lr=0.1)


def memory(seed: int = 0, **options: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    built = NeuralMemory(**{"dim": 4, "chunk_size": 3, **CALM} | options).double()
    if built.transition_gate is not None:
        nn.init.zeros_(built.transition_gate)
    return built


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads and batches": dict(dim=6, dim_head=4, heads=2, batch_size=6, num_kv_per_token=2),
    "attention pool, two orders": dict(attn_pool_chunks=True, momentum_order=2, learned_momentum_combine=True),
    "gated, limited": dict(batch_size=3, gated_transition=True, max_grad_norm=0.5, per_parameter_lr_modulation=True),
    "lookahead, norms": dict(store_with_lookahead_value=True, qk_rmsnorm=True, post_rmsnorm=True),
    "spectral": dict(spectral_norm_surprises=True, batch_size=6),
    "general": dict(engine="general", batch_size=6),
    "read apart": dict(chunk_size=(2, 3)),
    "no momentum": dict(momentum=False),
    "mixes tokens": dict(model=MODELS["attention"]()),
    "one token": dict(chunk_size=1),
}


def state_tensors(state: Any) -> list[Tensor]:
    return [*state.weights.values(), *state.states[0].values(), *state.states[1].values()]


# laws


@pytest.mark.parametrize("value", [None, torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_token_never_changes_what_came_before_it(name: str, value: float | None) -> None:
    built = memory(**CONFIGURATIONS[name])
    seq = randn(2, 13, built.dim)
    expected, _ = built(seq)
    for position in range(13):
        changed = seq.clone()
        changed[:, position] = randn(2, built.dim, seed=1) if value is None else value
        got, _ = built(changed)
        assert torch.equal(got[:, :position], expected[:, :position])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_comes_after_a_token_that_is_not_a_number_is_not_one_either(name: str) -> None:
    """It must not go unnoticed: an output that depends on it says so."""
    built = memory(**CONFIGURATIONS[name])
    seq = randn(1, 13, built.dim)
    seq[:, 2] = torch.nan
    retrieved, _ = built(seq)
    assert retrieved[:, :2].isfinite().all()
    assert retrieved[:, 2].isnan().all()
    assert retrieved[:, 4:].isnan().all()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_rows_are_independent(name: str) -> None:
    built = memory(**CONFIGURATIONS[name])
    seq = randn(3, 13, built.dim)
    expected, state = built(seq)
    for value in (0.0, torch.nan):
        changed = seq.clone()
        changed[1] = value
        got, other = built(changed)
        assert_close(got[[0, 2]], expected[[0, 2]], **EXACT)
        assert_close(other.select([0, 2]).states, state.select([0, 2]).states, **EXACT)


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != "lookahead, norms"])
def test_a_masked_token_is_absent(name: str) -> None:
    """One more token in each chunk that is masked, whatever it is, leaves the memory as it is without it."""
    options = CONFIGURATIONS[name] | {"chunk_size": 3}
    built = memory(**options)
    wide = memory(**options | {"chunk_size": 4, "batch_size": options.get("batch_size", 0) // 3 * 4 or None})
    wide.load_state_dict(built.state_dict())
    seq = randn(2, 12, built.dim)
    _, expected = built(seq)
    for value in (0.0, 7.0, torch.nan):
        padded = torch.full((2, 16, built.dim), value, dtype=torch.float64)
        mask = torch.ones(2, 16, dtype=torch.bool)
        mask[0, [0, 5, 10, 15]] = mask[1, [3, 6, 8, 12]] = False
        padded[mask] = seq.flatten(0, 1)
        _, state = wide(torch.zeros_like(padded), store_seq=padded, store_mask=mask)
        assert_close(state.states, expected.states, **EXACT)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_stretch_that_is_not_stored_changes_nothing(name: str) -> None:
    built = memory(**CONFIGURATIONS[name] | {"batch_size": None, "gated_transition": False})
    seq, mask = randn(2, 24, built.dim), torch.ones(2, 24, dtype=torch.bool)
    mask[:, 6:18] = False
    _, masked, (loss, rates) = built(seq, store_mask=mask, return_surprises=True)
    _, expected = built(torch.cat((seq[:, :6], seq[:, 18:]), dim=1))
    assert_close(masked.states, expected.states, **EXACT)
    stored = loss.shape[-1] // 4
    assert not torch.cat((loss, rates))[..., stored : 3 * stored].any()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_at_rate_0_the_memory_only_decays(name: str) -> None:
    options = CONFIGURATIONS[name] | {"adaptive_step_transform": torch.zeros_like}
    built = memory(**options | {"gated_transition": False, "init_decay_bias": -1.0})
    _, state = built(randn(2, 12, built.dim))
    chunk = built.layout.store_chunk
    keep = torch.tensor(1.0, dtype=torch.float64).sigmoid() ** (12 // chunk)
    assert_close(state.states[0], {k: w * keep for k, w in built.init_weights(2).items()}, **EXACT)
    assert not any(m.any() for m in state.states[1].values())


def test_rate_0_by_bias() -> None:
    built = memory(init_adaptive_step_bias=-60.0, init_decay_bias=-60.0)
    retrieved, state = built(randn(2, 12, 4))
    assert_close(state.states[0], built.init_weights(2), **EXACT)
    assert_close(retrieved, built.retrieve_memories(randn(2, 12, 4), built.init_weights(2)), **EXACT)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("online", [False, True])
def test_a_linear_memory_without_momentum_is_the_delta_rule(chunk: int, online: bool) -> None:
    """W_j = (1 - alpha) W_{j-1} + sum theta 2/d kT(v - kB), B = W_{j-1} if online else W_0; token i reads q W_{i//c}"""
    built = memory(
        dim=5,
        chunk_size=chunk,
        batch_size=chunk if online else None,
        momentum=False,
        pre_rmsnorm=False,
        model=MemoryMLP(5, depth=1),
        mem_model_norm_add_residual=False,
    )
    seq = randn(1, 7, 5)
    retrieved, state = built(seq)
    query, key, value = (f(seq[0]) for f in (built.to_queries, built.to_keys, built.to_values))
    theta = built.to_adaptive_step[0](seq[0]).sigmoid() * CALM["default_step_transform_max_lr"]
    weight = start = built.memory_model_parameters[0][0]
    weights = [weight]
    for first in range(0, 7 - chunk + 1, chunk):
        k, v, rate = (x[first : first + chunk] for x in (key, value, theta))
        alpha = built.to_decay_factor[0](seq[0, first : first + chunk].mean(dim=0)).sigmoid()
        base = weight if online else start
        weight = (1 - alpha) * weight + 2 / 5 * k.T @ (rate * (v - k @ base))
        weights.append(weight)
    assert_close(retrieved[0], torch.stack([query[i - 1] @ weights[i // chunk] for i in range(1, 8)]), **EXACT)
    assert_close(state.updates["weights.0"][0], torch.stack(weights), **EXACT)


def test_momentum_is_a_moving_sum_of_surprises() -> None:
    """With constant gates: m_j = eta m_{j-1} + u_j and w_j = (1 - alpha) w_{j-1} + m_j."""
    options = dict(init_momentum_bias=0.4, init_decay_bias=-1.5, chunk_size=2)
    built, plain = memory(**options), memory(chunk_size=2, init_decay_bias=60.0, momentum=False)
    decay = {key: value for key, value in plain.state_dict().items() if key.startswith("to_decay")}
    shared = {key: value for key, value in built.state_dict().items() if not key.startswith("to_momentum")}
    plain.load_state_dict(shared | decay)
    seq = randn(1, 10, 4)
    u = plain(seq)[1].updates  # alpha = 1: what is left after a chunk is its surprise
    eta, alpha = (torch.tensor(x, dtype=torch.float64).sigmoid() for x in (0.4, -1.5))
    _, state = built(seq)
    for key, w in built.init_weights(1).items():
        m = torch.zeros_like(w)
        for chunk in range(1, 6):
            m = eta * m + u[key][:, chunk]
            w = (1 - alpha) * w + m
            assert_close(state.updates[key][:, chunk], w, rtol=1e-8, atol=1e-9)
        assert_close(state.states[1][key][0], m, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_surprise_of_what_has_just_been_stored_falls(heads: int) -> None:
    """A memory that climbs instead of descending fails here without any oracle."""
    built = memory(
        dim=8,
        dim_head=8 // heads,
        heads=heads,
        chunk_size=8,
        batch_size=8,
        init_decay_bias=-6.0,
        init_momentum_bias=-6.0,
    )
    for seed in range(5):
        chunk = randn(2, 8, 8, seed=seed)
        _, _, (loss, _) = built(chunk.repeat(1, 4, 1), return_surprises=True)
        by_chunk = loss.unflatten(-1, (4, 8)).mean(dim=(0, 1, 3))
        assert (by_chunk.diff() < 0).all()


def test_a_growth_limit_that_is_not_reached_is_the_identity() -> None:
    seq = randn(2, 30, 4)
    answers = [memory(batch_size=6, max_weight_growth=limit)(seq)[0] for limit in (None, 10.0, 1e6)]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_growth_limit_that_is_reached_holds_the_base() -> None:
    built = memory(batch_size=6, max_weight_growth=1.5, default_step_transform_max_lr=50.0)
    _, state = built(randn(2, 31, 4))

    def norms(weights: dict[str, Tensor]) -> Tensor:
        return torch.cat([w.flatten(1) for w in weights.values()], dim=1).norm(dim=1)

    assert_close(norms(state.weights), 1.5 * norms(built.init_weights(2)), rtol=1e-9, atol=0)


# edges

EDGES: dict[str, dict[str, Any]] = {
    "forgets all": dict(init_decay_bias=200.0),
    "forgets nothing": dict(init_decay_bias=-200.0),
    "no momentum left": dict(init_momentum_bias=-200.0),
    "full momentum": dict(init_momentum_bias=200.0),
    "no step": dict(init_adaptive_step_bias=-200.0),
    "zero step": dict(adaptive_step_transform=lambda raw: raw * 0),
    "huge step": dict(default_step_transform_max_lr=1e4),
    "limited gradient": dict(max_grad_norm=1e-3),
    "limited zero gradient": dict(max_grad_norm=1.0, adaptive_step_transform=lambda raw: raw * 0),
    "one-token chunks": dict(chunk_size=1, batch_size=1),
    "no complete chunk": dict(chunk_size=64),
    "spectral": dict(spectral_norm_surprises=True),
    "spectral zero step": dict(spectral_norm_surprises=True, adaptive_step_transform=lambda raw: raw * 0),
    "norms": dict(qk_rmsnorm=True, post_rmsnorm=True, attn_pool_chunks=True),
    "orders": dict(momentum_order=3, learned_momentum_combine=True, init_momentum_bias=-200.0),
    "swiglu": dict(model=MODELS["swiglu"]()),
    "attention": dict(model=MODELS["attention"]()),
}
INPUTS: dict[str, Tensor] = {
    "random": randn(2, 11, 4),
    "zeros": torch.zeros(2, 11, 4, dtype=torch.float64),
    "constant": torch.ones(2, 11, 4, dtype=torch.float64),
    "repeated token": randn(2, 1, 4).expand(-1, 11, -1),
    "huge": randn(2, 11, 4) * 1e6,
    "tiny": randn(2, 11, 4) * 1e-30,
    "one token": randn(2, 1, 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", EDGES)
def test_values_and_gradients_are_finite_at_the_edges(name: str, given: str, dtype: torch.dtype) -> None:
    built = memory(**EDGES[name]).to(dtype)
    seq = INPUTS[given].to(dtype).clone().requires_grad_()
    retrieved, state = built(seq)
    assert retrieved.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(state))
    retrieved.square().mean().backward()
    assert seq.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("given", ["zeros", "constant", "random"])
@pytest.mark.parametrize("name", ["gated, limited", "heads and batches", "mixes tokens"])
def test_a_call_that_stores_nothing_at_all_is_finite(name: str, given: str) -> None:
    built = memory(**CONFIGURATIONS[name])
    seq = INPUTS[given][..., :1].expand(-1, -1, built.dim).clone().requires_grad_()
    retrieved, _ = built(seq, store_mask=torch.zeros(2, 11, dtype=torch.bool))
    retrieved.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.parameters())
    assert seq.grad.isfinite().all()


def test_gates_that_close_do_not_lose_digits() -> None:
    """A chunk that forgets everything, in the middle of a block: what follows owes nothing to what came before."""
    built = memory(chunk_size=1, momentum=False, pre_rmsnorm=False, engine="factored")
    with torch.no_grad():
        built.to_decay_factor[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        built.to_decay_factor[0].bias.zero_()
    seq = randn(1, 12, 4)
    seq[:, :, 0] = -1
    seq[:, 5, 0] = 800.0
    other = seq.clone()
    other[:, :5] = randn(1, 5, 4, seed=1) * 100
    one, two = built(seq)[1].updates, built(other)[1].updates
    for key in one:
        assert_close(one[key][:, 6:], two[key][:, 6:], rtol=1e-12, atol=1e-12)
        assert one[key].isfinite().all()


# long streams


def survives(dim: int, heads: int, batch_size: int | None, num_tokens: int, dtype: torch.dtype, backward: bool) -> None:
    """Random tokens, all defaults, chunks of 64."""
    torch.manual_seed(0)
    built = NeuralMemory(dim, 64, batch_size, dim_head=dim // heads, heads=heads).to(dtype)
    seq = torch.randn(1, num_tokens, dim).to(dtype)
    with torch.set_grad_enabled(backward):
        retrieved, state = built(seq)
    assert retrieved.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(state))
    if backward:
        retrieved.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [64, None])
def test_a_stream_of_noise_stays_finite(batch_size: int | None, dtype: torch.dtype) -> None:
    survives(16, 1, batch_size, 4096, dtype, backward=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [64, 128, None])
@pytest.mark.parametrize("dim, heads", [(16, 1), (16, 4), (64, 4)])
def test_a_long_stream_of_noise_stays_finite(dim: int, heads: int, batch_size: int | None, dtype: torch.dtype) -> None:
    survives(dim, heads, batch_size, 65_536, dtype, backward=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [64, None])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_long_stream_of_wide_noise_stays_finite(heads: int, batch_size: int | None) -> None:
    differentiates_all = (heads, batch_size) == (4, 64)  # which takes minutes
    survives(384, heads, batch_size, 65_536, torch.float32, backward=differentiates_all)
    if not differentiates_all:
        survives(384, heads, batch_size, 4_096, torch.float32, backward=True)


# the audit agrees

AUDITED = [name for name in CONFIGURATIONS if name not in ("general",)]


@pytest.mark.parametrize("name", AUDITED)
def test_the_audit_passes(name: str) -> None:
    built = memory(**CONFIGURATIONS[name])
    report = audit(built, randn(2, 14, built.dim), stream=stream_with_state, padded=padded_with_mask, window=0)
    report.check()
    assert all(finding.passed for finding in report.findings)
    assert not report.notes, "not even a NaN reaches back"
