"""`torch.compile` where it pays: one renewal of a memory's loop, steps of training, decoded tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close

from titans_pytorch import (
    MemoryAsContextTransformer,
    NeuralMemory,
    TitansConfig,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
)
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.fast_weights.loop import compiled
from titans_pytorch.fast_weights.loop.step import renewal
from titans_pytorch.training.compiling import compile_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch's, to itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

WIDTHS = dict(dim=16, heads=2, dim_head=8, default_step_transform_max_lr=0.1, default_model_kwargs=dict(depth=2))
LARGE_STEPS = dict(init_adaptive_step_bias=3.0, init_decay_bias=-6.0)
MEMORIES: dict[str, dict[str, Any]] = {
    "one chunk": dict(chunk_size=16, batch_size=16),
    "two chunks": dict(chunk_size=8, batch_size=16),
    "shares": dict(chunk_size=4, batch_size=16),
    "learned gain": dict(chunk_size=8, batch_size=16, learned_norm_gain=True),
    "learned gain, shares": dict(chunk_size=4, batch_size=16, learned_norm_gain=True),
    "no norm": dict(chunk_size=16, batch_size=16, mem_model_norm_add_residual=False),
    "no limit": dict(chunk_size=8, batch_size=16, max_weight_growth=None),
    "a limit that acts": dict(chunk_size=8, batch_size=16, max_weight_growth=1.0, **LARGE_STEPS),
    "depth 1": dict(chunk_size=8, batch_size=16, default_model_kwargs=dict(depth=1)),
    "depth 3": dict(chunk_size=8, batch_size=16, default_model_kwargs=dict(depth=3)),
    "depth 3, shares": dict(chunk_size=4, batch_size=16, default_model_kwargs=dict(depth=3)),
    "two momenta": dict(chunk_size=8, batch_size=16, momentum_order=2, learned_momentum_combine=True),
    "no momentum": dict(chunk_size=8, batch_size=16, momentum=False),
    "two writes of a token": dict(chunk_size=8, batch_size=16, num_kv_per_token=2),
}
PIECES = {"at once": (100,), "the base apart in the middle": (39, 4, 57)}


def memory_of(name: str) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(**WIDTHS | MEMORIES[name]).double()


def results(memory: NeuralMemory, pieces: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """What is read and remembered; gradients of the input and of every parameter."""
    torch.manual_seed(1)
    seq = torch.randn(2, sum(pieces), memory.dim, dtype=memory.dtype, requires_grad=True)
    reads, state = [], None
    for piece in seq.split(pieces, dim=1):
        read, state = memory(piece, state=state)
        reads.append(read)
    weights = [*state.current.values(), *state.base.values(), *state.momenta.values()]
    total = torch.cat(reads, dim=1).square().mean() + sum(w.square().mean() for w in weights)
    found = torch.autograd.grad(total, [seq, *memory.parameters()], allow_unused=True, materialize_grads=True)
    return [each.detach() for each in (*reads, *weights)], list(found)


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within a share of the largest entry of each."""
    for x, y in zip(found, expected, strict=True):
        scale = y.abs().max() + 1e-12
        assert_close(x / scale, y / scale, rtol=0, atol=tolerance)


class TestStep:
    """One renewal as a function of tensors, before anything compiles it."""

    @pytest.fixture(autouse=True)
    def plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiled, "compiled_step", lambda device: renewal)

    @pytest.mark.parametrize("pieces", PIECES)
    @pytest.mark.parametrize("name", MEMORIES)
    def test_is_what_the_loop_by_hand_does(self, name: str, pieces: str) -> None:
        memory = memory_of(name)
        expected = results(memory, PIECES[pieces])
        memory.compile_loop()
        found = results(memory, PIECES[pieces])
        compare(found[0], expected[0], 1e-9)
        compare(found[1], expected[1], 1e-7)

    def test_weights_on_the_way_are_those_of_the_loop_by_hand(self) -> None:
        memory, seq = memory_of("two chunks"), torch.randn(2, 100, 16, dtype=torch.float64)
        expected = memory(seq)[1].updates
        memory.compile_loop()
        found = memory(seq)[1].updates
        for name in expected:
            assert_close(found[name], expected[name])

    def test_only_stored_is_what_the_loop_by_hand_stores(self) -> None:
        memory, seq = memory_of("two chunks"), torch.randn(2, 96, 16, dtype=torch.float64)
        expected = memory.store_memories(seq, return_surprises=False)[1]
        memory.compile_loop()
        found = memory.store_memories(seq, return_surprises=False)[1]
        compare(list(found.current.values()), list(expected.current.values()), 1e-9)

    def test_masked_tokens_leave_no_trace(self) -> None:
        memory, seq = memory_of("two chunks"), torch.randn(2, 96, 16, dtype=torch.float64)
        mask = torch.rand(2, 96) < 0.7
        mask[:, 32:48] = False
        expected = memory(seq, store_mask=mask)[0]
        memory.compile_loop()
        assert_close(memory(seq, store_mask=mask)[0], expected)

    def test_a_memory_without_a_loop_is_refused(self) -> None:
        with pytest.raises(ValueError, match="compile_loop needs a memory whose renewals go through a loop"):
            NeuralMemory(8, max_grad_norm=1.0).compile_loop()


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs were compiled since the test began, or since the last question."""
    torch._dynamo.reset()
    compiled.compiled_step.cache_clear()
    counters.clear()

    def count() -> int:
        found = counters["stats"]["unique_graphs"]
        counters.clear()
        return found

    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two chunks", "shares", "learned gain"])
def test_a_compiled_step_equals_the_loop_by_hand(name: str, graphs: Callable[[], int]) -> None:
    memory = memory_of(name)
    expected = results(memory, (96,))
    memory.compile_loop()
    found = results(memory, (96,))
    compare(found[0], expected[0], 1e-9)
    compare(found[1], expected[1], 1e-7)
    assert graphs() == 1


@pytest.mark.slow
def test_no_length_compiles_again(graphs: Callable[[], int]) -> None:
    """The first renewal, whose momentum nothing has moved, has the graph of all; so have pieces and longer calls."""
    memory = memory_of("learned gain")
    memory.compile_loop()
    results(memory, (96,))
    assert graphs() == 1
    results(memory, (96,))
    results(memory, (160,))
    results(memory, (64, 32, 48))
    assert graphs() == 0
    with torch.no_grad():
        memory(torch.randn(2, 96, 16, dtype=torch.float64))
    assert graphs() == 1
    with torch.no_grad():
        memory(torch.randn(2, 200, 16, dtype=torch.float64))
    assert graphs() == 0


# ---- steps of training, as `--compile` has them

CONFIG = TitansConfig(dim=16, depth=1, heads=2, window=8, num_persistent=2, memory_chunk=4, memory_refresh=8)


def transformer() -> MemoryAsContextTransformer:
    memory = dict(dim_head=8, heads=2)
    return MemoryAsContextTransformer(
        num_tokens=32,
        dim=16,
        depth=1,
        segment_len=8,
        heads=2,
        dim_head=8,
        num_persist_mem_tokens=2,
        num_longterm_mem_tokens=2,
        neural_memory_layers=(1,),
        neural_memory_segment_len=4,
        neural_memory_batch_size=8,
        neural_memory_kwargs=memory,
    )


FAMILY: dict[str, Callable[[], CausalLM[Any]]] = {
    "TitansMAC": lambda: TitansMAC(32, CONFIG),
    "TitansMAG": lambda: TitansMAG(32, CONFIG),
    "TitansMAL": lambda: TitansMAL(32, CONFIG),
    "TitansLMM": lambda: TitansLMM(32, CONFIG),
    "MemoryAsContextTransformer": transformer,
}


def trained(model: CausalLM[Any], ids: Tensor) -> list[Tensor]:
    """The loss and the gradients of a step."""
    model.zero_grad()
    loss = model.loss(ids)
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILY)
def test_compiled_steps_of_training_are_steps_of_training(name: str, graphs: Callable[[], int]) -> None:
    """And the next ones compile nothing."""
    torch.manual_seed(0)
    model, ids = FAMILY[name]().double(), torch.randint(0, 32, (2, 33))
    expected = trained(model, ids)
    compile_parts(model)
    for x, y in zip(trained(model, ids), expected, strict=True):
        assert_close(x, y, rtol=1e-7, atol=1e-10)
    assert graphs() > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        trained(model, ids)
    assert graphs() == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_samples_of_a_compiled_model_compile_nothing(graphs: Callable[[], int]) -> None:
    torch.manual_seed(0)
    model, prompt = TitansMAG(32, CONFIG), torch.randint(0, 32, (1, 9))
    expected = model.sample(prompt, 30, temperature=0.0)
    compile_parts(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.sample(prompt, 30, temperature=0.0), expected)
    assert graphs() == 0


@pytest.mark.parametrize("options", [dict(gated_transition=True), dict(per_parameter_gates=True)])
def test_what_the_step_does_not_know_runs_by_hand(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(**WIDTHS, chunk_size=4, batch_size=4, **options).double()
    seq = torch.randn(2, 20, 16, dtype=torch.float64)
    expected = memory(seq)[0]
    memory.compile_loop()
    assert_close(memory(seq)[0], expected)
