"""A call is planned in whole numbers: what is stored, read, kept and computed again follows from lengths and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_pytorch import NeuralMemory
from titans_pytorch.memory.costs import COSTS, Costs, Sizes
from titans_pytorch.memory.layout import Layout
from titans_pytorch.memory.plan import CallPlan, plan_call

SIZES = Sizes(
    heads=2,
    writes_per_chunk=4,
    matrices=((8, 32), (32, 8)),
    num_elements=520,
    num_channels=48,
    representation="factored",
)


UNRENEWED = Layout(4, 4, None)


def plan(layout: Layout = UNRENEWED, sizes: Sizes = SIZES, **changes: Any) -> CallPlan:
    call = dict(batch=1, first_token=1, num_tokens=64, first_chunk=0, has_grad=True, can_recompute=True) | changes
    return plan_call(layout, sizes, **call)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    chunks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    chunks_in_a_batch=st.sampled_from([None, 1, 2, 3]),
    before=st.integers(0, 30),
    num_tokens=st.integers(1, 60),
    span_tokens=st.sampled_from([1, 16, 4096]),
)
def test_every_chunk_is_stored_once_and_every_group_read_once(
    chunks: tuple[int, int], chunks_in_a_batch: int | None, before: int, num_tokens: int, span_tokens: int
) -> None:
    """In order, at weights of no later chunk than its own; the base is renewed where a batch ends, and only there."""
    retrieve, store = chunks
    batch = None if chunks_in_a_batch is None else chunks_in_a_batch * store
    layout, first_chunk = Layout(retrieve, store, batch), before // store
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSTS, "cpu", Costs(span_tokens=span_tokens))
        found = plan(layout, first_token=before + 1, num_tokens=num_tokens, first_chunk=first_chunk)
    blocks = [block for span in found.spans for block in span]
    stored = [chunk for b in blocks for chunk in range(b.first_chunk, b.first_chunk + b.num_chunks)]
    assert stored == list(range(first_chunk, (before + num_tokens) // store))
    assert found.num_chunks == len(stored)
    groups = [group for b in blocks for group in range(b.first_group, b.last_group)]
    read = {(token // retrieve) for token in range(before + 1, before + num_tokens + 1)}
    assert groups == sorted(groups)
    assert set(groups) <= read
    assert min(read) in groups or layout.weight_index(min(read)) < first_chunk, "else it had begun before the call"
    for b in blocks:
        for group in range(b.first_group, b.last_group):
            index = layout.weight_index(group) - b.first_chunk
            assert 0 <= index <= b.num_chunks, "it reads an entry of the block it is read with"
    for b in blocks:
        ends = (b.first_chunk + b.num_chunks) * store
        assert b.renews_base == (batch is not None and b.num_chunks > 0 and ends % batch == 0)


def test_a_short_call_is_one_span_that_is_kept() -> None:
    found = plan()
    assert len(found.spans) == 1
    assert not found.recomputes
    assert found.keeps_blocks
    assert found.explain() == (
        f"16 chunk(s) in {sum(b.num_chunks > 0 for b in found.spans[0])} block(s), 1 span(s), "
        "kept if a backward pass may come; weights kept for whoever looks at them; block by block; "
        "one chunk to a block would cost 108.4 times as much"
    )


def test_a_call_that_would_keep_too_much_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a backward pass may follow, and where a span can be run twice."""
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=100, block_elements=100))
    assert plan().recomputes
    assert not plan(has_grad=False).recomputes
    assert not plan(can_recompute=False).recomputes
    assert not plan(batch=1, num_tokens=3).recomputes, "nothing is stored"


def test_blocks_are_made_again_where_nobody_may_differentiate_or_they_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = Layout(4, 4, 8)  # several blocks
    assert plan(layout).keeps_blocks
    assert not plan(layout, has_grad=False).keeps_blocks
    assert plan(layout, num_tokens=8, has_grad=False).keeps_blocks, "a single block costs nothing to keep"
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=100, block_elements=100))
    assert not plan(layout).keeps_blocks
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=100))
    assert plan(layout).keeps_blocks


def test_long_calls_are_cut_into_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "cpu", Costs(span_tokens=64))  # of two rows: 32 tokens, 8 chunks
    found = plan(Layout(4, 4, 8), num_tokens=128)
    assert [sum(b.num_chunks for b in span) for span in found.spans] == [8, 8, 8, 8]


def test_long_chunks_are_blocks_of_their_own_and_short_ones_share_one() -> None:
    """What a block costs is shared by its writes; what is read inside of it grows with their square."""
    matrices = ((384, 1536), (1536, 384))
    sizes = Sizes(1, 1, matrices, 2 * 384 * 1536, 1920, "factored")

    def longest(chunk: int, kind: Any = "factored", has_grad: bool = True) -> int:
        of = sizes._replace(writes_per_chunk=chunk, representation=kind)
        found = plan(Layout(chunk, chunk, None), of, batch=2, num_tokens=1024, has_grad=has_grad)
        return max(b.num_chunks for span in found.spans for b in span)

    assert longest(128) == 1
    assert longest(16) > 1
    assert longest(1) > longest(16)
    assert longest(4, "built", has_grad=False) == 1, "weights that are built fill memory"
    assert longest(4, "built") == 4, "in training each block is many operations more"
    assert longest(1, "channels") <= Costs().channel_chunks[1]


@pytest.mark.parametrize(
    "dim, rows, tokens, is_training, blocks",
    [
        (384, 1, None, True, 1),  # one row of it fits four times, which is too few where no base is renewed
        (256, 1, None, True, 9),
        (256, 1, None, False, 1),  # what is read at the end would have to be kept
        (384, 1, 64, True, 4),
        (384, 2, 64, True, 1),  # too few, and long batches gain little
        (384, 2, 32, True, 4),  # short ones gain more
        (384, 4, 32, True, 1),  # not even two fit
    ],
)
def test_loops_in_training_are_long_enough_to_be_worth_it(
    dim: int, rows: int, tokens: int | None, is_training: bool, blocks: int
) -> None:
    memory = NeuralMemory(dim, chunk_size=tokens or 64, batch_size=tokens)
    with torch.set_grad_enabled(is_training):
        choice = memory.plan(rows, 1024).choice
    assert choice.longest_series == blocks
    assert choice.has_loop == (blocks > 1)


def test_without_room_for_a_series_everything_goes_block_by_block_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error of a loop that is differentiated twice says."""
    monkeypatch.setitem(COSTS, "cpu", Costs(series_elements=0))
    for options in ({}, {"num_kv_per_token": 4}, {"channelwise_decay": True}):
        assert not NeuralMemory(384, chunk_size=32, batch_size=32, **options).plan(2, 1024).choice.has_loop


def test_another_kind_of_device_has_costs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "imaginary", Costs(span_tokens=16))
    assert len(plan(Layout(4, 4, 8), device="imaginary").spans) > len(plan(Layout(4, 4, 8), device="unknown").spans)
    assert plan(Layout(4, 4, 8), device="unknown") == plan(Layout(4, 4, 8))


def test_a_memory_says_how_it_will_run_a_call() -> None:
    memory = NeuralMemory(8, chunk_size=4, batch_size=12)
    found = memory.plan(batch=2, num_tokens=36)
    assert found.explain().startswith("9 chunk(s) in 3 block(s), 1 span(s), ")
