"""Rules: the two equations of a rule mean the same however they are run, and a rule of one's own is one small class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.testing import assert_close

from tests.support.configurations import Case, cases, with_rule
from tests.support.rules_by_the_book import DECAY_TO_START
from tests.test_exactness import check
from tests.test_toy_rule import TowardsStart
from titans_pytorch import NeuralMemory
from titans_pytorch.fast_weights.blocks.dense import Evolved, by_products, chunk_by_chunk
from titans_pytorch.fast_weights.blocks.factored import scaled_over_chunks, summed_over_chunks
from titans_pytorch.fast_weights.blocks.scan import by_scan
from titans_pytorch.fast_weights.rules.decay_to_start import DecayToStart
from titans_pytorch.fast_weights.rules.gated_delta import GatedDelta
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.orthogonal import Orthogonal
from titans_pytorch.fast_weights.rules.rule import Memory, Rule, from_unit_vectors
from titans_pytorch.fast_weights.rules.titans import Titans
from titans_pytorch.fast_weights.scale import ZERO

EXACT = dict(rtol=1e-12, atol=1e-12)
ROWS, CHUNKS = 2, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RULES = {
    "no momentum": Titans(0),
    "momentum": Titans(1),
    "three orders": Titans(3),
    "orders combined": Titans(3, 2),
    "orders combined with the surprise": Titans(2, 3),
    "towards the start": TowardsStart(),
    "towards the start, with momentum": DecayToStart(2),
    "gated delta": GatedDelta(1),
}


def gates_of(rule: Rule, has_mask: bool, channels: int | None) -> Gates:
    names = {gate.name: gate.number for gate in rule.gates}
    of = (ROWS, CHUNKS) if channels is None else (ROWS, channels, CHUNKS)
    factors = {"keep": torch.nn.functional.logsigmoid(random(1, *of, seed=1))}
    if "momentum" in names:
        factors["momentum"] = torch.nn.functional.logsigmoid(random(names["momentum"], ROWS, CHUNKS, seed=2))
    shares = {"combine": random(names["combine"], ROWS, CHUNKS, seed=3).softmax(0)} if "combine" in names else {}
    is_stored = None
    if has_mask:
        is_stored = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
        factors = {name: log * (is_stored if log.ndim == 3 else is_stored[:, None]) for name, log in factors.items()}
    return Gates(factors, shares, is_stored)


def memory_of(rule: Rule, shape: tuple[int, ...], is_fresh: bool) -> Memory:
    momenta = tuple(ZERO if is_fresh else random(ROWS, *shape, seed=10 + order) for order in range(rule.num_momenta))
    return Memory(random(ROWS, *shape, seed=4), momenta, random(ROWS, *shape, seed=5) if rule.uses_start else None)


def surprises(shape: tuple[int, ...], is_stored: Tensor | None) -> Tensor:
    found = random(ROWS, CHUNKS, *shape, seed=6)
    return found if is_stored is None else found * is_stored.reshape(ROWS, CHUNKS, *[1] * len(shape))


def check_equal(left: Evolved, right: Evolved) -> None:
    assert_close(left.weights, right.weights, **EXACT)
    assert_close(left.last, right.last, **EXACT)
    assert_close(left.momenta, right.momenta, **EXACT)


@pytest.mark.parametrize("is_fresh", [False, True], ids=["moving", "fresh"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "shape, has_channels", [((3, 4), False), ((3, 4), True), ((4,), True), ((), False), ((), True)], ids=str
)
@pytest.mark.parametrize("name", RULES)
def test_chunk_by_chunk_by_products_and_by_scan_are_the_same(
    name: str, shape: tuple[int, ...], has_channels: bool, has_mask: bool, is_fresh: bool
) -> None:
    rule, channels = RULES[name], (*shape, 1)[len(shape) - 1] if has_channels else None
    gates, memory = gates_of(rule, has_mask, channels), memory_of(rule, shape, is_fresh)
    found = surprises(shape, gates.is_stored)
    expected = chunk_by_chunk(rule, memory, found, gates)
    check_equal(by_products(rule, memory, found, gates), expected)
    check_equal(by_scan(rule, memory, found, gates, use_accelerated=False), expected)


@pytest.mark.parametrize("has_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", RULES)
def test_closed_forms_are_what_the_equations_make_of_unit_vectors(name: str, has_mask: bool) -> None:
    """As they act: a coefficient of what is zero anyway may be anything."""
    rule = RULES[name]
    gates, memory = gates_of(rule, has_mask, None), memory_of(rule, (3, 4), False)
    found = surprises((3, 4), gates.is_stored)
    closed, derived = rule.coefficients(gates).shares(), from_unit_vectors(rule, gates).shares()

    def entries(shares: Any) -> Tensor:
        parts = [scaled_over_chunks(shares.initial, memory.weights)]
        parts += [scaled_over_chunks(past, m) for past, m in zip(shares.past, memory.momenta, strict=True)]
        if shares.start is not None:
            parts.append(scaled_over_chunks(shares.start, memory.start))
        return sum(parts) + summed_over_chunks(shares.surprise, found)

    def last(shares: Any) -> list[Tensor]:
        return [
            sum(p[:, None, None] * m for p, m in zip(past, memory.momenta, strict=True))
            + torch.einsum("rn,rnij->rij", of, found)
            for past, of in zip(shares.last_past, shares.last_surprise, strict=True)
        ]

    assert_close(entries(closed), entries(derived), **EXACT)
    assert_close(last(closed), last(derived), **EXACT)


@pytest.mark.parametrize("channels", [None, 4], ids=["of rows", "of channels"])
@pytest.mark.parametrize("name", RULES)
def test_coefficients_of_all_blocks_at_once_are_those_of_each(name: str, channels: int | None) -> None:
    rule = RULES[name]
    gates = gates_of(rule, True, channels).select(slice(1, 5))
    of_each = [rule.coefficients(gates.select(chunks)) for chunks in (slice(0, 2), slice(2, 4))]
    for found, expected in zip(rule.coefficients(gates.blocks(2)).blocks(2), of_each, strict=True):
        assert_close(tuple(found), tuple(expected), **EXACT)


@pytest.mark.parametrize("per_parameter", [False, True], ids=["shared gates", "gates of every parameter"])
def test_coefficients_of_built_weights_are_worked_out_once_for_all_equal_blocks(
    per_parameter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for all parameters, where these share their gates."""
    closed_form, asked = Titans.coefficients, []
    monkeypatch.setattr(Titans, "coefficients", lambda self, gates: asked.append(gates) or closed_form(self, gates))
    memory = NeuralMemory(8, 2, 4, spectral_norm_surprises=True, per_parameter_gates=per_parameter)
    memory(random(1, 32, 8).float())
    assert len(asked) == (len(memory.init_weights(1)) if per_parameter else 1)
    assert len(asked[0].like) == 32 // 4  # blocks of one row


@pytest.mark.parametrize("inner", ["momentum", "orders combined", "towards the start"])
def test_orthogonal_steps_are_a_wrapper_of_any_rule(inner: str) -> None:
    """Steps of matrices are orthogonal, those of vectors as they were; built in one go or one by one."""
    rule = Orthogonal(RULES[inner])
    for shape in ((3, 4), (4,)):
        gates, memory = gates_of(rule, False, None), memory_of(rule, shape, False)
        found = surprises(shape, None)
        check_equal(by_products(rule, memory, found, gates), chunk_by_chunk(rule, memory, found, gates))


def test_equation_13_is_what_it_says() -> None:
    """With plain numbers: 0.75 * 8 + (0.5 * 4 + 2) = 10, and the momentum after it is 4."""
    one = torch.ones(1, dtype=torch.float64)
    logs = {"keep": torch.log(one[None, :, None] * 0.75), "momentum": torch.log(one[None, :, None] * 0.5)}
    after = Titans(1).step(Memory(one * 8, (one * 4,)), one * 2, Gates(logs, {}, None).of_chunk(0))
    assert_close(after.weights, one * 10)
    assert_close(after.momenta[0], one * 4)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_forgetting_towards_the_start_equals_the_oracle(case: Case) -> None:
    check(with_rule(case, DECAY_TO_START))


def test_who_forgets_all_is_as_at_the_start() -> None:
    """alpha 1 and nothing surprising: the learned memory, not an empty one."""
    memory = NeuralMemory(
        8, 2, rule="decay_to_start", momentum=False, init_decay_bias=80.0, init_adaptive_step_bias=-80.0
    )
    _, state = memory.double()(random(1, 20, 8))
    for name, initial in memory.init_weights(1).items():
        assert_close(state.current[name], initial)


def test_rules_by_name_take_the_options_of_titans() -> None:
    for name in ("gated_delta", "decay_to_start"):
        memory = NeuralMemory(8, 1, 1, rule=name, momentum_order=2, per_parameter_gates=True, init_decay_bias=-3.0)
        assert memory.rule.num_momenta == 2
        assert (memory.to_decay_factor[0].bias == -3.0).all()
