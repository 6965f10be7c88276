"""LaCT: norms that stay, against its equations; its memory, its models, what does not fit it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.support.configurations import Case, cases, with_rule
from tests.support.rules_by_the_book import LACT, LACT_ORTHOGONAL, LACT_WITHOUT_MOMENTUM
from tests.support.streams import disturbed, in_pieces, randn
from tests.support.titans_configurations import DIM, MODELS, NUM_TOKENS, random_ids
from tests.test_exactness import VALUES, check
from titans_pytorch import MemoryGLU, NeuralMemory, TitansBackbone, TitansConfig, audit, load_state, save_state
from titans_pytorch.auditing.audit import stream_with_state

RULES = (LACT, LACT_WITHOUT_MOMENTUM, LACT_ORTHOGONAL)
CONFIG = TitansConfig.lact(DIM, 2, chunk=4, heads=2, ff_hidden=6, num_persistent=2)


@st.composite
def of_lact(draw: st.DrawFn) -> Case:
    rule, case = draw(st.sampled_from(RULES)), draw(cases())
    engine = "general" if case.engine == "general" else "dense"
    options = case.options | {"default_step_transform_max_lr": 0.05} if rule is LACT_ORTHOGONAL else case.options
    return with_rule(replace(case, engine=engine, options=options), rule)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=of_lact())
def test_any_pieces_of_any_configuration_equal_the_equations(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=of_lact())
def test_many_more_configurations_equal_the_equations(case: Case) -> None:
    check(case)


def lact(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    given: dict[str, Any] = dict(rule="lact", loss="dot", model="glu", mem_model_norm_add_residual=False)
    given |= dict(chunk_size=4, batch_size=4)
    return disturbed(NeuralMemory(6, heads=2, dim_head=3, **given | options).double())


@pytest.mark.parametrize("options", [{}, dict(spectral_norm_surprises=True), dict(momentum=False)])
def test_every_output_sums_over_weights_as_long_as_in_the_start(options: dict[str, Any]) -> None:
    memory = lact(**options)
    state = memory(randn(2, 21, 6))[1]
    start = memory.init_weights(2)
    for name, weight in state.current.items():
        assert_close(weight.norm(dim=-2), start[name].norm(dim=-2))
        assert (weight - start[name]).abs().max() > 1e-3


def test_the_memory_is_a_gated_network_without_norm_or_residual() -> None:
    model, x = MemoryGLU(3, expansion_factor=2.0).double(), randn(5, 3)
    w1, w3, w2 = model.weights
    assert_close(model(x), (torch.nn.functional.silu(x @ w1) * (x @ w3)) @ w2)
    assert w1.shape == (3, 6)


def test_the_preset() -> None:
    memory, x = NeuralMemory.lact(8, heads=2, chunk_size=4), torch.randn(2, 21, 8)
    assert memory.layout == (4, 4, 4, 0)
    assert type(memory.rule).__name__ == "LaCT"
    assert isinstance(memory.memory_model, MemoryGLU)
    memory(x)[0].square().mean().backward()
    assert all(p.grad is not None for p in memory.parameters())
    assert NeuralMemory.lact(8, heads=2).layout == (2048, 2048, 2048, 0)
    assert TitansConfig.lact(8, 1, memory_options=dict(window=2)).memory_options == dict(
        apply_then_update=True, window=2
    )


@pytest.mark.parametrize("chunks", [4, (2, 4), (4, 2)])
def test_a_chunk_is_read_by_no_token_of_its_own(chunks: Any) -> None:
    """Apply, then update: with another value of its last token nothing that was read in a chunk is different."""
    memory = lact(chunk_size=chunks, apply_then_update=True, qkv_receives_diff_views=True)
    usual, x = lact(chunk_size=chunks, qkv_receives_diff_views=True), randn(3, 1, 8, 6)
    changed = x.clone()
    changed[1:, :, 3] += 1.0
    read, other = memory(x)[0], memory(changed)[0]
    assert torch.equal(read[:, :4], other[:, :4])
    assert (read[:, 4] - other[:, 4]).abs().max() > 1e-6
    assert (usual(x)[0][:, 3] - usual(changed)[0][:, 3]).abs().max() > 1e-6
    assert_close(usual(x)[0][:, :3], read[:, :3])


def test_a_matrix_of_zeros_stays_finite() -> None:
    memory = lact()
    with torch.no_grad():
        memory.memory_model_parameters[1].zero_()
    x = randn(2, 13, 6).requires_grad_()
    memory(x)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize("variant", ["mag", "mal", "lmm", "mac"])
def test_models_stream_and_are_causal(variant: Any) -> None:
    torch.manual_seed(0)
    backbone = disturbed(TitansBackbone(variant, CONFIG).double())
    audit(backbone, randn(2, 13, DIM), stream=stream_with_state, splits=[(1,) * 13, (5, 2, 6)]).check()


def test_a_model_and_its_state_are_saved(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, memory_options=dict(spectral_norm_surprises=True), decay=False)
    model, ids = MODELS["mag"](NUM_TOKENS, config), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == config
    expected, state = model(ids)
    assert_close(again(ids)[0], expected)
    save_state(state, tmp_path / "state", model)
    loaded: Any = load_state(tmp_path / "state", model=model)
    assert_close(model(ids, loaded)[0], model(ids, state)[0])
    model.loss(ids).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_restarting_and_norms_that_stay_go_together() -> None:
    memory, x = lact(shard=8, qk_projection="chunk"), randn(2, 21, 6)
    assert_close(in_pieces(memory, x, (3, 5, 13))[0], memory(x)[0], **VALUES)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(momentum_order=2), "momentum_order must be left out with rule='lact', which has one order"),
        (dict(channelwise_decay=True), "channelwise_decay must be left out with rule='lact'"),
        (dict(init_decay_bias=-4.0), "init_decay_bias must be left out with rule='lact'.*got -4.0"),
        (dict(window=2), "window must be left out with rule='lact'"),
        (dict(engine="factored"), "engine 'factored' cannot be used with a rule that keeps norms"),
    ],
)
def test_wrong_combinations_end_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lact(**options)
