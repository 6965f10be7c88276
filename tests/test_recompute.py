"""Training that keeps only what is carried gives the gradients of training that keeps everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.operations import held_bytes
from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.fast_weights.noted import Notes, current_notes, taking
from titans_pytorch.fast_weights.rules import orthogonal
from titans_pytorch.fast_weights.rules.orthogonal import orthogonalised
from titans_pytorch.memory import streaming
from titans_pytorch.memory.costs import COSTS, Costs

OPTIONS: list[dict[str, Any]] = [
    {},
    {"spectral_norm_surprises": True},
    {"batch_size": 8},
    {"accept_weight_residual": True},
]


def gradients(memory: NeuralMemory, previous: NeuralMemory, seq: Tensor) -> list[Tensor]:
    """Of what is read, of the last weights and of weights on the way."""
    call = {"prev_weights": previous(seq)[1]} if memory.to_learned_weight_residual_mix is not None else {}
    retrieved, state = memory(seq, **call)
    total = retrieved.square().sum() + sum(w.sum() for w in state.states[0].values())
    total = total + sum(weights[:, 2].square().sum() for weights in state.updates.values())
    wanted = [seq, *memory.parameters(), *(previous.parameters() if call else ())]
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def small_memories(**options: Any) -> tuple[NeuralMemory, NeuralMemory, Tensor]:
    """A memory, one before it, and tokens."""
    torch.manual_seed(0)
    shape = dict(dim=8, chunk_size=4, default_step_transform_max_lr=0.1)
    memory, previous = NeuralMemory(**shape, **options).double(), NeuralMemory(**shape).double()
    return memory, previous, torch.randn(2, 50, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("block_elements", [0, 2**26], ids=["blocks made again", "blocks kept"])
@pytest.mark.parametrize("options", OPTIONS)
def test_recomputing_spans_changes_no_gradient(
    options: dict[str, Any], block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, previous, seq = small_memories(**options)
    kept = gradients(memory, previous, seq)
    used = []
    original = streaming.recomputed
    monkeypatch.setattr(streaming, "recomputed", lambda *args, **kwargs: used.append(1) or original(*args, **kwargs))
    costs = Costs(kept_elements=1, block_elements=block_elements, span_tokens=16)
    monkeypatch.setitem(COSTS, "cpu", costs)
    assert_close(gradients(memory, previous, seq), kept, rtol=1e-9, atol=1e-9)
    assert used


@pytest.mark.parametrize("noted_elements, known", [(0, "none"), (2000, "some"), (2**25, "all")])
def test_factors_of_spectral_steps_are_made_once_as_far_as_there_is_room_for_them(
    noted_elements: int, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, previous, seq = small_memories(spectral_norm_surprises=True)
    kept = gradients(memory, previous, seq)
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=1, span_tokens=16, noted_elements=noted_elements))
    taken: list[int] = []
    take = Notes.taken

    def watched(self: Notes, num: int) -> list[Tensor]:
        found = take(self, num)
        taken.append(len(found))
        return found

    monkeypatch.setattr(Notes, "taken", watched)
    assert_close(gradients(memory, previous, seq), kept, rtol=1e-9, atol=1e-9)
    assert taken
    assert {"none": not any(taken), "some": any(taken) and not all(taken), "all": all(taken)}[known]


def test_a_factor_of_other_steps_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, previous, seq = small_memories(spectral_norm_surprises=True)
    kept = gradients(memory, previous, seq)
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=1, span_tokens=16))
    take = Notes.taken
    monkeypatch.setattr(Notes, "taken", lambda self, num: [factor.roll(1, dims=0) for factor in take(self, num)])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(gradients(memory, previous, seq), kept, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noted_elements", [600, 1300, 4000])
@pytest.mark.parametrize(
    "options, num_tokens",
    [({"batch_size": 32}, 48), ({"batch_size": 32}, 36), ({"model": MemoryMLP(8, depth=3, expansion_factor=2.0)}, 50)],
    ids=["a shorter last block", "a much shorter one", "matrices of several sizes"],
)
def test_room_for_notes_may_end_anywhere(
    options: dict[str, Any], num_tokens: int, noted_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside of a call whose parts are more than those of the next."""
    monkeypatch.setattr(orthogonal, "CACHED_BYTES", 4 * 8 * 8 * 8)
    memory, previous, seq = small_memories(spectral_norm_surprises=True, **options)
    seq = seq[:, :num_tokens].detach().requires_grad_()
    kept = gradients(memory, previous, seq)
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=1, noted_elements=noted_elements))
    assert_close(gradients(memory, previous, seq), kept, rtol=1e-9, atol=1e-9)


def test_notes_come_back_in_the_order_in_which_they_were_made() -> None:
    first = Notes(room=5)
    made = [first.noted(lambda size=size: torch.full((size,), float(size))) for size in (3, 1, 2, 1)]
    assert [note.numel() for note in first.made] == [3, 1], "what comes after one that has no room is not noted either"
    second = Notes(known=first.made)
    assert second.taken(1)[0] is made[0]
    assert second.noted(lambda: torch.zeros(1)) is made[1]
    assert second.taken(1) == []
    assert second.made == []
    third = Notes(known=first.made)
    assert third.taken(3) == []
    assert third.taken(1) == [], "what is left belongs to the call before"
    with taking(second):
        assert current_notes() is second
    assert current_notes().taken(1) == [], "outside of such a run nothing is known"
    assert current_notes().room == 0


def test_a_spectral_step_keeps_little_and_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    steps = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthogonalised, steps)
    assert torch.autograd.gradgradcheck(orthogonalised, steps)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5, 4), (3, 4, 4)])
@pytest.mark.parametrize("cached_bytes", [1, 1 << 20])
def test_the_gradient_of_a_spectral_step_is_that_of_its_iterations(
    shape: tuple[int, ...], cached_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that is zero, and of one that is so small that its norm is not divided by."""
    monkeypatch.setattr(orthogonal, "CACHED_BYTES", cached_bytes)
    torch.manual_seed(0)
    steps, later = torch.randn(2, 2, *shape, dtype=torch.float64)
    steps[0, 1], steps[1, 1] = 0.0, 1e-10 * steps[1, 1]
    steps.requires_grad_()
    plain = orthogonal.iterated(steps.flatten(0, 1)).view_as(steps)
    (expected,) = torch.autograd.grad(plain, steps, later)
    out = orthogonalised(steps)
    assert_close(out, plain)
    assert_close(torch.autograd.grad(out, steps, later)[0], expected)
    with torch.no_grad():
        assert torch.equal(orthogonalised(steps), out)


def test_a_compiled_spectral_step_is_the_same_step() -> None:
    """Bit by bit, as its gradient is the one that is written out: what the iterations lose in float32 they magnify."""
    torch.manual_seed(0)
    compiled = torch.compile(orthogonalised, fullgraph=True, backend="aot_eager")
    for shape in ((3, 4, 6), (3, 6, 4)):
        steps, later = torch.randn(shape, requires_grad=True), torch.randn(shape)
        expected, out = orthogonalised(steps), compiled(steps)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out, steps, later)[0], torch.autograd.grad(expected, steps, later)[0])
        with torch.no_grad():
            assert torch.equal(compiled(steps), orthogonalised(steps))


@pytest.mark.slow
def test_a_memory_with_spectral_steps_holds_no_more_than_before_its_factors_were_noted() -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(384, 4, batch_size=128, dim_head=64, heads=4, spectral_norm_surprises=True)
    seq = torch.randn(4, 512, 384)
    with torch.no_grad():
        assert held_bytes(lambda: memory(seq)) <= 68e6, "88.9e6 at 564baa4"
    assert held_bytes(lambda: memory(seq)[0].square().mean().backward()) <= 251e6, "277.0e6 at 564baa4"
