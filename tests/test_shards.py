"""Memories that restart, and queries on keys: the oracle's equations, pieces, states, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.configurations import Case, cases
from tests.support.kept_states import check_kept
from tests.support.shards_by_the_book import ShardsUnderTest
from tests.support.streams import disturbed, in_pieces, randn
from tests.test_exactness import VALUES, check
from titans_pytorch import NeuralMemory, writes_off

SPANS = (None, "chunk", "shard")


@st.composite
def in_shards(draw: st.DrawFn) -> Case:
    case: Case = draw(cases())
    options = case.options | {"accept_weight_residual": False}
    chunk = options["chunk_size"]
    read, store = (chunk, chunk) if isinstance(chunk, int) else chunk
    shortest = lcm(read, store, options["batch_size"] or 1)
    shard = shortest * max(draw(st.integers(1, 2)), -(-((options["conv_size"] or 1) - 1) // shortest))
    split = tuple(draw(st.lists(st.integers(1, 3 * shard), min_size=1, max_size=3)))
    shards = ShardsUnderTest(shard, draw(st.sampled_from(SPANS)))
    return replace(case, options=options, num_tokens=sum(split), split=split, borders=shards)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=in_shards())
def test_any_pieces_of_any_configuration_equal_the_equations(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=in_shards())
def test_many_more_configurations_equal_the_equations(case: Case) -> None:
    check(case)


def memory_of(seed: int = 0, **options: Any) -> NeuralMemory:
    """Small, in float64, every parameter moved away from where it starts."""
    torch.manual_seed(seed)
    given: dict[str, Any] = dict(chunk_size=2, batch_size=2, shard=8, qk_projection="shard", conv_size=3)
    return disturbed(NeuralMemory(6, heads=2, dim_head=3, **given | options).double())


def without_shards(memory: NeuralMemory, **options: Any) -> NeuralMemory:
    """A memory with the same parameters that never restarts."""
    other = memory_of(shard=None, qk_projection=None, **options)
    other.load_state_dict(memory.state_dict())
    return other


def test_one_shard_is_titans() -> None:
    memory, x = memory_of(shard=24, qk_projection=None), randn(2, 24, 6)
    assert_close(memory(x)[0], without_shards(memory)(x)[0], **VALUES)
    assert_close(memory(x[:, :23])[1].current, without_shards(memory)(x[:, :23])[1].current, **VALUES)


def test_shards_are_sequences_of_their_own() -> None:
    """But for convolutions, which see the tokens before."""
    options: dict[str, Any] = dict(conv_size=None, qk_projection=None)
    memory, x = memory_of(**options), randn(2, 21, 6)
    alone = without_shards(memory, conv_size=None)
    expected = torch.cat([alone(shard)[0] for shard in x.split(8, dim=1)], dim=1)
    assert_close(memory(x)[0], expected, **VALUES)


def test_whole_shards_are_read_side_by_side() -> None:
    memory = memory_of()
    assert memory.plan(batch=2, num_tokens=80).num_chunks == 4
    assert memory.plan(batch=2, num_tokens=80, state=memory(randn(2, 3, 6))[1]).num_chunks == 4
    assert memory.plan(batch=2, num_tokens=5, state=memory(randn(2, 3, 6))[1]).num_chunks == 3


def test_a_state_at_a_border_is_the_start_of_the_memory() -> None:
    memory = memory_of()
    state = memory(randn(2, 16, 6))[1]
    assert state.num_seen == 16
    fresh = memory.init_state(2)
    assert_close(state.current, fresh.current)
    assert_close(state.momenta, fresh.momenta)
    assert_close(state.span.total, fresh.span.total)
    assert not torch.equal(state.span.tail, fresh.span.tail)  # convolutions go on


@pytest.mark.parametrize("span", SPANS)
def test_states_are_saved_selected_joined_and_reset(span: Any, tmp_path: Any) -> None:
    check_kept(memory_of(qk_projection=span), randn(3, 13, 6), randn(3, 9, 6, seed=1), tmp_path)


def test_a_memory_is_saved_and_loaded(tmp_path: Any) -> None:
    memory, x = memory_of(activation=nn.SiLU()), randn(2, 19, 6)
    memory.save_pretrained(tmp_path)
    again = NeuralMemory.from_pretrained(tmp_path)
    assert again.sharding == memory.sharding
    assert_close(again(x)[0], memory(x)[0])


def test_padding_and_documents_begin_their_own_shards() -> None:
    memory, x = memory_of(), randn(1, 22, 6)
    documents = torch.tensor([[0] * 13 + [1] * 9])
    expected = torch.cat([memory(x[:, :13])[0], memory(x[:, 13:])[0]], dim=1)
    assert_close(memory(x, document_ids=documents)[0], expected, **VALUES)


def test_with_writes_off_the_memory_stands_still_and_keys_do_not() -> None:
    memory, x = memory_of(), randn(2, 21, 6)
    state = memory(x[:, :5])[1]
    with torch.no_grad(), writes_off(memory):
        whole, after = memory(x[:, 5:], state=state)
    assert whole.shape == (2, 16, 6)
    assert_close(after.current, state.current)
    fresh = memory_of()
    with torch.no_grad(), writes_off(fresh):
        outputs, _ = in_pieces(fresh, x, (3, 8, 10))
        assert_close(outputs, fresh(x)[0], **VALUES)
        assert not torch.equal(outputs[:, 0], outputs[:, 1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shard=7), r"shard must be a multiple of the chunk size to read \(2\), got 7"),
        (dict(chunk_size=(1, 2), shard=7), r"shard must be a multiple of the chunk size to store \(2\), got 7"),
        (dict(batch_size=4, shard=6), r"shard must be a multiple of the batch size \(4\), got 6"),
        (dict(shard=0), "shard must be positive, got 0"),
        (dict(shard=2, conv_size=4), r"shard must be at least conv_size - 1 \(3\), got 2"),
        (dict(shard=None), "qk_projection='shard' needs a shard, got shard=None"),
        (dict(qk_projection="batch"), "qk_projection must be one of None, 'chunk', 'shard', got 'batch'"),
        (dict(accept_weight_residual=True), "shard and accept_weight_residual exclude each other"),
    ],
)
def test_wrong_combinations_end_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_of(**options)


def test_what_such_a_memory_cannot_do_ends_in_a_sentence() -> None:
    memory, x = memory_of(), randn(2, 5, 6)
    state = memory(x)[1]
    with pytest.raises(ValueError, match="what is only read must have qk_projection=None, got 'shard'"):
        memory.ask(x, state.current)
    with pytest.raises(ValueError, match="what is only read must have qk_projection=None"):
        memory.retrieve_memories(x, state.current)
    with pytest.raises(ValueError, match="store_memories needs a memory without shards, got shard=8"):
        memory.store_memories(x)
    with pytest.raises(ValueError, match=r"ttt_batch_size must divide the shard \(8\), got 6"):
        memory(x, ttt_batch_size=6)
    with pytest.raises(ValueError, match="state must be of a memory with qk_projection='shard', got one without"):
        memory(x, state=state._replace(span=None))
    with pytest.raises(ValueError, match=r"state.span.total must have the shape \(4, 3, 3\)"):
        memory(x, state=state._replace(span=state.span._replace(total=state.span.total[:2])))


def test_a_gradient_does_not_pass_a_border() -> None:
    memory = memory_of(conv_size=None)
    x = randn(1, 16, 6).requires_grad_()
    (g,) = torch.autograd.grad(memory(x)[0][:, 8:].square().sum(), x)
    assert g[:, :8].abs().max() == 0 < g[:, 8:].abs().min()


def test_what_is_not_finite_stays_behind_the_tokens_before_it() -> None:
    memory, x = memory_of(), randn(1, 8, 6)
    broken: Tensor = x.clone()
    broken[:, 5] = torch.nan
    assert_close(memory(broken)[0][:, :5], memory(x)[0][:, :5], **VALUES)
    assert memory(broken)[0][:, 5:].isnan().all()
