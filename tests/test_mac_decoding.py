"""Decoding: pieces equal the whole, and samples with the cache those without, for every option and prompt length."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from benchmarks.operations import operations
from tests.support.mac_configurations import NUM_TOKENS, build, choices, splits, window_of
from tests.support.streams import in_pieces
from titans_pytorch.mac import ahead
from titans_pytorch.mac_transformer import MACCache, MemoryAsContextTransformer

TOLERANCE = dict(rtol=1e-9, atol=1e-9)
GREEDY = dict(temperature=0.0, show_progress=False)

GRID: list[dict[str, Any]] = [
    dict(),
    dict(sliding_window_attn=True),
    dict(num_longterm_mem_tokens=1),
    dict(num_longterm_mem_tokens=4, sliding_window_attn=True, num_persist_mem_tokens=2),
    dict(neural_memory_layers=(), num_longterm_mem_tokens=1, num_persist_mem_tokens=2),
    dict(neural_memory_segment_len=2, batches=1, num_longterm_mem_tokens=1),
    dict(neural_memory_segment_len=9, neural_mem_gate_attn_output=True),
    dict(neural_memory_qkv_receives_diff_views=True, neural_memory_layers=(1, 3), batches=2),
    dict(neural_mem_weight_residual=True, neural_memory_segment_len=2, num_residual_streams=1),
    dict(neural_mem_weight_residual=True, neural_memory_segment_len=2, batches=2, memory="gated transition"),
    dict(memory="attention", neural_memory_segment_len=5, sliding_window_attn=True),
    dict(memory="lookahead", neural_mem_gate_attn_output=True, num_longterm_mem_tokens=1),
    dict(memory="two heads", neural_memory_qkv_receives_diff_views=True, neural_mem_weight_residual=True, batches=1),
]


def random_ids(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", GRID, ids=str)
def test_what_inference_mode_has_read_goes_on_outside_of_it(options: dict[str, Any]) -> None:
    model, ids = build(**options), random_ids(2, 23)
    expected = model(ids)[:, 14:]
    with torch.inference_mode():
        _, cache = model(ids[:, :14], return_cache=True)
    with torch.no_grad():
        assert_close(model(ids[:, 14:], cache=cache), expected, **TOLERANCE)
    logits = model(ids[:, 14:], cache=cache)
    assert_close(logits, expected, **TOLERANCE)
    logits.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("uses_state", [True, False])
@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_what_is_worked_out_ahead_changes_nothing(
    chosen: dict[str, Any], uses_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "STRETCH", 5)
    model, ids = build(**chosen), random_ids(2, 24)
    decoder = model.decoder(model(ids[:, :3], return_cache=True)[1], uses_state=uses_state)
    whole = model(ids)
    for piece in (slice(3, 7), *(slice(i, i + 1) for i in range(7, 24))):
        assert_close(decoder(ids[:, piece]), whole[:, piece.stop - 1], **TOLERANCE)


def test_a_decoded_token_takes_few_operations() -> None:
    """Two layers without a memory: four branches of 49, and 77 in attention, feed-forwards, logits and drawing."""
    torch.manual_seed(0)
    layout = dict(segment_len=16, num_persist_mem_tokens=4, num_longterm_mem_tokens=2, neural_memory_layers=())
    model = MemoryAsContextTransformer(num_tokens=32, dim=16, depth=2, dim_head=8, heads=2, **layout)
    prompt = torch.zeros(1, 4, dtype=torch.long)

    def taken(length: int) -> int:
        return operations(lambda: model.sample(prompt, length, use_cache=True, show_progress=False))

    counts = [taken(length) for length in (8, 10, 12)]
    assert {after - before for before, after in pairwise(counts)} == {2 * (4 * 49 + 77)}


@torch.no_grad()
def stream(model: MemoryAsContextTransformer, piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    return model(piece, cache=cache, return_cache=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_every_prompt_length_then_token_by_token(chosen: dict[str, Any], batch: int) -> None:
    model, window = build(**chosen), window_of(chosen)
    ids = random_ids(batch, 3 * window + 2)
    with torch.no_grad():
        whole = model(ids)
    for prompt in range(1, 3 * window + 1):
        split = (prompt, 1, 1) if prompt > 1 else (1,) * ids.shape[1]
        count = sum(split)
        assert_close(in_pieces(model, ids[:, :count], split, stream)[0], whole[:, :count], **TOLERANCE)


@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_samples_with_the_cache_are_those_without(chosen: dict[str, Any]) -> None:
    model, window = build(**chosen), window_of(chosen)
    for prompt in (1, window - 1, window, 2 * window + 1):
        ids = random_ids(3, prompt, seed=prompt)
        cached, plain = (model.sample(ids, prompt + 5, use_cache=used, **GREEDY) for used in (True, False))
        assert cached.shape == (3, 5)
        assert torch.equal(cached, plain)


def check(data: st.DataObject) -> None:
    chosen, batch = data.draw(choices()), data.draw(st.sampled_from([1, 3]))
    model = build(**chosen, seed=data.draw(st.integers(0, 1000)))
    ids = random_ids(batch, data.draw(st.integers(1, 3 * window_of(chosen))), seed=1)
    with torch.no_grad():
        whole = model(ids)
    assert_close(in_pieces(model, ids, data.draw(splits(ids.shape[1])), stream)[0], whole, **TOLERANCE)
    cached, plain = (model.sample(ids, ids.shape[1] + 3, use_cache=used, **GREEDY) for used in (True, False))
    assert torch.equal(cached, plain)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_in_any_pieces(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_more_configurations_in_any_pieces(data: st.DataObject) -> None:
    check(data)


def size(tree: Any) -> int:
    """Bytes that a tree keeps alive, storages of views in full."""
    if isinstance(tree, Tensor):
        return tree.untyped_storage().nbytes()
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return sum(map(size, children))


@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_the_cache_does_not_grow(chosen: dict[str, Any]) -> None:
    model = build(**chosen)
    with torch.no_grad():
        # A whole number of windows, segments and chunks, and one more token
        _, short = model(random_ids(1, 4 * 45 + 1), return_cache=True)
        _, long = model(random_ids(1, 12 * 45 + 1), return_cache=True)
    assert size(long) <= 1.5 * size(short)


def test_a_cache_can_be_detached_selected_repeated_and_moved() -> None:
    model = build(num_longterm_mem_tokens=1, sliding_window_attn=True)
    ids = random_ids(3, 14)
    with torch.no_grad():
        whole = model(ids)
    _, cache = model(ids[:, :9], return_cache=True)
    assert isinstance(cache, MACCache)
    assert cache.num_tokens == 9
    assert cache.windows[0].keys.requires_grad
    assert not cache.detach().windows[0].keys.requires_grad
    rows = torch.tensor([2, 0])
    assert_close(model(ids[rows, 9:], cache=cache.detach().select(rows)), whole[rows, 9:], **TOLERANCE)
    doubled = cache.to("cpu").repeat(2)
    assert doubled.batch == 6
    assert_close(model(ids[:, 9:].repeat_interleave(2, 0), cache=doubled)[::2], whole[:, 9:], **TOLERANCE)


@torch.no_grad()
def test_joined_caches_go_on_as_the_batch_they_were_selected_from() -> None:
    model, ids = build(num_longterm_mem_tokens=1, sliding_window_attn=True), random_ids(3, 14)
    _, cache = model(ids[:, :9], return_cache=True)
    joined = MACCache.join([cache.select([0]), cache.select(slice(1, 3))])
    assert joined.batch == 3
    assert torch.equal(model(ids[:, 9:], cache=joined), model(ids[:, 9:], cache=cache))
    _, longer = model(ids, return_cache=True)
    with pytest.raises(ValueError, match="states must have seen equally many tokens, got 9 and 14"):
        MACCache.join([cache, longer])


def test_gradients_flow_through_the_cache() -> None:
    model, ids = build(batches=1, neural_mem_weight_residual=True), random_ids(2, 13)
    parameters = list(model.parameters())
    probe = torch.randn(2, 13, NUM_TOKENS, dtype=torch.float64)
    whole = torch.autograd.grad((model(ids) * probe).sum(), parameters, allow_unused=True)
    first, cache = model(ids[:, :5], return_cache=True)
    second = model(ids[:, 5:], cache=cache)
    pieces = torch.autograd.grad((torch.cat((first, second), 1) * probe).sum(), parameters, allow_unused=True)
    for (name, _), left, right in zip(model.named_parameters(), pieces, whole, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            assert_close(left, right, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_the_loss_of_pieces_is_that_of_the_whole() -> None:
    model, ids = build(), random_ids(2, 13)
    first, cache = model(ids[:, :6], return_loss=True, return_cache=True)
    second = model(ids[:, 5:], return_loss=True, cache=cache)
    assert_close((first * 5 + second * 7) / 12, model(ids, return_loss=True), **TOLERANCE)


def test_a_prompt_may_be_fed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(num_longterm_mem_tokens=1), random_ids(2, 20)
    expected = model.sample(ids, 26, **GREEDY)
    monkeypatch.setattr("titans_pytorch.causal_lm.PREFILL_TOKENS", 7)
    assert torch.equal(model.sample(ids, 26, use_cache=True, **GREEDY), expected)
    with torch.no_grad():
        _, cache = model(ids[:, :15], return_cache=True)
    assert torch.equal(model.sample(ids[:, 15:], 11, cache=cache, **GREEDY), expected)


def test_samples_are_reproducible_and_stop() -> None:
    model, ids = build(), random_ids(2, 4)

    def sample(**kwargs: Any) -> Tensor:
        return model.sample(
            ids, 24, generator=torch.Generator().manual_seed(3), show_progress=False, use_cache=True, **kwargs
        )

    tokens = sample()
    assert torch.equal(tokens, sample())
    stop = int(tokens[0, 2])
    stopped = sample(stop_token=stop)
    for row, free in zip(stopped.tolist(), tokens.tolist(), strict=True):
        end = free.index(stop) if stop in free else len(free)
        assert row[: end + 1] == free[: min(end + 1, len(row))]
        assert set(row[end + 1 :]) <= {stop}
