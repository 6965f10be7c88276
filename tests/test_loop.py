"""Many blocks through one loop: drawn memories against the oracle, float32 at real widths, and every way to run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.operations import held_bytes, operations
from tests.support.configurations import Case, cases
from tests.test_exactness import check
from titans_pytorch import MemoryAsContextTransformer, NeuralMemory
from titans_pytorch.fast_weights.loop.evolution import PackProducts, side_by_side
from titans_pytorch.fast_weights.loop.loop import Loop
from titans_pytorch.fast_weights.loop.storing import SeriesStore
from titans_pytorch.fast_weights.rules.atlas import SteppedByLength
from titans_pytorch.memory.costs import COSTS, Costs

IN_LOOPS: dict[str, Any] = {
    "model": "default",
    "max_grad_norm": None,
    "accept_weight_residual": False,
    "spectral_norm_surprises": False,
    "loss": None,
}
"""What a loop asks for; all other options are drawn"""

BLOCK_BY_BLOCK = Costs(series_elements=0)


@st.composite
def looped(draw: st.DrawFn) -> Case:
    case: Case = draw(cases())
    chunk = draw(st.integers(1, 3))
    depth = draw(st.sampled_from([1, 2, 2, 3]))
    options = case.options | IN_LOOPS | {"chunk_size": chunk, "attn_pool_chunks": False}
    options |= {"batch_size": draw(st.sampled_from([None, 1, 1, 2, 2, 3, 5])), "store_with_lookahead_value": False}
    options["batch_size"] = None if options["batch_size"] is None else options["batch_size"] * chunk
    options["default_model_kwargs"] = dict(depth=depth, expansion_factor=draw(st.sampled_from([1.0, 1.5])))
    split = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    return Case(options, case.batch, sum(split), split, case.seed, case.has_mask, case.has_store_seq, "factored")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=looped())
def test_loops_equal_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=looped())
def test_many_more_loops_equal_the_oracle(case: Case) -> None:
    check(case)


ACCELERATOR = COSTS["cuda"]._replace(carry_cost=20.0)
"""The plan of an accelerator, with blocks small enough for a few tokens"""


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_the_plan_of_an_accelerator_equals_the_oracle(case: Case) -> None:
    """Where blocks that share a base are stored at once, and fewer go through loops than on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSTS, "cpu", ACCELERATOR)
        check(case)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=looped())
def test_loops_of_an_accelerator_equal_the_oracle(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSTS, "cpu", ACCELERATOR)
        check(case)


OPTIONS: dict[str, dict[str, Any]] = {
    "one chunk": dict(chunk_size=16, batch_size=16),
    "two chunks": dict(chunk_size=8, batch_size=16),
    "shares": dict(chunk_size=4, batch_size=16),
    "learned gain": dict(chunk_size=16, batch_size=16, learned_norm_gain=True),
    "no norm": dict(chunk_size=16, batch_size=16, mem_model_norm_add_residual=False),
}
REAL = dict(dim=128, heads=4, dim_head=32, default_step_transform_max_lr=1e-2, default_model_kwargs=dict(depth=2))


def results(memory: NeuralMemory, seq: Tensor, **how: Any) -> list[Tensor]:
    """What is read, the last weights, and gradients of the input and of every parameter."""
    seq = seq.detach().requires_grad_()
    reads, state = memory(seq, **how)
    total = reads.square().mean() + sum(w.square().mean() for w in state.current.values())
    wanted = [seq, *memory.parameters()]
    found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [reads.detach(), *(w.detach() for w in state.current.values()), *found]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within a share of the largest entry of each."""
    for x, y in zip(found, expected, strict=True):
        assert_close(x.double() / (y.abs().max() + 1e-12), y / (y.abs().max() + 1e-12), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_at_real_widths(name: str) -> None:
    """16 rows of 32 by 64: products there go other ways than in a small float64 memory."""
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS[name]), torch.randn(4, 96, 128)
    found = results(memory, seq)
    compare(found, results(memory.double(), seq.double()), 2e-5)


@pytest.fixture
def block_by_block(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which nothing goes through a loop."""

    def run(memory: NeuralMemory, seq: Tensor) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setitem(COSTS, "cpu", BLOCK_BY_BLOCK)
            return results(memory, seq)

    return run


OWN_RULES: dict[str, Any] = {
    "a gate multiplies the momentum just moved": lambda: SteppedByLength(1),
    "a gate multiplies a mix of two": lambda: SteppedByLength(2, 2),
    "and of a third that is made of them": lambda: SteppedByLength(2, 3),
}


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_rule_of_ones_own_in_a_loop_is_what_its_blocks_are(
    rule: str, chunks: int, has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sums are worked out in any order that they allow, there and back."""
    torch.manual_seed(0)
    monkeypatch.setitem(COSTS, "cpu", Costs(loop_chunks=3))
    memory = NeuralMemory(8, 2, 2 * chunks, heads=2, dim_head=4, rule=OWN_RULES[rule]()).double()
    seq = torch.randn(2, 25, 8, dtype=torch.float64)
    mask = torch.rand(2, 25) < 0.7 if has_mask else None
    assert memory.plan(2, 25).choice.has_loop
    found = results(memory, seq, store_mask=mask)
    monkeypatch.setitem(COSTS, "cpu", BLOCK_BY_BLOCK)
    assert not memory.plan(2, 25).choice.has_loop
    compare(found, results(memory, seq, store_mask=mask), 1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loop_is_what_its_blocks_are(name: str, block_by_block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks go through one."""
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS[name]).double(), torch.randn(2, 100, 128, dtype=torch.float64)
    expected = block_by_block(memory, seq)
    used: list[Any] = []
    original = SeriesStore.block
    monkeypatch.setattr(SeriesStore, "block", lambda *args: used.append(1) or original(*args))
    for blocks in (2, 3, 1000):
        elements = 8 * sum(p[0].numel() for p in memory.memory_model_parameters) * 2
        costs = Costs(series_elements=blocks * elements, loop_renewals=1, loop_blocks=1)
        monkeypatch.setitem(COSTS, "cpu", costs)
        used.clear()
        compare(results(memory, seq), expected, 1e-9)
        assert used


WAYS = {
    "kept": lambda run: run,
    "checkpoint": lambda run: lambda x: checkpoint(run, x, use_reentrant=False),
    "reentrant checkpoint": lambda run: lambda x: checkpoint(run, x, use_reentrant=True),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_loops_under_activation_checkpointing(name: str, way: str) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(**REAL, **OPTIONS[name]).double()
    seq = torch.randn(2, 80, 128, dtype=torch.float64, requires_grad=True)

    def gradients(run: Any) -> list[Tensor]:
        total = run(seq).square().sum()
        wanted = [seq, *(p for p in memory.parameters())]
        for tensor in wanted:
            tensor.grad = None
        total.backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in wanted]

    def run(x: Tensor) -> Tensor:
        return memory(x)[0]

    compare(gradients(WAYS[way](run)), gradients(run), 1e-12)


def test_spans_of_loops_are_recomputed_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS["two chunks"]).double(), torch.randn(2, 96, 128, dtype=torch.float64)
    kept = results(memory, seq)
    monkeypatch.setitem(COSTS, "cpu", Costs(kept_elements=1, span_tokens=256))
    compare(results(memory, seq), kept, 1e-9)


def test_a_gradient_of_the_gradient_is_refused_in_one_sentence() -> None:
    memory, seq = NeuralMemory(8, chunk_size=2, batch_size=2), torch.randn(1, 12, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(memory(seq)[0].sum(), seq, create_graph=True)


def test_transforms_of_torch_func_go_block_by_block() -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(8, chunk_size=2, batch_size=2).double()
    seq = torch.randn(1, 12, 8, dtype=torch.float64)

    def loss(seq: Tensor) -> Tensor:
        return memory(seq)[0].square().sum()

    seq.requires_grad_()
    (expected,) = torch.autograd.grad(loss(seq), seq)
    assert_close(torch.func.grad(loss)(seq.detach()), expected)


def test_a_loop_runs_in_inference_mode() -> None:
    memory, seq = NeuralMemory(8, chunk_size=2, batch_size=2), torch.randn(1, 12, 8)
    with torch.inference_mode():
        found = memory(seq)[0]
    assert_close(found.clone(), memory(seq)[0].detach())


def test_what_is_not_finite_in_one_row_stays_there() -> None:
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS["two chunks"]), torch.randn(2, 96, 128)
    alone = memory(seq)[0][1]
    seq[0, 20] = torch.nan
    reads = memory(seq)[0]
    assert_close(reads[1], alone)
    assert reads[0, :20].isfinite().all()
    assert reads[0, 40:].isnan().all()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "shares"])
def test_gradients_of_what_is_read_are_the_same_side_by_side(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they lie on an accelerator, where an operation costs more than a copy."""
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS[name]).double(), torch.randn(2, 64, 128, dtype=torch.float64)
    apart, plain, found = results(memory, seq), Loop.products_of, []

    def products_of(self: Loop, *args: Any) -> PackProducts:
        found.append(side_by_side(plain(self, *args)))
        return found[-1]

    monkeypatch.setattr(Loop, "products_of", products_of)
    assert_close(results(memory, seq), apart)
    assert found


def test_where_only_reading_is_trained_a_loop_keeps_nothing_for_its_way_back() -> None:
    torch.manual_seed(0)
    memory, seq = NeuralMemory(**REAL, **OPTIONS["two chunks"]), torch.randn(2, 128, 128)
    weight = memory.to_queries.weight

    def loss() -> Tensor:
        return memory(seq)[0].square().mean()

    (expected,), held = torch.autograd.grad(loss(), weight), held_bytes(lambda: loss().backward())
    memory.requires_grad_(False)
    weight.requires_grad_()
    (found,) = torch.autograd.grad(loss(), weight, create_graph=True)
    assert_close(found, expected)
    assert found.requires_grad, "reading alone can be differentiated again"
    assert held_bytes(lambda: loss().backward()) < 0.6 * held


RENEWALS = [("cpu", 16, 26.5, 73.5), ("cpu", 8, 29.5, 86), ("cuda", 16, 24.5, 66.5), ("cuda", 8, 28.5, 86.5)]
"""Plan of which device, tokens of a chunk, operations forward, in training"""


class TestOperations:
    """How many operations torch is asked for: exact, so no machine and no noise is in these numbers."""

    def of_call(self, memory: NeuralMemory, batch: int, length: int, is_training: bool) -> int:
        seq = torch.randn(batch, length, memory.dim)
        if is_training:
            return operations(lambda: memory(seq)[0].square().mean().backward())
        with torch.no_grad():
            return operations(lambda: memory(seq))

    def per_renewal(self, is_training: bool, **options: Any) -> float:
        """From two lengths, so that what a call does once is left out, and what it does for every span is not."""
        torch.manual_seed(0)
        memory = NeuralMemory(dim=128, heads=4, dim_head=32, default_step_transform_max_lr=0.1, **options)
        long, short = (self.of_call(memory, 4, length, is_training) for length in (4096, 1024))
        return (long - short) / (3072 // options["batch_size"])

    @pytest.mark.parametrize("device, chunk, forward, training", RENEWALS)
    def test_of_a_renewal_of_16_tokens(
        self, device: str, chunk: int, forward: float, training: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(COSTS, "cpu", COSTS[device])
        options = dict(chunk_size=chunk, batch_size=16)
        assert self.per_renewal(False, **options) <= forward
        assert self.per_renewal(True, **options) <= training

    @pytest.mark.parametrize("chunk, forward, training", [(16, 55, 259), (8, 84.5, 412)])
    def test_of_a_renewal_that_goes_block_by_block(
        self, chunk: int, forward: float, training: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(series_elements=0))
        options = dict(chunk_size=chunk, batch_size=16)
        assert self.per_renewal(False, **options) <= forward
        assert self.per_renewal(True, **options) <= training

    def test_of_gates_of_every_token(self) -> None:
        """Momenta are read as well, so there are more than with those of chunks, though not with every token."""
        of_chunks, of_tokens = (
            self.per_renewal(True, chunk_size=chunk, batch_size=16, learned_norm_gain=True) for chunk in (16, 1)
        )
        assert of_tokens <= 73
        assert of_tokens <= 1.25 * of_chunks

    @pytest.mark.parametrize("chunk", [64, 16])
    def test_where_the_base_is_never_renewed_they_do_not_depend_on_the_length(
        self, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(COSTS, "cpu", COSTS["cuda"])
        torch.manual_seed(0)
        memory = NeuralMemory(dim=384, chunk_size=chunk, default_model_kwargs=dict(depth=2, expansion_factor=1.0))
        forward = self.of_call(memory, 2, 1024, False)
        assert forward <= 180
        assert self.of_call(memory, 2, 4096, False) <= 1.1 * forward
        assert self.of_call(memory, 2, 1024, True) <= 600

    def test_of_a_step_of_the_transformer_of_the_readme_with_the_plan_of_an_accelerator(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(COSTS, "cpu", COSTS["cuda"])
        torch.manual_seed(0)
        model = MemoryAsContextTransformer(
            num_tokens=256, dim=256, depth=2, segment_len=128, num_persist_mem_tokens=4, num_longterm_mem_tokens=16
        )
        ids = torch.randint(0, 256, (1, 1023))
        assert operations(lambda: model(ids, return_loss=True).backward()) <= 2700


def test_a_forward_pass_without_gradients_holds_less_than_before_there_were_loops() -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(dim=384, chunk_size=64, batch_size=64)
    with torch.no_grad():
        held = held_bytes(lambda: memory(torch.ones(2, 1024, 384)))
    assert held <= 89e6, "weights and momenta are moved where they lie (93.2e6 block by block, at 564baa4)"


def test_small_memories_hold_what_a_span_of_tokens_needs() -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(dim=128, chunk_size=8, batch_size=16, heads=4, dim_head=32)
    with torch.no_grad():
        assert held_bytes(lambda: memory(torch.ones(4, 1024, 128))) <= 39e6
    with torch.no_grad():
        pair = NeuralMemory(dim=256, chunk_size=16, batch_size=32)
        one = held_bytes(lambda: pair(torch.ones(1, 32, 256)))
    assert one <= 20.8e6, "momenta of a single renewal move where they lie, too"
    held = held_bytes(lambda: memory(torch.randn(4, 1024, 128))[0].square().mean().backward())
    assert held <= 219.5e6, "momenta are worked out again, gradients of what is read are products (242.5e6 at 564baa4)"


@pytest.mark.parametrize("length, forward, training", [(1024, 39e6, 233e6), (4096, 65e6, 904e6)])
def test_a_single_sequence_that_is_never_renewed_goes_block_by_block(
    length: int, forward: float, training: float
) -> None:
    """A loop would keep what each block begins with: 103 MB forward and 422 in training for 1,024 tokens."""
    torch.manual_seed(0)
    memory, seq = NeuralMemory(dim=384, chunk_size=64), torch.randn(1, length, 384)
    with torch.no_grad():
        assert held_bytes(lambda: memory(seq)) <= forward
    assert held_bytes(lambda: memory(seq)[0].square().mean().backward()) <= training
