"""Memories that grow: the oracle's equations, pieces, states, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.support.capacity_by_the_book import CapacityUnderTest
from tests.support.configurations import Case, cases
from tests.support.kept_states import check_kept
from tests.support.streams import disturbed, in_pieces, randn
from tests.test_exactness import VALUES, check
from titans_pytorch import (
    MemoryMLP,
    NeuralMemory,
    TitansConfig,
    TitansMAG,
    audit,
    writes_off,
)
from titans_pytorch.auditing.audit import stream_with_state


@st.composite
def growing(draw: st.DrawFn) -> Case:
    case: Case = draw(cases())
    options = case.options | {"accept_weight_residual": False, "keep_lengths": False}
    options["model"] = draw(st.sampled_from(["default", "default", "deep", "glu"]))
    hidden = 8 if options["model"] == "deep" else 6  # of features of 4
    chunk = options["chunk_size"]
    read, store = (chunk, chunk) if isinstance(chunk, int) else chunk
    tokens = lcm(read, store) * draw(st.integers(1, 2))
    split = tuple(draw(st.lists(st.integers(1, 2 * tokens), min_size=1, max_size=4)))
    capacity = CapacityUnderTest((draw(st.sampled_from([each for each in (1, 2, 3, 4) if hidden % each == 0])), tokens))
    engine = case.engine if case.engine != "factored" or not options["spectral_norm_surprises"] else "dense"
    return replace(case, options=options, num_tokens=sum(split), split=split, borders=capacity, engine=engine)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=growing())
def test_any_pieces_of_any_configuration_equal_the_equations(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=growing())
def test_many_more_configurations_equal_the_equations(case: Case) -> None:
    check(case)


def memory_of(**options: Any) -> NeuralMemory:
    """Small, in float64, every parameter moved away from where it starts."""
    torch.manual_seed(0)
    given: dict[str, Any] = dict(chunk_size=2, batch_size=2, capacity=(3, 4), conv_size=3)
    return disturbed(NeuralMemory(6, heads=2, dim_head=3, **given | options).double())


def like(memory: NeuralMemory, **options: Any) -> NeuralMemory:
    """One with the same parameters and other options."""
    other = memory_of(**options)
    other.load_state_dict(memory.state_dict())
    return other


def units_in_use(weights: dict[str, torch.Tensor]) -> list[int]:
    """How many hidden units have weights that are not zero, before them and behind them."""
    to_hidden, to_out = weights["model.weights.0"], weights["model.weights.1"]
    before, behind = to_hidden.abs().sum(dim=(0, 1)), to_out.abs().sum(dim=(0, 2))
    return [int(before.count_nonzero()), int(behind.count_nonzero())]


def test_units_are_opened_block_by_block() -> None:
    memory, x = memory_of(), randn(2, 20, 6)
    assert memory.init_weights(1)["model.weights.0"].shape == (2, 3, 12)
    used = []
    for num_tokens in (1, 3, 4, 7, 8, 20):
        state = memory(x[:, :num_tokens])[1]
        used.append((num_tokens, *units_in_use(state.current)))
    assert used == [(1, 4, 4), (3, 4, 4), (4, 8, 8), (7, 8, 8), (8, 12, 12), (20, 12, 12)]


def test_a_closed_unit_gathers_no_momentum() -> None:
    state = memory_of()(randn(2, 7, 6))[1]
    assert units_in_use({name: momenta[0] for name, momenta in state.momenta.items()}) == [8, 8]


def test_one_block_is_a_memory_that_does_not_grow() -> None:
    memory, x = memory_of(capacity=(1, 4)), randn(2, 21, 6)
    plain = like(memory, capacity=None)
    assert_close(memory(x)[0], plain(x)[0], **VALUES)
    assert_close(memory(x)[1].current, plain(x)[1].current, **VALUES)


def test_before_the_first_border_it_is_a_smaller_memory() -> None:
    memory, x = memory_of(max_weight_growth=None), randn(2, 4, 6)
    torch.manual_seed(0)
    small = NeuralMemory(
        6, 2, 2, heads=2, dim_head=3, conv_size=3, model=MemoryMLP(3, 2, 4 / 3), max_weight_growth=None
    )
    small = small.double()
    given = memory.state_dict()
    for name, part in (
        ("memory_model_parameters.1", (..., slice(4))),
        ("memory_model_parameters.2", (..., slice(4), slice(None))),
    ):
        given[name] = given[name][part]
    small.load_state_dict(given)
    assert_close(memory(x)[0], small(x)[0], **VALUES)


def test_what_is_closed_does_not_forget() -> None:
    """A block begins as in the learned start, whenever it is opened."""
    memory, x = memory_of(init_decay_bias=3.0), randn(1, 8, 6)
    state = memory(x)[1]
    start = memory.initial_weights()["model.weights.0"]
    assert torch.equal(state.current["model.weights.0"][..., 8:], start[..., 8:])


def test_a_plan_is_of_the_longest_part() -> None:
    memory = memory_of()
    assert memory.plan(batch=2, num_tokens=20).num_chunks == 6  # behind the last border
    assert memory.plan(batch=2, num_tokens=7).num_chunks == 2


def test_states_are_saved_selected_joined_and_reset(tmp_path: Any) -> None:
    check_kept(memory_of(), randn(3, 5, 6), randn(3, 9, 6, seed=1), tmp_path)


def test_a_row_that_is_reset_has_what_its_position_has_opened() -> None:
    memory = memory_of()
    state = memory.reset(memory(randn(2, 9, 6))[1])
    everything = {name: torch.cat((weight, weight)) for name, weight in memory.initial_weights().items()}
    assert_close(state.current, everything)


def test_a_memory_is_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    memory, x = NeuralMemory(6, 2, 2, heads=2, dim_head=3, capacity=(3, 4)), randn(2, 19, 6).float()
    memory.save_pretrained(tmp_path)
    again = NeuralMemory.from_pretrained(tmp_path)
    assert again.capacity == (3, 4)
    assert_close(again(x)[0], memory(x)[0])


def test_padding_and_documents_grow_by_themselves() -> None:
    memory, x = memory_of(), randn(1, 22, 6)
    documents = torch.tensor([[0] * 13 + [1] * 9])
    expected = torch.cat([memory(x[:, :13])[0], memory(x[:, 13:])[0]], dim=1)
    assert_close(memory(x, document_ids=documents)[0], expected, **VALUES)


def test_with_writes_off_it_grows_and_learns_nothing() -> None:
    memory, x = memory_of(), randn(2, 21, 6)
    with torch.no_grad(), writes_off(memory):
        whole, state = memory(x)
        assert_close(in_pieces(memory, x, (3, 8, 10))[0], whole, **VALUES)
    assert_close(state.current, memory.init_weights(2, 21))


def test_a_model_of_such_memories_streams_and_sees_no_future() -> None:
    torch.manual_seed(0)
    config = TitansConfig(
        16,
        depth=1,
        heads=2,
        window=4,
        num_persistent=0,
        memory_chunk=2,
        memory_refresh=2,
        memory_options=dict(capacity=(2, 8)),
    )
    model = TitansMAG(11, config).double()
    audit(model.backbone, randn(2, 20, 16), stream=stream_with_state, splits=[(1,) * 20, (9, 11)]).check()
    assert "has a memory whose capacity grows" in model.why_by_groups


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(capacity=3), TypeError, r"capacity must be a pair \(blocks, tokens\) of whole numbers, got 3"),
        (dict(capacity=(0, 4)), ValueError, r"capacity\[0\] must be positive, got 0"),
        (dict(capacity=(3, 2.5)), TypeError, r"capacity\[1\] must be a whole number, got 2.5"),
        (dict(capacity=(5, 4)), ValueError, "capacity must divide the 12 hidden units into blocks, got 5"),
        (dict(capacity=(3, 5)), ValueError, r"at multiples of the chunk size to read \(2\), got 5"),
        (dict(chunk_size=(1, 2), capacity=(3, 5)), ValueError, r"at multiples of the chunk size to store \(2\), got 5"),
        (dict(shard=4), ValueError, "capacity and shard exclude each other"),
        (dict(keep_lengths=True), ValueError, "capacity and keep_lengths exclude each other"),
        (dict(accept_weight_residual=True), ValueError, "capacity and accept_weight_residual exclude each other"),
        (
            dict(rule="decay_to_start"),
            ValueError,
            "capacity needs a rule that leaves what is closed at 0, got DecayToStart",
        ),
        (dict(rule="kl"), ValueError, "capacity needs a rule that leaves what is closed at 0"),
        (dict(rule="lact"), ValueError, "capacity needs a rule that leaves what is closed at 0, got LaCT"),
        (
            dict(model="linear"),
            ValueError,
            "capacity needs a memory model with hidden units, as mlp and glu are, got MemoryMLP",
        ),
        (
            dict(model="attention"),
            ValueError,
            "capacity needs a memory model with hidden units, .* got MemoryAttention",
        ),
    ],
)
def test_wrong_combinations_end_in_a_sentence(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        memory_of(**options)


def test_only_storing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"store_memories needs a memory without capacity, got capacity=\(3, 4\)"):
        memory_of().store_memories(randn(2, 5, 6))


@pytest.mark.parametrize(
    "options", [dict(rule="lq"), dict(rule="atlas"), dict(rule="gated_delta"), dict(window=2), dict(loss="yaad")]
)
def test_other_rules_grow_too(options: dict[str, Any]) -> None:
    memory, x = memory_of(**options), randn(2, 15, 6)
    outputs, state = memory(x)
    assert_close(in_pieces(memory, x, (3, 1, 4, 7))[0], outputs, **VALUES)
    assert units_in_use(memory(x[:, :7])[1].current) == [8, 8]
    assert units_in_use(state.current) == [12, 12]
