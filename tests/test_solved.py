"""Renewals of a linear memory, solved for: the oracle, delta rules by the book, pieces, precision, and the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.operations import operations
from tests.support.configurations import Case, RuleUnderTest, cases, with_rule
from tests.support.rules_by_the_book import GATED_DELTA, GATED_DELTA_RULE
from tests.support.streams import in_pieces, randn
from tests.test_exactness import check
from tests.test_loop import compare, results
from tests.test_toy_rule import TOY
from titans_pytorch import MemoryMLP, NeuralMemory, TitansBackbone, TitansConfig
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.memory.costs import COSTS

LINEAR: dict[str, Any] = {
    "model": "linear",
    "mem_model_norm_add_residual": False,
    "learned_norm_gain": False,
    "max_weight_growth": None,
    "gated_transition": False,
    "max_grad_norm": None,
    "channelwise_decay": False,
    "accept_weight_residual": False,
    "spectral_norm_surprises": False,
    "loss": None,
}
"""What can be solved for asks for this; all other options are drawn"""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(solved_writes=(4, 4)))


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were solved for, in each call."""
    calls: list[int] = []
    original = Engine.store_solved

    def counting(self: Engine, carry: Any, writes: Any, num_blocks: int) -> Any:
        calls.append(num_blocks)
        return original(self, carry, writes, num_blocks)

    monkeypatch.setattr(Engine, "store_solved", counting)
    return calls


@st.composite
def linear(draw: st.DrawFn) -> Case:
    case: Case = draw(cases())
    chunk = draw(st.sampled_from([1, 1, 1, 2, 3]))
    options = case.options | LINEAR | {"chunk_size": chunk, "batch_size": chunk, "attn_pool_chunks": False}
    options |= {"store_with_lookahead_value": False, "model": draw(st.sampled_from(["linear", "layerwise"]))}
    split = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=3)))
    return Case(options, case.batch, sum(split), split, case.seed, case.has_mask, case.has_store_seq, "factored")


@settings(max_examples=35, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=linear())
def test_any_pieces_of_any_configuration_equal_the_oracle(small_blocks: None, case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=linear())
def test_many_more_configurations_equal_the_oracle(small_blocks: None, case: Case) -> None:
    check(case)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=linear())
def test_a_rule_of_ones_own_is_solved_for_too(small_blocks: None, case: Case) -> None:
    """One that forgets towards the learned start."""
    rule: RuleUnderTest = TOY
    check(with_rule(case, rule))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=linear(), has_momentum=st.booleans())
def test_the_gated_delta_rule_equals_the_oracle(small_blocks: None, case: Case, has_momentum: bool) -> None:
    check(with_rule(case, GATED_DELTA if has_momentum else GATED_DELTA_RULE))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_forgetting_first_needs_the_memory_of_every_chunks_start(batch_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be the store chunk size \(1\) with a rule"):
        NeuralMemory(8, 1, batch_size, rule="gated_delta")
    memory = NeuralMemory(8, 1, 1, rule="gated_delta")
    with pytest.raises(ValueError, match="ttt_batch_size must be the store chunk size"):
        memory(torch.randn(1, 4, 8), ttt_batch_size=2)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_memory_may_forget_first(case: Case) -> None:
    chunk = case.options["chunk_size"]
    options = case.options | {"batch_size": chunk if isinstance(chunk, int) else chunk[1]}
    check(with_rule(replace(case, options=options), GATED_DELTA))


def test_the_preset(solved: list[int]) -> None:
    memory = NeuralMemory.delta(32, heads=2)
    assert memory.layout == (1, 1, 1, 1)
    assert memory.to_momentum is None
    assert type(memory.rule).__name__ == "GatedDelta"
    memory(torch.randn(2, 50, 32))[0].square().mean().backward()
    assert all(p.grad is not None for p in memory.parameters())
    assert NeuralMemory.delta(32, heads=2, momentum=True).to_momentum is not None
    assert solved
    with pytest.raises(ValueError, match=r"dim must be a multiple of heads \(3\), got 32"):
        NeuralMemory.delta(32, heads=3)


# precision


@pytest.mark.parametrize("beta", [1.0, 1.9])
@pytest.mark.parametrize("kind", ["random", "one key", "two keys", "near"])
def test_float32_stays_near_float64_over_long_sequences(kind: str, beta: float) -> None:
    """Whatever the keys; a step of 2 is where a delta rule stops forgetting what it got wrong."""
    torch.manual_seed(0)
    options = dict(model=MemoryMLP(16, 1), mem_model_norm_add_residual=False, max_weight_growth=None, loss="sse")
    memory = NeuralMemory(16, 1, 1, momentum=False, **options).evolution
    keys = torch.randn(1, 2048, 1, 16)
    if kind == "one key":
        keys = keys[:, :1].expand_as(keys)
    if kind == "two keys":
        keys = keys[:, :2].repeat(1, 1024, 1, 1)
    if kind == "near":
        keys = keys[:, :1] + 1e-3 * keys
    keys, values = F.normalize(keys, dim=-1), torch.randn(1, 2048, 1, 16)

    def last(dtype: torch.dtype) -> Tensor:
        gates = Gates({"keep": torch.full((1, 1, 2048), -0.01, dtype=dtype)}, {}, None)
        rates = torch.full((1, 2048, 1), beta / 2, dtype=dtype)
        writes = Writes(
            keys.to(dtype),
            values.to(dtype),
            *(PerParameter.shared(["weights.0"], x) for x in (rates, gates)),
            {},
            None,
            {},
        )
        weights = {"weights.0": torch.zeros(1, 16, 16, dtype=dtype)}
        return memory.store_solved(Carry(weights, weights, {}, {}), writes, 32)[0].finish().weights["weights.0"]

    exact = last(torch.float64)
    assert (last(torch.float32) - exact).norm() <= 1e-4 * exact.norm()


REAL = dict(
    dim=64, heads=2, dim_head=32, chunk_size=1, batch_size=1, qk_l2norm=True, max_weight_growth=None, loss="sse"
)


def real(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    form = dict(model=MemoryMLP(32, 1), mem_model_norm_add_residual=False, init_decay_bias=-4.0)
    return NeuralMemory(**REAL | form | dict(default_step_transform_max_lr=0.4) | options)


def test_float32_of_a_whole_layer(solved: list[int]) -> None:
    memory, seq = real(), torch.randn(2, 200, 64)
    found = results(memory, seq)
    compare(found, results(memory.double(), seq.double()), 5e-5)
    assert solved


def test_under_autocast_weights_stay_in_float32(solved: list[int]) -> None:
    memory, seq = real(), torch.randn(2, 100, 64)
    exact = memory(seq)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        reads, state = memory(seq)
        reads.float().square().mean().backward()
    assert state.current["weights.0"].dtype == torch.float32
    assert (reads.float() - exact).norm() <= 0.02 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in memory.parameters())
    assert solved


def test_gates_that_are_shut_are_not_divided_by(solved: list[int]) -> None:
    """All is forgotten at once, nothing is carried on, nothing is stored."""
    for bias in (-200.0, 200.0):
        memory = real(init_decay_bias=bias, init_momentum_bias=-bias, init_adaptive_step_bias=bias)
        seq = torch.randn(1, 80, 64, requires_grad=True)
        memory(seq)[0].square().sum().backward()
        assert seq.grad is not None
        assert seq.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())
    assert solved


def test_what_is_not_finite_reaches_nothing_before_it_nor_beside_it() -> None:
    memory, seq = real(), torch.randn(2, 96, 64)
    clean = memory(seq, return_surprises=True)
    seq[0, 20] = torch.nan
    reads, state, (loss, _) = memory(seq, return_surprises=True)
    assert_close(reads[1], clean[0][1])
    assert torch.equal(reads[0, :20], clean[0][0, :20])
    assert reads[0, 20:].isnan().all()
    assert loss[0, :, 21:].isnan().all()
    assert torch.equal(loss[:, :, :20], clean[2][0][:, :, :20])
    assert state.current["weights.0"][:2].isnan().all()
    assert state.current["weights.0"][2:].isfinite().all()


def test_later_tokens_change_no_bit_of_earlier_answers() -> None:
    memory, seq = real(), torch.randn(1, 96, 64)
    before = memory(seq)[0]
    seq[:, 50:] += 10.0
    assert torch.equal(memory(seq)[0][:, :50], before[:, :50])


# pieces, graphs and what surrounds a memory


def test_pieces_give_what_one_call_gives() -> None:
    memory, seq = real().double(), randn(2, 150, 64)
    expected, state = memory(seq)
    for lengths in ([150], [1] * 10 + [140], [31, 1, 32, 33, 53]):
        found, after = in_pieces(memory, seq, lengths)
        assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert_close(after.states, state.states, rtol=1e-9, atol=1e-9)


def test_weights_on_the_way_can_be_looked_at() -> None:
    memory, seq = real().double(), randn(2, 70, 64)
    _, state = memory(seq)
    trajectory, w = state.updates["weights.0"], None
    for t in (0, 1, 40, 70):
        w = memory(seq[:, :t])[1].current if t else memory.init_weights(2)
        assert_close(trajectory[:, t], w["weights.0"], rtol=1e-9, atol=1e-9)


def ways() -> Iterator[tuple[str, Any]]:
    yield "checkpoint", lambda run: lambda x: checkpoint(run, x, use_reentrant=False)
    yield "reentrant checkpoint", lambda run: lambda x: checkpoint(run, x, use_reentrant=True)


@pytest.mark.parametrize("way", dict(ways()).values(), ids=dict(ways()))
def test_under_activation_checkpointing(way: Any) -> None:
    memory, seq = real().double(), randn(2, 80, 64).requires_grad_()

    def gradients(run: Any) -> list[Tensor]:
        memory.zero_grad()
        seq.grad = None
        run(seq).square().sum().backward()
        return [t.grad.clone() for t in (seq, *memory.parameters()) if t.grad is not None]

    def run(x: Tensor) -> Tensor:
        return memory(x)[0]

    compare(gradients(way(run)), gradients(run), 1e-12)


def test_spans_are_recomputed_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, seq = real().double(), randn(2, 200, 64)
    kept = results(memory, seq)
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(kept_elements=1, span_tokens=256))
    assert memory.plan(2, 200).recomputes
    compare(results(memory, seq), kept, 1e-9)


def test_a_gradient_of_the_gradient_is_refused_in_one_sentence() -> None:
    memory, seq = real(), torch.randn(1, 40, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="linear memory whose renewals are solved can be differentiated once"):
        torch.autograd.grad(memory(seq)[0].sum(), seq, create_graph=True)


def test_inference_mode_and_transforms_of_torch_func(solved: list[int]) -> None:
    memory, seq = real().double(), randn(1, 40, 64)

    def loss(seq: Tensor) -> Tensor:
        return memory(seq)[0].square().sum()

    with torch.inference_mode():
        assert_close(memory(seq)[0].clone(), memory(seq)[0])
    (expected,) = torch.autograd.grad(loss(seq.requires_grad_()), seq)
    assert_close(torch.func.grad(loss)(seq.detach()), expected)
    assert len(solved) == 4


def test_it_compiles_as_one_graph() -> None:
    memory, seq = real(), torch.randn(1, 40, 64)
    expected = results(memory, seq)
    compiled = torch.compile(lambda x: memory(x)[0], fullgraph=True, backend="aot_eager")
    x = seq.clone().requires_grad_()
    reads = compiled(x)
    assert_close(reads, expected[0], rtol=1e-4, atol=1e-5)
    reads.square().mean().backward()
    assert x.grad is not None


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_models_of_the_family_have_it(variant: str, solved: list[int]) -> None:
    options = dict(mem_model_norm_add_residual=False, learned_norm_gain=False, max_weight_growth=None)
    config = TitansConfig(
        dim=16, depth=1, heads=2, window=8, memory_depth=1, memory_chunk=1, memory_refresh=1, memory_options=options
    )
    torch.manual_seed(0)
    model, x = TitansBackbone(variant, config).double(), randn(2, 30, 16)
    whole = model(x).outputs
    found, _ = in_pieces(model, x, [7, 1, 22])
    assert_close(found, whole, rtol=1e-9, atol=1e-9)
    assert solved


# the plan


def test_the_plan_says_that_renewals_are_solved_for_and_can_be_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = real()
    assert "renewals solved for" in memory.plan(2, 1000).explain()
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(solved_writes=(0, 0)))
    assert "in one loop" in memory.plan(2, 1000).explain()


def test_both_ways_are_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, seq = real().double(), randn(2, 100, 64)
    solved = results(memory, seq)
    monkeypatch.setitem(COSTS, "cpu", COSTS["cpu"]._replace(solved_writes=(0, 0)))
    compare(results(memory, seq), solved, 1e-9)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_weight_growth": 10.0}, "max_weight_growth acts at every renewal, so they run one by one; without it"),
        ({"gated_transition": True}, "gated_transition acts at every renewal"),
        ({"batch_size": 4}, ""),
        ({"max_grad_norm": 1.0}, ""),
        ({"channelwise_decay": True}, ""),
        ({"mem_model_norm_add_residual": True}, ""),
        ({"model": MemoryMLP(32, 2)}, ""),
        ({"chunk_size": 32, "batch_size": 32}, ""),
    ],
)
def test_what_is_not_linear_runs_otherwise_and_the_plan_says_why(
    options: dict[str, Any], words: str, solved: list[int]
) -> None:
    memory = real(**options)
    memory(torch.randn(1, 40, 64))
    assert solved == []
    assert words in memory.plan(1, 40).explain()


def test_operations_hardly_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, with the plan of an accelerator: a loop has more than twenty for every token."""
    monkeypatch.setitem(COSTS, "cpu", COSTS["cuda"])
    memory = real()

    def count(length: int) -> int:
        seq = torch.randn(1, length, 64)
        return operations(lambda: memory(seq)[0].square().mean().backward())

    assert count(2048) <= 650
    assert count(4096) - count(2048) <= 8 * (2048 // 64)
    monkeypatch.setitem(COSTS, "cpu", COSTS["cuda"]._replace(solved_writes=(0, 0)))
    assert count(1024) - count(512) >= 20 * 512
