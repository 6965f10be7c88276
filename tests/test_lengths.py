"""Weights that stay as long as they were: the norms of E²-TTT and LaCT, kept where the base is renewed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.testing import assert_close

from tests.support.configurations import Case, cases
from tests.support.streams import disturbed, in_pieces, randn
from tests.test_exactness import check
from titans_pytorch import NeuralMemory, audit
from titans_pytorch.fast_weights.norms import lengths_of, with_length


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_kept_lengths_equal_the_oracle(case: Case) -> None:
    chunk = case.options["chunk_size"]
    store = chunk if isinstance(chunk, int) else chunk[1]
    check(replace(case, options=case.options | {"keep_lengths": True, "batch_size": store * (1 + case.seed % 2)}))


def e2_ttt(**more: object) -> NeuralMemory:
    """Gates of every token, gradients at the start of every 8, limited, and kept lengths (arXiv 2608.21308)."""
    torch.manual_seed(0)
    options = dict(chunk_size=8, token_gates=True, keep_lengths=True, max_grad_norm=1.0) | more
    return disturbed(NeuralMemory.paper(8, 2, **options).double(), 0.1)


def test_a_base_is_as_long_as_the_start_and_streams() -> None:
    memory, x = e2_ttt(), randn(2, 37, 8)
    whole, state = memory(x)
    for name, length in lengths_of(memory.init_weights(2)).items():
        assert_close(lengths_of(state.base)[name], length)
    assert_close(in_pieces(memory, x, (5, 11, 1, 20))[0], whole, rtol=1e-9, atol=1e-9)
    assert audit(memory, x).passed


def test_where_nothing_moves_nothing_changes() -> None:
    still = dict(init_adaptive_step_bias=-80.0, init_decay_bias=-80.0)
    memory = NeuralMemory(8, 2, 2, keep_lengths=True, **still).double()
    _, state = memory(randn(1, 9, 8))
    assert_close(state.current, memory.init_weights(1), rtol=1e-12, atol=1e-12)


def test_weights_of_nothing_stay_nothing_and_have_a_gradient() -> None:
    weight = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    found = with_length(weight, torch.ones(1, 1, 2, dtype=torch.float64))
    assert (found == 0).all()
    found.sum().backward()
    assert weight.grad.isfinite().all()


def test_without_a_renewal_it_is_said_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match="keep_lengths=True has no effect with batch_size=None"):
        NeuralMemory(8, 2, keep_lengths=True)
    with pytest.raises(TypeError, match="keep_lengths must be True or False, got 1"):
        NeuralMemory(8, 2, keep_lengths=1)


def test_it_renews_one_by_one_and_says_why() -> None:
    memory = NeuralMemory(8, 1, 1, model="linear", mem_model_norm_add_residual=False, max_weight_growth=None)
    assert "renewals solved for" in memory.plan(1, 50).explain()
    kept = NeuralMemory(
        8, 1, 1, model="linear", mem_model_norm_add_residual=False, max_weight_growth=None, keep_lengths=True
    )
    assert "keep_lengths acts at every renewal" in kept.plan(1, 50).explain()
