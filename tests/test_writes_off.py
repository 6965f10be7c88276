"""With writes off a memory is what it was at its start, in every model; afterwards all is as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_pytorch import MemoryAsContextTransformer, MemoryAttention, NeuralMemory, TitansConfig, writes_off
from titans_pytorch.titans import TitansLMM, TitansMAC, TitansMAG, TitansMAL

FAMILY = (TitansMAC, TitansMAG, TitansMAL, TitansLMM)
MEMORIES: dict[str, Callable[[], NeuralMemory]] = {
    "plain": lambda: NeuralMemory(8, 4),
    "renewed": lambda: NeuralMemory(8, 4, batch_size=8, heads=2, dim_head=4, conv_size=3, qk_l2norm=True),
    "paper": lambda: NeuralMemory.paper(8, heads=2, chunk_size=4),
    "two chunk sizes": lambda: NeuralMemory(8, (2, 4)),
    "a model that mixes tokens": lambda: NeuralMemory(8, 4, model=MemoryAttention(8)),
    "a window": lambda: NeuralMemory(8, 4, batch_size=8, window=3, conv_size=3),
    "orders of momentum": lambda: NeuralMemory(8, 4, momentum_order=2),
}


def config(**more: Any) -> TitansConfig:
    return TitansConfig(dim=16, depth=2, window=8, heads=2, memory_chunk=4, memory_refresh=8, **more)


def transformer(**more: Any) -> MemoryAsContextTransformer:
    kwargs = dict(num_tokens=32, dim=16, depth=2, segment_len=8, heads=2, dim_head=8, num_longterm_mem_tokens=1)
    memory = dict(
        neural_memory_segment_len=4, neural_memory_batch_size=8, neural_memory_kwargs=dict(dim_head=8, heads=2)
    )
    return MemoryAsContextTransformer(**kwargs | memory | more)  # type: ignore[arg-type]


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> NeuralMemory:
    torch.manual_seed(0)
    return MEMORIES[request.param]().double()


def logits_of(model: Any, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    logits, state = model.logits_and_state(ids, state)
    return logits, state


def test_what_is_read_is_what_the_start_says(memory: NeuralMemory) -> None:
    seq = torch.randn(2, 37, 8, dtype=torch.float64)
    with writes_off(memory):
        read, state, (loss, rates) = memory(seq, return_surprises=True)
    assert_close(read, memory.ask(seq, memory.init_weights(2))[0], rtol=0, atol=0)
    assert not torch.equal(read, memory(seq)[0])
    assert_close((state.base, state.current, state.momenta), (*[memory.init_weights(2)] * 2, memory.init_momentum(2)))
    assert loss.shape == rates.shape == (2, memory.heads, 0)
    assert state.num_seen == 37


def test_pieces_are_the_whole_and_a_state_on_the_way_stays_what_it_was(memory: NeuralMemory) -> None:
    seq = torch.randn(2, 40, 8, dtype=torch.float64)
    _, begun = memory(seq[:, :16])
    with writes_off(memory):
        whole, after = memory(seq[:, 16:], state=begun)
        pieces, state = [], begun
        for piece in seq[:, 16:].split([1, 6, 3, 14], dim=1):
            read, state = memory(piece, state=state)
            pieces.append(read)
    assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)
    for each in (after, state):
        assert each.num_seen == 40
        assert_close(
            (each.base, each.current, each.momenta), (begun.base, begun.current, begun.momenta), rtol=0, atol=0
        )
    name = next(iter(begun.current))
    assert_close(after.updates[name], begun.current[name].unsqueeze(1).expand_as(after.updates[name]), rtol=0, atol=0)
    assert after.updates[name].shape[1] == 24 // 4 + 1


def test_afterwards_it_stores_as_ever_even_after_a_failure(memory: NeuralMemory) -> None:
    seq = torch.randn(1, 20, 8, dtype=torch.float64)
    expected, _ = memory(seq)
    with pytest.raises(RuntimeError, match="inside"), writes_off(memory):
        raise RuntimeError("inside")
    with writes_off(memory):
        with writes_off(memory):
            pass
        frozen, _ = memory(seq)
        assert not torch.equal(frozen, expected)
    assert_close(memory(seq)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("layers", [None, (2,)])
def test_the_family_is_then_a_family_that_takes_no_steps(kind: Any, layers: tuple[int, ...] | None) -> None:
    """The oracle is a model of the same weights whose steps are nothing and whose memory never forgets."""
    torch.manual_seed(0)
    model = kind(32, config(memory_layers=layers)).double()
    still = kind(32, config(memory_layers=layers, max_step=1e-30, decay=False)).double()
    own = {name: value for name, value in model.state_dict().items() if "to_decay_factor" not in name}
    still.load_state_dict(own, strict=False)
    ids = torch.randint(0, 32, (2, 50))
    expected, _ = logits_of(still, ids)
    on, _ = logits_of(model, ids)
    with writes_off(model) as count:
        off, _ = logits_of(model, ids)
        pieces, state = [], None
        for piece in ids.split(7, dim=1):
            logits, state = logits_of(model, piece, state)
            pieces.append(logits)
    assert count == (2 if layers is None else 1)
    assert_close(off, expected, rtol=1e-9, atol=1e-9)
    assert_close(torch.cat(pieces, dim=1), off, rtol=1e-9, atol=1e-9)
    assert (on - off).abs().max() > 1e-4
    assert_close(logits_of(model, ids)[0], on, rtol=0, atol=0)


@pytest.mark.parametrize(
    "more", [{}, dict(neural_mem_weight_residual=True), dict(neural_memory_qkv_receives_diff_views=True)]
)
def test_the_transformer_too(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = transformer(**more).double()
    ids = torch.randint(0, 32, (2, 50))
    on, _ = logits_of(model, ids)
    starts = [layer.memory.init_weights(2) for layer in model.layers]
    with writes_off(model):
        off, cache = logits_of(model, ids)
        pieces, state = [], None
        for piece in ids.split(9, dim=1):
            logits, state = logits_of(model, piece, state)
            pieces.append(logits)
    assert_close([memory.current for memory in cache.memories], starts, rtol=0, atol=0)
    assert_close(torch.cat(pieces, dim=1), off, rtol=1e-9, atol=1e-9)
    assert (on - off).abs().max() > 1e-6
    one, layer = logits_of(model, ids)[0], model.layers[1]
    with writes_off(layer):  # one memory alone, beside others that store
        assert not torch.equal(logits_of(model, ids)[0], one)
    assert_close(logits_of(model, ids)[0], on, rtol=0, atol=0)


def test_the_start_and_how_it_is_read_are_trained_and_nothing_else_of_a_memory() -> None:
    model = TitansMAG(32, config())
    with writes_off(model):
        model.loss(torch.randint(0, 32, (2, 33))).backward()
    memory: Any = model.layers[0].mixer.memory
    assert all(each.grad is not None for each in memory.memory_model_parameters)
    assert all(each.grad is not None for each in memory.to_queries.parameters())
    assert all(each.grad is None for each in memory.to_keys.parameters())
