"""The oracle is right: it agrees with every golden vector, and keeps the laws that no golden vector shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.golden import Golden, gradient_errors, load, names, output_errors
from tests.support.oracle import OracleOutput, memory_model, oracle
from tests.support.streams import randn

GOLDENS = names("nm_")
VALUES, GRADIENTS = 1e-12, 1e-10  # relative; where it stands: 1e-14, 4e-12


def run(golden: Golden, seq: Tensor, *, parameters: dict[str, Tensor] | None = None, **changes) -> OracleOutput:
    """The oracle with the parameters and arguments of a golden vector; `changes` are of the call or of arguments."""
    options = {**golden.kwargs, **changes}
    model = memory_model(**golden.kwargs)
    return oracle(golden.state if parameters is None else parameters, model, seq, **options)


def previous_updates(golden: Golden, seq: Tensor) -> dict[str, Tensor] | None:
    if not golden.prev_state:
        return None
    with torch.no_grad():
        return run(golden, seq, parameters=golden.prev_state, accept_weight_residual=False).updates


def learned(golden: Golden) -> dict[str, Tensor]:
    """The parameters, waiting for gradients, without the published second copy of the initial memory."""
    return {
        name: value.clone().requires_grad_()
        for name, value in golden.state.items()
        if not name.startswith("memory_model.")
    }


# golden vectors


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    golden = load(name)
    parameters, seq = learned(golden), golden.inputs["seq"].requires_grad_()
    assert [key for key, _ in memory_model(**golden.kwargs).named_parameters()] == golden.memory_parameters
    call = {"ttt_batch_size": golden.call.get("ttt_batch_size"), "prev_updates": previous_updates(golden, seq)}
    out = run(golden, seq, parameters=parameters, **call)
    got = {"retrieved": out.retrieved, "unweighted_loss": out.loss, "adaptive_lr": out.rates}
    got |= {f"last_weights/{key}": weight for key, weight in out.last.items()}
    if "then" in golden.call:  # continuing a state is reading on
        more = torch.cat((seq, golden.inputs["more"]), dim=1)
        got["more"] = run(golden, more, **call).retrieved[:, seq.shape[1] :]
    errors = output_errors(golden, got)
    assert max(errors.values()) < VALUES, errors

    wanted = {"in/seq": seq, **parameters}
    probed = (out.retrieved * golden.inputs["probe"]).sum()
    grads = torch.autograd.grad(probed, list(wanted.values()), allow_unused=True)
    got = {key: grad for key, grad in zip(wanted, grads, strict=True) if grad is not None}
    assert got.keys() == golden.grads.keys()
    errors = gradient_errors(golden, got)
    assert max(errors.values()) < GRADIENTS, errors


def test_every_golden_vector_is_here() -> None:
    assert len(GOLDENS) == 38


# a token that is not stored


@pytest.mark.parametrize("name", ["nm_everything", "nm_momentum2_combine", "nm_model_attention", "nm_spectral"])
def test_masked_token_is_absent(name: str) -> None:
    """One masked token in each chunk of 4 = chunks of 3 without them, in values and gradients, even if it holds NaN."""
    golden, absent = load(name), randn(2, 12, 16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, [0, 5, 10, 15]] = mask[1, [3, 6, 9, 12]] = False
    masked = torch.full((2, 16, 16), torch.nan, dtype=torch.float64)
    masked[mask] = absent.flatten(0, 1)

    def outcome(stored: Tensor, mask: Tensor, **call) -> list[Tensor | None]:
        """Everything that storing leaves behind, and its gradients."""
        parameters = learned(golden)
        out = run(golden, torch.ones_like(stored), store_seq=stored, store_mask=mask, parameters=parameters, **call)
        by_token = [part.unflatten(2, (mask.shape[1], -1)).movedim(2, 1) for part in (out.loss, out.rates)]  # (b t h u)
        assert not any(part[~mask].any() for part in by_token)
        state = [part[mask] for part in by_token]
        state += [w for weights in (out.updates, out.base, out.last, out.momenta) for w in weights.values()]
        total = sum((tensor * randn(*tensor.shape)).sum() for tensor in state)
        return [*state, *torch.autograd.grad(total, list(parameters.values()), allow_unused=True)]

    got = outcome(masked, mask, chunk_size=4, batch_size=8)
    expected = outcome(absent, mask.new_ones(2, 12), chunk_size=3, batch_size=6)
    assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_chunk_without_stored_tokens_changes_nothing() -> None:
    golden, seq = load("nm_everything"), randn(1, 12, 16)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, 4:8] = False
    with_gap = run(golden, seq, store_mask=mask, batch_size=None)
    without = run(golden, torch.cat((seq[:, :4], seq[:, 8:]), dim=1), batch_size=None)
    for name, weights in with_gap.updates.items():
        assert torch.equal(weights[:, [0, 1, 3]], without.updates[name])
        assert torch.equal(weights[:, 1], weights[:, 2])
        assert torch.equal(with_gap.momenta[name], without.momenta[name])
    assert not torch.cat((with_gap.loss, with_gap.rates))[..., 8:16].any()


def test_lookahead_drops_pairs_with_a_masked_token() -> None:
    """Two writes per token: tokens shift whole, 3 pairs in a chunk of 4, and a pair needs both of its tokens."""
    golden, seq = load("nm_kv2"), randn(1, 8, 16)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, 5] = False
    out = run(golden, seq, store_mask=mask, store_with_lookahead_value=True)
    expected = torch.tensor([[[1] * 6 + [0, 0, 0, 0, 1, 1]]], dtype=torch.bool)
    assert torch.equal(out.loss > 0, expected)
    assert torch.equal(out.rates > 0, expected)


# closed forms


def test_linear_memory_is_the_delta_rule() -> None:
    """W_i = (1 - alpha) W_{i-1} + theta · 2/d · kᵀ(v - kW_{i-1}), read by token i as qW_i"""
    golden, seq = load("nm_model_linear"), randn(1, 7, 16)
    p = {**golden.state, "memory_model_parameters.0": golden.state["memory_model_parameters.1"]}
    linear = {"chunk_size": 1, "batch_size": 1, "momentum": False, "pre_rmsnorm": False}
    model = memory_model(**golden.kwargs).model
    out = oracle(p, model, seq, **{**golden.kwargs, **linear})
    weight = p["memory_model_parameters.1"][0]
    for i, x in enumerate(seq[0]):
        query, key, value = (p[f"to_{part}.weight"] @ x for part in ("queries", "keys", "values"))
        theta, alpha = (
            (p[f"{gate}.0.weight"] @ x + p[f"{gate}.0.bias"]).sigmoid()
            for gate in ("to_adaptive_step", "to_decay_factor")
        )
        weight = (1 - alpha) * weight + theta * 2 / 16 * torch.outer(key, value - key @ weight)
        assert_close(out.updates["weights.0"][0, i + 1], weight)
        assert_close(out.retrieved[0, i], query @ weight)


def test_reading_and_storing_in_different_chunks() -> None:
    """Reads every 3 tokens, stores every 2: token i reads w_{⌊⌊i/3⌋·3/2⌋}."""
    golden, seq = load("nm_no_residual_norm"), randn(1, 9, 16)
    out = run(golden, seq, chunk_size=(3, 2))
    assert_close(out.updates, run(golden, seq, chunk_size=2).updates)
    reads = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 3, 7: 3, 8: 3, 9: 4}
    normed = torch.nn.functional.rms_norm(seq[0], (16,), golden.state["retrieve_norm.weight"])
    for i, chunks in reads.items():
        first, second = (out.updates[f"weights.{layer}"][0, chunks] for layer in range(2))
        query = golden.state["to_queries.weight"] @ normed[i - 1]
        assert_close(out.retrieved[0, i - 1], torch.nn.functional.gelu(query @ first) @ second)


@pytest.mark.parametrize("name", ["nm_everything", "nm_gated_transition", "nm_model_attention", "nm_views"])
def test_a_prefix_answers_what_the_whole_answers_there(name: str) -> None:
    """Also where it ends on the border of a batch, where weights are gated."""
    golden = load(name)
    seq = randn(*golden.inputs["seq"].shape)
    whole = run(golden, seq)
    for length in (1, 3, 4, 7, 8, 9, 16):
        prefix = run(golden, seq[..., :length, :])
        assert_close(prefix.retrieved, whole.retrieved[:, :length])
        assert_close(prefix.last, {key: weights[:, length // 4] for key, weights in whole.updates.items()})


# limits


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_max_grad_norm(limit: float) -> None:
    """One chunk without momentum: every parameter's step keeps its direction and gets the length max·tanh(‖g‖/max)."""
    golden, seq = load("nm_no_momentum"), randn(1, 4, 16)
    decayed = run(golden, seq, adaptive_step_transform=torch.zeros_like, max_grad_norm=limit)
    free, limited = run(golden, seq), run(golden, seq, max_grad_norm=limit)
    for name, start in decayed.last.items():
        step, free_step = limited.last[name] - start, free.last[name] - start
        norm = free_step.norm()
        assert_close(step, free_step / norm * limit * torch.tanh(norm / limit), rtol=1e-6, atol=1e-12)


def test_max_grad_norm_is_finite_at_zero() -> None:
    golden = load("nm_default")
    parameters = learned(golden)
    out = run(
        golden, randn(1, 8, 16), parameters=parameters, adaptive_step_transform=lambda t: t * 0, max_grad_norm=1.0
    )
    out.retrieved.sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())


def test_max_weight_growth() -> None:
    """Huge steps: at each border the memory as a whole is brought back to its limit, between borders it is free."""
    golden, seq = load("nm_heads"), randn(2, 24, 16)
    options = {"batch_size": 8, "default_step_transform_max_lr": 30.0}

    def norms(out: OracleOutput) -> Tensor:
        return torch.cat([weights.flatten(2) for weights in out.updates.values()], dim=-1).norm(dim=-1)  # (r n+1)

    free, limited = run(golden, seq, **options), run(golden, seq, max_weight_growth=1.5, **options)
    start = norms(free)[:, 0]
    assert (norms(free)[:, 1:3] > 1.5 * start[:, None]).all()
    assert (norms(limited)[:, 1] > 1.5 * start).all()
    assert_close(norms(limited)[:, [2, 4, 6]], (1.5 * start)[:, None].expand(-1, 3))
    for name, weights in limited.updates.items():
        shrunk = free.updates[name][:, 2] * (1.5 * start / norms(free)[:, 2]).view(-1, *[1] * (weights.ndim - 2))
        assert_close(weights[:, 2], shrunk)
        assert torch.equal(limited.base[name], limited.last[name])
    generous = run(golden, seq, max_weight_growth=1e9, **options)
    assert all(torch.equal(weights, free.updates[name]) for name, weights in generous.updates.items())
