"""The state: small however long the stream, complete, and free of ties to what made it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.oracle import oracle
from tests.support.streams import randn
from titans_pytorch import MemoryAttention, NeuralMemory, NeuralMemState, mem_state_detach

EXACT = dict(rtol=1e-9, atol=1e-10)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": dict(chunk_size=4),
    "heads and batches": dict(dim_head=3, heads=2, chunk_size=4, batch_size=8, momentum_order=2),
    "no momentum": dict(chunk_size=3, momentum=False),
    "gated": dict(chunk_size=4, batch_size=4, gated_transition=True),
    "views": dict(chunk_size=4, qkv_receives_diff_views=True),
    "read apart": dict(chunk_size=(3, 2)),
    "mixes tokens": dict(chunk_size=4, model=MemoryAttention(6)),
    "spectral": dict(chunk_size=4, batch_size=8, spectral_norm_surprises=True),
    "convolution": dict(chunk_size=4, conv_size=4),
    "window": dict(chunk_size=2, batch_size=4, window=4, key_powers=2, per_parameter_lr_modulation=True),
    "options of the paper": dict(
        chunk_size=4,
        batch_size=8,
        conv_size=3,
        qk_l2norm=True,
        summed_loss=True,
        default_step_transform_max_lr=0.1,
        per_parameter_gates=True,
        channelwise_decay=True,
        learned_norm_gain=True,
        gated_output=True,
    ),
}


def memory(name: str = "plain", **options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    built = NeuralMemory(**{"dim": 6, **CONFIGURATIONS[name]} | options).double()
    if built.transition_gate is not None:
        nn.init.constant_(built.transition_gate, 0.5)
    return built


def tokens(built: NeuralMemory, batch: int, length: int, seed: int = 0) -> Tensor:
    views = () if built.num_views is None else (3,)
    return randn(*views, batch, length, built.dim, seed=seed)


def tensors(state: NeuralMemState) -> Iterator[Tensor]:
    """Everything that a state carries on."""
    yield state.cache_store_segment
    for weights in (state.weights, *state.states, state.group.weights or {}):
        yield from weights.values()
    others = (state.cache_store_mask, state.group.queries, *state.tails, *(state.recent or ()))
    yield from (t for t in others if t is not None)


def size(state: NeuralMemState) -> tuple[int, int]:
    """Bytes pickled, and bytes of all storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(state)}
    return len(pickle.dumps(state)), sum(storages.values())


# size


@pytest.mark.parametrize("name", ["plain", "heads and batches", "mixes tokens", "options of the paper"])
def test_a_state_is_as_small_after_100_000_tokens_as_after_100(name: str) -> None:
    built = memory(name, **({"batch_size": 256} if "batch_size" in CONFIGURATIONS[name] else {})).float()
    state, sizes = None, []
    with torch.no_grad():
        for length in (101, 9_000, 40_001, 50_899):
            _, state = built(tokens(built, 1, length).float(), state=state)
            sizes.append(size(state))
    assert state.num_seen == 100_001
    waiting = 4 * built.dim * 4 * 2  # at most one chunk of tokens and queries more or less
    for pickled, stored in sizes[1:]:
        assert abs(pickled - sizes[0][0]) < 400 + waiting
        assert abs(stored - sizes[0][1]) <= waiting


def test_waiting_tokens_do_not_hold_on_to_the_whole_input() -> None:
    built, seq = memory(), tokens(memory(), 2, 1001)
    state = built(seq)[1].detach()
    assert state.cache_store_segment.untyped_storage().nbytes() == 2 * 1 * 6 * 8
    state = built(seq[:, :2], state=state)[1]
    assert state.cache_store_segment.shape == (2, 3, 6)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_state_shares_no_storage_with_parameters_or_inputs(name: str) -> None:
    """So that an optimizer step or a reused buffer does not reach into a memory's past."""
    built = memory(name)
    others = {p.untyped_storage().data_ptr() for p in built.parameters()}
    for length in (1, 2, 9):
        seq = tokens(built, 2, length)
        with torch.no_grad():
            _, state = built(seq)
        for t in tensors(state):
            assert t.numel() == 0 or t.untyped_storage().data_ptr() not in others | {seq.untyped_storage().data_ptr()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_call_leaves_the_state_it_was_given_as_it_was(name: str) -> None:
    built = memory(name)
    _, state = built(tokens(built, 2, 7))
    before = [t.clone() for t in tensors(state)]
    first, _ = built(tokens(built, 2, 9, seed=1), state=state)
    assert all(map(torch.equal, before, tensors(state)))
    assert torch.equal(first, built(tokens(built, 2, 9, seed=1), state=state)[0])


# copies


def through_pickle(state: NeuralMemState) -> NeuralMemState:
    return pickle.loads(pickle.dumps(state))


def through_file(state: NeuralMemState) -> NeuralMemState:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[NeuralMemState], NeuralMemState]] = {
    "pickle": through_pickle,
    "torch.save": through_file,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "detach": NeuralMemState.detach,
    "to": lambda state: state.to("cpu"),
    "to and back": lambda state: state.to(torch.float64, non_blocking=True),
    "select all": lambda state: state.select(slice(None)),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_copy_goes_on_as_the_original(name: str, how: str, grad: bool) -> None:
    built = memory(name)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, [3, 9]] = False
    with torch.set_grad_enabled(grad):
        _, state = built(tokens(built, 2, 10), store_mask=mask)
        state = state.detach() if how == "deepcopy" else state  # torch copies no tensor that has a graph
        copied = COPIES[how](state)
        more = tokens(built, 2, 11, seed=1)
        expected, got = built(more, state=state), built(more, state=copied)
    assert torch.equal(got[0], expected[0])
    assert got[1].seq_index == expected[1].seq_index
    assert all(map(torch.equal, tensors(got[1]), tensors(expected[1])))


def test_a_detached_state_has_no_graph_at_all() -> None:
    _, state = memory()(tokens(memory(), 2, 7).requires_grad_())
    assert any(t.requires_grad for t in tensors(state))
    assert not any(t.requires_grad for t in tensors(state.detach()))
    assert not any(t.requires_grad for t in state.detach().updates.values())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_beams(name: str) -> None:
    """Selecting and repeating rows of a state = having run those rows."""
    built = memory(name)
    seq, more = tokens(built, 3, 7), tokens(built, 4, 9, seed=1)
    _, state = built(seq)
    for rows in ([2, 0, 0, 1], torch.tensor([2, 0, 0, 1])):
        _, direct = built(seq[..., rows, :, :])
        expected, _ = built(more, state=direct)
        assert_close(built(more, state=state.select(rows))[0], expected, **EXACT)
    one, _ = built(more[..., :1, :, :], state=state.select(slice(1, 2)))
    _, direct = built(seq[..., 1:2, :, :])
    assert_close(one, built(more[..., :1, :, :], state=direct)[0], **EXACT)
    repeated = state.select([0, 2]).repeat(2)
    assert repeated.batch == 4
    _, direct = built(seq[..., [0, 0, 2, 2], :, :])
    assert_close(built(more, state=repeated)[0], built(more, state=direct)[0], **EXACT)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("has_mask", [False, True])
def test_joined_states_are_the_batch_they_were_selected_from(name: str, has_mask: bool) -> None:
    built = memory(name)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[2, 5] = False
    _, whole = built(tokens(built, 3, 7), store_mask=mask if has_mask else None)
    more = tokens(built, 3, 9, seed=1)
    joined = NeuralMemState.join([whole.select([0, 1]), whole.select([2])])
    assert all(map(torch.equal, tensors(joined), tensors(whole)))
    assert joined.batch == 3
    expected, got = built(more, state=whole), built(more, state=joined)
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, tensors(got[1]), tensors(expected[1])))


def test_a_state_without_a_mask_stores_all_that_waits_beside_one_with() -> None:
    built, seq, more = memory(), tokens(memory(), 2, 7), tokens(memory(), 2, 9, seed=1)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    _, whole = built(seq, store_mask=mask)
    apart = [built(seq[:1])[1], built(seq[1:], store_mask=mask[1:])[1]]
    assert_close(built(more, state=NeuralMemState.join(apart))[0], built(more, state=whole)[0], **EXACT)


def test_only_states_of_one_memory_at_one_position_are_joined() -> None:
    built = memory()
    states = [built(tokens(built, 1, length))[1] for length in (4, 7)]
    with pytest.raises(ValueError, match="states must have seen equally many tokens, got 4 and 7"):
        NeuralMemState.join(states)
    other = memory("plain", momentum=False)
    with pytest.raises(
        ValueError,
        match=r"states must be of one module and cut alike, got the names \['model.weights.0'.* beside the names \[\]",
    ):
        NeuralMemState.join([states[1], other(tokens(other, 1, 7))[1]])
    other = memory("plain", dim=4)
    with pytest.raises(ValueError, match=r"must be of one module and cut alike, got a tensor \(1, 6\) beside a tensor"):
        NeuralMemState.join([states[1], other(tokens(other, 1, 7))[1]])
    with pytest.raises(ValueError, match="states must be at least one NeuralMemState, got none"):
        NeuralMemState.join([])
    with pytest.raises(TypeError, match="states must be of the kind NeuralMemState, got int"):
        NeuralMemState.join([states[0], 3])  # type: ignore[list-item]


def test_the_words_of_a_state_are_its_published_fields() -> None:
    _, state = memory()(tokens(memory(), 2, 7))
    assert state.base is state.weights
    assert (state.current, state.momenta) == state.states
    assert state.waiting is state.cache_store_segment


def test_at_rest_keeps_nothing_of_the_call_alive_and_goes_on_bitwise() -> None:
    built = memory("mixes tokens")
    _, state = built(tokens(built, 2, 7))
    rested, more = state.at_rest(), tokens(built, 2, 9, seed=1)
    assert (rested.updates.num_chunks, state.updates.num_chunks) == (0, 1)
    assert torch.equal(built(more, state=rested)[0], built(more, state=state)[0])


@pytest.mark.parametrize("length", [4, 7, 8])
@pytest.mark.parametrize("name", ["plain", "heads and batches", "no momentum", "views", "gated", "spectral"])
def test_reset_rows_remember_nothing(name: str, length: int) -> None:
    """Rows that are reset go on as if what came before had not been stored; the others do not notice."""
    built = memory(name)
    seq, more = tokens(built, 2, length), tokens(built, 2, 13, seed=1)
    _, state = built(seq)
    _, blank = built(seq, store_mask=torch.zeros(2, length, dtype=torch.bool))
    expected, untouched = built(more, state=blank)[0][0], built(more, state=state)[0][1]
    got, _ = built(more, state=built.reset(state, torch.tensor([True, False])))
    assert_close(got[0], expected, **EXACT)
    assert_close(got[1], untouched, **EXACT)
    everything, _ = built(more, state=built.reset(state))
    assert_close(everything[0], expected, **EXACT)


def test_a_reset_at_the_border_of_a_batch_is_a_fresh_start() -> None:
    built = memory("heads and batches")
    _, state = built(tokens(built, 2, 16))
    more = tokens(built, 2, 12, seed=1)
    got, last = built(more, state=built.reset(state))
    # position 16 still belongs to the group that has been read, so only what follows it is aligned: all of it
    fresh, expected = built(more)
    assert_close(got, fresh, **EXACT)
    assert_close(last.states, expected.states, **EXACT)


# updates


@pytest.mark.parametrize("engine", ["factored", "dense", "general"])
@pytest.mark.parametrize("name", ["plain", "heads and batches", "gated", "options of the paper"])
def test_updates_are_the_weights_before_every_chunk_and_after_the_last(name: str, engine: str) -> None:
    built = memory(name, engine=engine)
    seq = tokens(built, 2, 15)
    options = {"dim": 6, **CONFIGURATIONS[name]}
    with torch.no_grad():
        expected = oracle(built.state_dict(), built.memory_model, seq, **options, max_weight_growth=10.0).updates
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, state = built(seq)
        assert list(state.updates) == list(expected)
        assert_close({key: w.detach() for key, w in state.updates.items()}, expected, **EXACT)
        assert all(torch.equal(state.updates[key][:, -1], w) for key, w in state.states[0].items())


def test_updates_of_a_piece_begin_with_the_weights_it_was_given() -> None:
    built = memory("gated")
    _, state = built(tokens(built, 2, 6))
    _, later = built(tokens(built, 2, 11, seed=1), state=state)
    for key, w in later.updates.items():
        assert w.shape[1] == 1 + 3
        assert_close(w[:, 0], state.states[0][key], **EXACT)
    _, waiting = built(tokens(built, 2, 1), state=later)
    assert all(w.shape[1] == 1 for w in waiting.updates.values())


def test_updates_are_differentiable() -> None:
    built, seq = memory(), tokens(memory(), 1, 8).requires_grad_()
    _, state = built(seq)
    state.updates["model.weights.0"][:, 1].sum().backward()
    assert seq.grad[:, :4].abs().sum() > 0
    assert not seq.grad[:, 4:].any()


def test_nobody_builds_weights_unless_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_pytorch.fast_weights.blocks.factored import SummedBlock

    built, seen = memory(mem_model_norm_add_residual=False), []
    materialise = SummedBlock.materialise
    monkeypatch.setattr(SummedBlock, "materialise", lambda self, name: seen.append(name) or materialise(self, name))
    _, state = built(tokens(built, 1, 40))
    retrieved, state = built(tokens(built, 1, 3), state=state.detach())
    retrieved.sum().backward()
    assert not seen
    _, state = built(tokens(built, 1, 40))
    assert state.updates["weights.1"].shape == (1, 11, 24, 6)
    assert set(seen) == {"weights.1"}


def test_a_long_call_keeps_its_updates_without_keeping_its_weights() -> None:
    """Under no_grad they are had by storing once more, and equal those of short calls."""
    torch.manual_seed(0)
    built = NeuralMemory(4, 2, default_model_kwargs=dict(depth=1)).double()
    with torch.no_grad():
        seq = randn(1, 9000, 4)
        _, state = built(seq)
        weights = state.updates["model.weights.0"]
        assert weights.shape == (1, 4501, 4, 4)
        _, short = built(seq[:, :100])
    assert_close(weights[:, :51], short.updates["model.weights.0"], **EXACT)


def test_a_state_reads_as_what_it_is() -> None:
    _, state = memory()(tokens(memory(), 2, 7))
    assert state._fields[:5] == ("seq_index", "weights", "cache_store_segment", "states", "updates")
    assert (state.seq_index, state.num_seen, state.batch) == (4, 7, 2)
    assert "model.weights.0" in repr(state.updates)
    assert len(state.updates) == 3
    assert dict(state.updates).keys() == state.weights.keys()


@pytest.mark.parametrize("num_seen", [3, 9])
def test_a_state_from_inference_mode_goes_on_outside_of_it(num_seen: int) -> None:
    memory, seq = NeuralMemory(8, 4, batch_size=8), torch.randn(2, 20, 8)
    expected, _ = memory(seq)
    with torch.inference_mode():
        _, state = memory(seq[:, :num_seen])
    with torch.no_grad():
        assert_close(memory(seq[:, num_seen:], state=state)[0], expected[:, num_seen:])
        memory.retrieve_memories(seq, state.states[0])
    retrieved, _ = memory(seq[:, num_seen:], state=state)
    assert_close(retrieved, expected[:, num_seen:])
    (retrieved + memory.retrieve_memories(seq, state.states[0])[:, num_seen:]).sum().backward()


def test_only_states_can_be_detached() -> None:
    with pytest.raises(TypeError, match="state must be a NeuralMemState, got NoneType"):
        mem_state_detach(None)
