"""A rule of one's own is one small class: oracle, pieces, gradients, engines and names come with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.testing import assert_close

from tests.support.configurations import Case, RuleUnderTest, cases, with_rule
from tests.support.oracle import Layer, Weights
from tests.test_exactness import check
from titans_pytorch import MemoryAttention, NeuralMemory
from titans_pytorch.fast_weights.rules import registry
from titans_pytorch.fast_weights.rules.rule import GateSpec, Rule


class TowardsStart(Rule):
    """Forgets towards the learned start instead of towards nothing, without momentum."""

    gates = (*Rule.gates, GateSpec("keep", "to_decay_factor", "decay"))
    uses_start = True

    def retain(self, weights: Any, step: Any, gates: Any, start: Any) -> Any:
        """w_j = (1 - alpha) w_{j-1} + alpha w_0 + u_j"""
        return gates.keep * weights + (1 - gates.keep) * start + step


class TowardsStartByTheBook(Layer):
    """What it should do, in the oracle's words."""

    def forget(self, w: Weights, pooled: Tensor, head: int) -> Weights:
        (alpha,) = self.of_head("to_decay_factor.0", pooled, head).sigmoid()
        return {name: (1 - alpha) * weight + alpha * self.initial(head)[name] for name, weight in w.items()}

    def step(self, row: Any, u: Weights, pooled: Tensor, head: int) -> Weights:
        return u


TOY = RuleUnderTest(TowardsStart, TowardsStartByTheBook)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_of_any_configuration_equals_the_oracle(case: Case) -> None:
    check(with_rule(case, TOY))


def test_a_toy_rule_that_is_broken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.mutants.cases import CASES

    case = with_rule(CASES["plain"], TOY)
    check(case)
    for broken in (
        lambda self, weights, step, gates, start: gates.keep * weights + step,
        lambda self, weights, step, gates, start: gates.keep * start + (1 - gates.keep) * weights + step,
        lambda self, weights, step, gates, start: gates.keep * weights + (1 - gates.keep) * start + step + step,
    ):
        monkeypatch.setattr(TowardsStart, "retain", broken)
        with pytest.raises(AssertionError):
            check(case)


def test_the_engine_is_chosen_as_for_any_rule() -> None:
    assert NeuralMemory(8, rule=TowardsStart()).engine == "factored"
    assert NeuralMemory(8, rule=TowardsStart(), engine="dense").engine == "dense"
    assert NeuralMemory(8, 4, rule=TowardsStart(), model=MemoryAttention(8)).engine == "factored"
    assert NeuralMemory(8, rule=TowardsStart()).to_momentum is None


def test_a_rule_with_a_name_is_chosen_and_saved_by_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    registry.register_rule("towards-start", lambda options: TowardsStart())
    memory = NeuralMemory(8, 4, rule="towards-start")
    memory.save_pretrained(tmp_path)
    seq = torch.randn(1, 21, 8)
    assert_close(NeuralMemory.from_pretrained(tmp_path)(seq)[0], memory(seq)[0])
    with pytest.raises(ValueError, match="must be new, got 'titans'"):
        registry.register_rule("titans", lambda options: TowardsStart())


@pytest.mark.parametrize(
    "options, error, words",
    [
        (
            {"rule": "delta"},
            ValueError,
            "rule must be one of 'atlas', 'decay_to_start', 'gated_delta', 'kl', 'lact', 'lq', 'titans', lq with",
        ),
        ({"rule": 3}, TypeError, "rule must be a name or a Rule, got int"),
        (
            {"rule": TowardsStart(), "momentum_order": 2},
            ValueError,
            "momentum_order must be left to the rule.*TowardsS",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        NeuralMemory(8, **options)
