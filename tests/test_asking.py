"""`NeuralMemory.ask` reads one memory whatever is stored since, and goes on in pieces of any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.support.streams import disturbed, pieces, randn
from titans_pytorch import MemoryAttention, NeuralMemory

EXACT = dict(rtol=1e-12, atol=1e-12)
MEMORIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "convolution": dict(conv_size=4),
    "heads": dict(heads=2, dim_head=4, qk_rmsnorm=True, post_rmsnorm=True),
    "mixing tokens": dict(model=MemoryAttention(8)),
    "mixing tokens, convolution": dict(model=MemoryAttention(8), conv_size=3),
    "read apart": dict(chunk_size=(3, 2)),
    "general": dict(engine="general"),
}


def built(name: str) -> tuple[NeuralMemory, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    memory = disturbed(NeuralMemory(8, **{"chunk_size": 4} | MEMORIES[name]).double())
    _, state = memory(randn(2, 14, 8, seed=1))
    return memory, state.current


@pytest.mark.parametrize("lengths", [[13], [1] * 13, [2, 3, 5, 3], [4, 4, 4, 1]], ids=str)
@pytest.mark.parametrize("name", MEMORIES)
def test_pieces_of_any_length_are_one_call(name: str, lengths: list[int]) -> None:
    memory, weights = built(name)
    queries = randn(2, 13, 8, seed=2)
    expected = memory.retrieve_memories(queries, weights)
    tail, reads = None, []
    for piece in pieces(lengths):
        read, tail = memory.ask(queries[:, piece], weights, tail)
        reads.append(read)
    assert_close(torch.cat(reads, dim=1), expected, **EXACT)


def test_what_is_asked_does_not_depend_on_what_is_stored_later() -> None:
    memory, weights = built("plain")
    queries = randn(2, 5, 8, seed=2)
    before = memory.ask(queries, weights)[0]
    memory(randn(2, 30, 8, seed=3))
    assert torch.equal(memory.ask(queries, weights)[0], before)


def test_asking_teaches_weights_queries_and_what_was_stored() -> None:
    memory = NeuralMemory(8, 4, conv_size=2).double()
    seq, queries = randn(1, 8, 8).requires_grad_(), randn(1, 6, 8, seed=1).requires_grad_()
    _, state = memory(seq)
    reads, _ = memory.ask(queries, state.current)
    for gradient in torch.autograd.grad(reads.square().sum(), [seq, queries, memory.to_queries.linear.weight]):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "tokens, weights, words",
    [
        ((2, 3, 7), 2, "seq must have 8 features"),
        ((3, 3, 8), 2, r"weights\['norm.gamma'\] must have the shape \(3, 8\), got \(2, 8\)"),
    ],
)
def test_what_cannot_be_asked_is_refused(tokens: tuple[int, ...], weights: int, words: str) -> None:
    memory = NeuralMemory(8, 4)
    with pytest.raises(ValueError, match=words):
        memory.ask(torch.zeros(tokens), memory.init_weights(weights))
