"""Padding leaves no trace, and documents of one row are as if each were alone: outputs, states and gradients."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.one_device import OneDevice
from tests.support.sequence_modules import READERS
from tests.support.streams import disturbed, randn
from titans_pytorch import (
    MemoryAsContextTransformer,
    NeuralMemory,
    RaggedState,
    load_state,
    mem_state_detach,
    save_state,
)
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.ragged import Marks, read_marked, read_without_state

META = torch.device("meta")
EXACT = dict(rtol=1e-9, atol=1e-10)
QUICK = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODELS = [name for name in READERS if name.startswith(("Titans", "MemoryAsContextTransformer", "NeuralMemory"))]
LANGUAGE_MODELS = [name for name, reader in READERS.items() if reader.reads == "ids" and name in MODELS]

BUILT: dict[str, nn.Module] = {}


def model_of(name: str) -> nn.Module:
    """A module in float64, every parameter moved away from where it starts; built once."""
    if name not in BUILT:
        BUILT[name] = disturbed(READERS[name].made().double())
    return BUILT[name]


def tokens_of(name: str, batch: int, count: int, seed: int = 0) -> Tensor:
    tokens = READERS[name].given(batch, count, seed)
    return tokens.double() if tokens.is_floating_point() else tokens


def read(model: Any, x: Tensor, state: Any = None, **marks: Tensor) -> tuple[Tensor, Any]:
    """Outputs and the next state of any of the models."""
    if isinstance(model, MemoryAsContextTransformer):
        return model(x, cache=state, return_cache=True, **marks)
    return model(x, state=state, **marks)


def masks(batch: int, count: int) -> st.SearchStrategy[list[list[bool]]]:
    """Any pattern, with padding on the left, on the right and inside; at least one token is real."""
    sides = st.tuples(st.integers(0, count), st.integers(0, count)).map(
        lambda ends: [min(ends) <= i < max(ends) or min(ends) == max(ends) for i in range(count)]
    )
    rows = st.one_of(sides, st.lists(st.booleans(), min_size=count, max_size=count))
    return st.lists(rows, min_size=batch, max_size=batch).filter(lambda mask: any(map(any, mask)))


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    """Padding that would be noticed."""
    if x.is_floating_point():
        return torch.where(mask[..., None], x, torch.nan)
    return torch.where(mask, x, -7)


def check_padding(data: st.DataObject) -> None:
    name, counts = data.draw(st.sampled_from(MODELS)), data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    model, batch = model_of(name), data.draw(st.integers(1, 3))
    whole, state, parts, masked = tokens_of(name, batch, sum(counts)), None, [], []
    with torch.no_grad():
        for piece in whole.split(counts, dim=1):
            mask = torch.tensor(data.draw(masks(batch, piece.shape[1])))
            outputs, state = read(model, poisoned(piece, mask), state, attention_mask=mask)
            parts.append(outputs)
            masked.append(mask)
        outputs, mask = torch.cat(parts, dim=1), torch.cat(masked, dim=1)
        assert not outputs[~mask].any(), "outputs at padding are 0"
        more = tokens_of(name, batch, 5, seed=9)
        answers, _ = read(model, more, state)
        for row in range(batch):
            alone_state = None
            if mask[row].any():
                alone, alone_state = read(model, whole[row, mask[row]][None])
                assert_close(outputs[row, mask[row]][None], alone, **EXACT)
            assert_close(answers[row : row + 1], read(model, more[row : row + 1], alone_state)[0], **EXACT)


@settings(max_examples=25, **QUICK)
@given(data=st.data())
def test_a_padded_row_is_the_row_alone(data: st.DataObject) -> None:
    check_padding(data)


@pytest.mark.slow
@settings(max_examples=150, **QUICK)
@given(data=st.data())
def test_many_more_padded_rows(data: st.DataObject) -> None:
    check_padding(data)


# ---- documents


def split_up(ids: list[int]) -> list[tuple[int, int]]:
    """Stretches of equal numbers."""
    borders = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
    return list(pairwise(borders))


def check_documents(data: st.DataObject) -> None:
    name, counts = data.draw(st.sampled_from(MODELS)), data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    model, batch, count = model_of(name), data.draw(st.integers(1, 2)), sum(counts)
    borders = st.lists(st.booleans(), min_size=count, max_size=count)
    ids = torch.tensor(data.draw(st.lists(borders, min_size=batch, max_size=batch))).cumsum(dim=1)
    mask = torch.tensor(data.draw(st.one_of(masks(batch, count), st.just([[True] * count] * batch))))
    whole, state, parts = tokens_of(name, batch, count), None, []
    with torch.no_grad():
        for piece, part, numbers in zip(
            *(x.split(counts, dim=1) for x in (poisoned(whole, mask), mask, ids)), strict=True
        ):
            if not part.any():
                parts.append(torch.zeros(0))
                continue
            outputs, state = read(model, piece, state, attention_mask=part, document_ids=numbers)
            parts.append(outputs)
        if state is None:
            return
        like = next(part for part in parts if part.numel())
        shapes = zip(parts, counts, strict=True)
        outputs = torch.cat([p if p.numel() else like.new_zeros(batch, n, like.shape[2]) for p, n in shapes], dim=1)
        assert not outputs[~mask].any()
        more = tokens_of(name, batch, 5, seed=9)
        answers, _ = read(model, more, state)
        for row in range(batch):
            real, own = whole[row, mask[row]], outputs[row, mask[row]]
            last = None
            for start, stop in split_up(ids[row, mask[row]].tolist()) if len(real) else []:
                alone, last = read(model, real[None, start:stop])
                assert_close(own[None, start:stop], alone, **EXACT)
            assert_close(answers[row : row + 1], read(model, more[row : row + 1], last)[0], **EXACT)


@settings(max_examples=25, **QUICK)
@given(data=st.data())
def test_a_document_in_a_row_is_the_document_alone(data: st.DataObject) -> None:
    check_documents(data)


@pytest.mark.slow
@settings(max_examples=150, **QUICK)
@given(data=st.data())
def test_many_more_documents(data: st.DataObject) -> None:
    check_documents(data)


@pytest.mark.parametrize("name", ["TitansMAC, plain", "MemoryAsContextTransformer, everything", "TitansBackbone, mag"])
def test_borders_are_documents_of_a_single_row(name: str) -> None:
    model, x = model_of(name), tokens_of(name, 1, 12)
    ids = torch.tensor([[0] * 5 + [1] + [2] * 6])
    outputs, state = read(model, x, cu_seqlens=torch.tensor([0, 5, 6, 12], dtype=torch.int32))
    expected, after = read(model, x, document_ids=ids)
    assert torch.equal(outputs, expected)
    assert state.num_tokens == after.num_tokens == (6,)


# ---- losses and gradients


def gradients(model: nn.Module, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad] + list(inputs)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def loss_alone(model: CausalLM[Any], rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean over all labels that count, of sequences that are read one by one."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in rows:
        if len(ids) > 1 and (counted := int((labels[1:] != -100).sum())):
            total = total + model.loss(ids[None], labels=labels[None]) * counted
            count += counted
    return total / max(count, 1)


def check_loss(data: st.DataObject) -> None:
    name, count, batch = data.draw(st.sampled_from(LANGUAGE_MODELS)), data.draw(st.integers(2, 16)), 2
    model: Any = model_of(name)
    ids, mask = tokens_of(name, batch, count), torch.tensor(data.draw(masks(batch, count)))
    drawn = data.draw(st.lists(st.booleans(), min_size=batch * count, max_size=batch * count))
    labels = torch.where(torch.tensor(drawn).view(batch, count), ids, -100)
    marks, rows = dict(attention_mask=mask.long()), []
    borders = torch.zeros_like(ids)
    if data.draw(st.booleans()):
        borders = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).cumsum(0)
        borders = borders.expand(batch, -1)
        marks["document_ids"] = borders
    for row in range(batch):
        own = mask[row]
        for start, stop in split_up(borders[row, own].tolist()) if own.any() else []:
            rows.append((ids[row, own][start:stop], labels[row, own][start:stop]))
    loss, expected = model.loss(poisoned(ids, mask), labels=labels, **marks), loss_alone(model, rows)
    assert_close(loss, expected, **EXACT)
    if expected.requires_grad:
        assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-7, atol=1e-9)
    if mask.sum(dim=1).amax() > 1:
        again, _ = model.loss_and_state(poisoned(ids, mask), labels=labels, given=marks)
        assert_close(again, expected, **EXACT)


@settings(max_examples=8, **QUICK)
@given(data=st.data())
def test_a_loss_is_that_of_the_sequences_alone(data: st.DataObject) -> None:
    check_loss(data)


@pytest.mark.slow
@settings(max_examples=100, **QUICK)
@given(data=st.data())
def test_many_more_losses(data: st.DataObject) -> None:
    check_loss(data)


def test_labels_are_ids_unless_they_are_given() -> None:
    model: Any = model_of("TitansMAG, plain")
    ids = tokens_of("TitansMAG, plain", 2, 9)
    assert_close(model.loss(ids, labels=ids), model.loss(ids), **EXACT)
    assert_close(model.loss(ids, attention_mask=torch.ones_like(ids)), model.loss(ids), **EXACT)
    nothing = model.loss(ids, labels=torch.full_like(ids, -100))
    assert nothing == 0
    assert not any(each.any() for each in gradients(model, nothing))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_embeddings_instead_of_ids(name: str) -> None:
    model: Any = model_of(name)
    ids, mask = tokens_of(name, 2, 9), torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    embeds = model.token_emb(ids)
    assert_close(read_embeds(model, embeds), read(model, ids)[0], **EXACT)
    assert_close(read_embeds(model, embeds, attention_mask=mask), read(model, ids, attention_mask=mask)[0], **EXACT)
    loss = model.loss(embeds=embeds, labels=ids, attention_mask=mask)
    assert torch.equal(loss, model.loss(ids, attention_mask=mask))
    (slope,) = torch.autograd.grad(loss, embeds)
    assert not slope[~mask].any()
    assert slope[mask].any(dim=1).sum() == 12, "all but the last of each row"


def read_embeds(model: Any, embeds: Tensor, **marks: Tensor) -> Tensor:
    if isinstance(model, MemoryAsContextTransformer):
        return model(embeds=embeds, **marks)
    return model(embeds=embeds, **marks).outputs


# ---- what the memory takes beside


@pytest.mark.parametrize("has_views", [False, True])
def test_what_is_stored_instead_is_padded_alike(has_views: bool) -> None:
    torch.manual_seed(0)
    memory = disturbed(NeuralMemory(4, 2, batch_size=4, conv_size=3, qkv_receives_diff_views=has_views).double())
    seq, stored = randn(3, 2, 9, 4), randn(2, 2, 9, 4, seed=1)
    seq, stored = (seq, stored) if has_views else (seq[0], stored[0])
    mask = torch.tensor([[True] * 9, [False, True, True, False, True, False, True, True, False]])
    is_stored = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    outputs, state = memory(seq, stored, store_mask=is_stored, attention_mask=mask)
    row = mask[1]
    alone, after = memory(seq[..., 1:, row, :], stored[..., 1:, row, :], store_mask=is_stored[1:, row])
    assert_close(outputs[1:, row], alone, **EXACT)
    ended = state.select([1]).states[0]
    assert_close(dict(ended.current), dict(after.current), **EXACT)
    with pytest.raises(ValueError, match="return_surprises is of rows at one position, got it with padding"):
        memory(seq, attention_mask=mask, return_surprises=True)


@pytest.mark.parametrize("marks", [{}, dict(document_ids=torch.arange(9).expand(2, 9) // 2)])
def test_outputs_without_states(marks: dict[str, Tensor]) -> None:
    backbone: Any = model_of("TitansBackbone, mag")
    x, mask = tokens_of("TitansBackbone, mag", 2, 9), torch.arange(9) < torch.tensor([[9], [5]])
    outputs = backbone.outputs(x, attention_mask=mask, document_ids=marks.get("document_ids"))
    expected, _ = backbone(x, attention_mask=mask, document_ids=marks.get("document_ids"))
    assert_close(outputs, expected, **EXACT)
    nothing = backbone.outputs(
        x, attention_mask=torch.zeros(2, 9, dtype=torch.long), document_ids=marks.get("document_ids")
    )
    assert not nothing.any(), "a batch of padding says nothing, but it is read"


# ---- the state


def ragged_state(name: str, lengths: tuple[int, ...] = (7, 3, 7, 0)) -> tuple[Any, Tensor, RaggedState]:
    model, count = model_of(name), max(lengths)
    x = tokens_of(name, len(lengths), count)
    mask = torch.arange(count) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return model, x, read(model, x, attention_mask=mask)[1]


SOME = [
    "TitansMAC, plain",
    "TitansMAL, plain",
    "TitansLMM, plain",
    "TitansBackbone, mag",
    "MemoryAsContextTransformer, everything",
    "NeuralMemory, heads",
]


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_a_ragged_state_is_one_of_its_rows(name: str, tmp_path: Path) -> None:
    model, _, state = ragged_state(name)
    assert state.num_tokens == (7, 3, 7, 0)
    assert state.batch == 4
    assert state.rows == ((3,), (1,), (0, 2)), "one group for each length"
    more = tokens_of(name, 4, 5, seed=1)
    answers, after = read(model, more, state)
    assert after.num_tokens == (12, 8, 12, 5)
    chosen = torch.tensor([2, 1, 1, 3])
    assert_close(read(model, more[chosen], state.select(chosen))[0], answers[chosen], **EXACT)
    assert_close(read(model, more.repeat_interleave(2, 0), state.repeat(2))[0][::2], answers, **EXACT)
    again = RaggedState.join([state.select([0, 1]), state.select([2]), state.select([3])])
    assert again.rows == state.rows
    assert torch.equal(read(model, more, again)[0], answers)
    save_state(state, tmp_path / "state.safetensors")
    for same in (state.detach(), state.to("cpu"), load_state(tmp_path / "state.safetensors"), copy.deepcopy(state)):
        assert torch.equal(read(model, more, same)[0], answers)
    fresh = read(model, more)[0]
    begun = read(model, more, state.restart(torch.tensor([True, False, False, False])))[0]
    assert_close(begun, torch.where(torch.tensor([True, False, False, False])[:, None, None], fresh, answers), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_rows_that_meet_are_one_state_again(name: str) -> None:
    """And a batch without padding, whatever its mask says, is read by one call as ever."""
    model, x, state = ragged_state(name, (4, 7))
    mask = torch.tensor([[True] * 3, [False] * 3])
    _, state = read(model, x[:, :3], state, attention_mask=mask)
    assert not isinstance(state, RaggedState)
    _, plain = read(model, x)
    outputs, state = read(model, x, attention_mask=torch.ones(2, 7, dtype=torch.long))
    assert type(state) is type(plain)
    assert torch.equal(outputs, read(model, x)[0])


@torch.no_grad()
def test_states_of_the_model_join_at_any_positions() -> None:
    model: Any = model_of("TitansMAG, plain")
    ids = tokens_of("TitansMAG, plain", 2, 9)
    states = [model(ids[:, :5])[1], model(ids[:1, :7])[1]]
    joined = RaggedState.join(states)
    assert joined.num_tokens == (5, 5, 7)
    outputs, _ = model(ids[:1, :3].repeat(3, 1), joined)
    assert_close(outputs[:2], model(ids[:1, :3].repeat(2, 1), states[0])[0], **EXACT)
    assert_close(outputs[2:], model(ids[:1, :3], states[1])[0], **EXACT)
    memory = NeuralMemory(4)
    with pytest.raises(TypeError, match="states must be of one kind, got NeuralMemState beside TitansState"):
        RaggedState.join([states[0], memory(torch.randn(1, 3, 4))[1]])
    with pytest.raises(ValueError, match="states must be at least one state, got none"):
        RaggedState.join([])
    with pytest.raises(TypeError, match="states must be states of one model, got int"):
        RaggedState.join([3])


def test_a_memory_forgets_rows_of_a_ragged_state() -> None:
    memory: Any = model_of("NeuralMemory, heads")
    x = tokens_of("NeuralMemory, heads", 2, 9)
    _, state = memory(x, attention_mask=torch.arange(9) < torch.tensor([[9], [5]]))
    forgotten = memory.reset(state, torch.tensor([False, True]))
    assert forgotten.num_tokens == (9, 0)
    assert memory.reset(state).num_tokens == (0, 0)
    with pytest.raises(ValueError, match="rows must be 2 booleans, one for each sequence"):
        memory.reset(state, torch.tensor([True]))
    assert not any(w.requires_grad for w in mem_state_detach(state).states[0].current.values())


@torch.no_grad()
def test_a_document_goes_on_across_calls_and_another_begins() -> None:
    model: Any = model_of("TitansMAC, plain")
    ids = tokens_of("TitansMAC, plain", 1, 9)
    _, state = model(ids[:, :4], document_ids=torch.tensor([[1, 1, 2, 2]]))
    assert state.documents == (2,)
    goes_on, _ = model(ids[:, 4:], state, document_ids=torch.full((1, 5), 2))
    assert_close(goes_on, model(ids[:, 2:])[0][:, 2:], **EXACT)
    begins, _ = model(ids[:, 4:], state, document_ids=torch.full((1, 5), 3))
    assert_close(begins, model(ids[:, 4:])[0], **EXACT)
    unsaid, _ = model(ids[:, 4:], state)
    assert_close(unsaid, goes_on, **EXACT)


# ---- sampling


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["TitansMAC, plain", "TitansLMM, plain", "MemoryAsContextTransformer, everything"])
def test_padded_prompts_go_on_as_each_alone(name: str, use_cache: bool) -> None:
    model: Any = model_of(name)
    prompt, fixed = tokens_of(name, 3, 9), dict(temperature=0.0, show_progress=False, use_cache=use_cache)
    mask = torch.tensor([[False] * 6 + [True] * 3, [True] * 5 + [False] * 4, [True, False] * 4 + [True]])
    tokens = model.sample(poisoned(prompt, mask), 14, attention_mask=mask, **fixed)
    for row in range(3):
        own = prompt[row, mask[row]][None]
        assert torch.equal(tokens[row : row + 1], model.sample(own, own.shape[1] + 5, **fixed))
    with pytest.raises(ValueError, match="must have a real token in every row of the prompt, got a row of padding"):
        model.sample(prompt, 14, attention_mask=torch.zeros(3, 9, dtype=torch.long), **fixed)


# ---- without waiting for the host


@pytest.mark.parametrize("name", ["TitansMAG, plain", "TitansMAC, plain", "MemoryAsContextTransformer, plain"])
def test_a_loss_with_padding_never_looks_at_values(name: str) -> None:
    with torch.device(META):
        model: Any = READERS[name].made()
        ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)
    with OneDevice(META):
        loss = model.loss(ids, attention_mask=mask)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_loss_with_padding_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model: Any = model_of("TitansMAG, plain")
    ids, mask = tokens_of("TitansMAG, plain", 2, 9), torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, attention_mask=mask), model.loss(ids, attention_mask=mask), rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()


@pytest.mark.parametrize("num_lengths", [1, 3])
def test_every_token_is_read_once(num_lengths: int) -> None:
    """In as many calls as there are lengths, and all documents of about one length together."""
    calls: list[tuple[int, int]] = []

    def noted(piece: Tensor, state: Any) -> tuple[Tensor, Any]:
        calls.append((piece.shape[0], piece.shape[1]))
        return backbone.read(piece, state)

    backbone: Any = model_of("TitansBackbone, lmm")
    lengths = torch.tensor([4, 9, 6, 9][:num_lengths] if num_lengths > 1 else [9, 9, 9])
    mask = torch.arange(9) >= 9 - lengths[:, None]
    x = tokens_of("TitansBackbone, lmm", len(mask), 9)
    read_marked(noted, x, Marks(mask, None), None)
    assert sum(rows * count for rows, count in calls) == mask.sum()
    assert len(calls) == num_lengths
    calls.clear()
    read_without_state(noted, x, Marks(mask, None), None)
    assert len(calls) == 1
    calls.clear()
    read_without_state(noted, x[:1], Marks(None, torch.tensor([[0, 1, 2, 3, 4, 4, 5, 5, 5]])), None)
    assert sorted(calls) == [(2, 3), (4, 1)], "two and three tokens are of about one length"


def test_processes_that_share_parameters_make_equally_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def noted(piece: Tensor, state: Any) -> tuple[Tensor, Any]:
        calls.append(piece.shape[0])
        return backbone.read(piece, state)

    backbone: Any = model_of("TitansBackbone, lmm")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x = tokens_of("TitansBackbone, lmm", 1, 9)
    documents = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 5, 5]])
    outputs = read_without_state(noted, x, Marks(None, documents), None)
    assert calls == [6]
    monkeypatch.undo()
    assert_close(outputs, backbone(x, document_ids=documents)[0], **EXACT)
