"""Mutants of how weights evolve: forgetting, momentum and their gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import complement, equations_become, factor_becomes, gates_become, mutant, wrapped
from titans_pytorch.fast_weights.blocks import dense, sums
from titans_pytorch.fast_weights.interface import Carry
from titans_pytorch.fast_weights.rules import gates as gate_values
from titans_pytorch.fast_weights.rules import rule as rule_module
from titans_pytorch.fast_weights.rules.decay_to_start import DecayToStart
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.orthogonal import orthogonalised
from titans_pytorch.fast_weights.rules.titans import Titans
from titans_pytorch.fast_weights.solved import blocks as solved
from titans_pytorch.memory import gates as gates_module
from titans_pytorch.memory import pooling

# the gates


@mutant("plain", "spectral")
def decay_is_its_complement(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "keep", complement)


@mutant("plain", "read apart")
def nothing_is_forgotten(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "keep", torch.zeros_like)


@mutant("plain")
def momentum_is_its_complement(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "momentum", complement)


@mutant("plain", "general")
def momentum_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "momentum", lambda log: log - 50)


@mutant("rich")
def orders_of_momentum_trade_gates(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "momentum", lambda log: log.flip(0))


def shares_become(patcher: pytest.MonkeyPatch, change: Any) -> None:
    gates_become(patcher, lambda gates: gates._replace(shares={"combine": change(gates.shares["combine"])}))


@mutant("rich")
def orders_are_combined_equally(patcher: pytest.MonkeyPatch) -> None:
    shares_become(patcher, lambda shares: torch.full_like(shares, 1 / len(shares)))


@mutant("rich")
def the_zeroth_order_comes_last(patcher: pytest.MonkeyPatch) -> None:
    shares_become(patcher, lambda shares: shares.roll(1, 0))


@mutant("plain")
def gates_belong_to_the_next_chunk(patcher: pytest.MonkeyPatch) -> None:
    factor_becomes(patcher, "keep", lambda log: log.roll(-1, -1))


@mutant("plain", "general")
def products_of_gates_include_their_own(patcher: pytest.MonkeyPatch) -> None:
    """prod_{k=i..j} in place of prod_{k=i+1..j}"""

    def change(original: Any, log_gates: Tensor) -> Tensor:
        first = torch.nn.functional.pad(log_gates, (1, 0)).exp()
        return original(log_gates) * first.unsqueeze(-2)

    wrapped(patcher, gate_values, "products", change)


@mutant("plain")
def the_gates_triangle_is_upside_down(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, gate_values, "products", lambda original, log_gates: original(log_gates).mT)


@mutant("rich")
def gates_see_the_mean_not_the_pool(patcher: pytest.MonkeyPatch) -> None:
    mean = pooling.AveragePool()
    patcher.setattr(pooling.AttentionPool, "forward", lambda self, *args: mean(*args))


@mutant("rich", "attention", "general")
def the_pool_sees_masked_tokens(patcher: pytest.MonkeyPatch) -> None:
    for pool in (pooling.AveragePool, pooling.AttentionPool):
        wrapped(patcher, pool, "forward", lambda original, self, x, is_stored=None: original(self, x))


# the rule's equations, and their closed form


@mutant("paper, one chunk a batch", "plain", "spectral", "general")
def the_step_is_forgotten_too(patcher: pytest.MonkeyPatch) -> None:
    """(1 - alpha) (M + S) in place of (1 - alpha) M + S"""
    equations_become(
        patcher,
        "retain",
        lambda original, self, weights, step, gates, start: gates.keep * rule_module.summed(weights + step),
    )


@mutant("paper, one chunk a batch", "plain", "general")
def momentum_forgets_the_new_surprise_too(patcher: pytest.MonkeyPatch) -> None:
    """eta (S + u) in place of eta S + u"""

    def change(original: Any, self: Titans, momenta: Any, surprise: Any, gates: Any) -> Any:
        if not momenta:
            return original(self, momenta, surprise, gates)
        moved = rule_module.summed(gates["momentum"][0] * rule_module.summed(momenta[0] + surprise))
        return moved, (moved, *momenta[1:])

    equations_become(patcher, "move", change)


@mutant("paper, one chunk a batch", "plain", "rich", "general")
def momentum_is_dropped_between_blocks(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Carry, after: Any) -> Carry:
        carry = original(self, after)
        return carry._replace(momenta={name: tuple(m * 0 for m in each) for name, each in carry.momenta.items()})

    wrapped(patcher, Carry, "with_memories", change)


@mutant("rich")
def the_closed_form_hands_higher_orders_down(patcher: pytest.MonkeyPatch) -> None:
    """Instead of lower ones up."""

    def change(original: Any, self: Titans, gates: Gates) -> Any:
        found = original(self, gates)
        return found._replace(last_past=found.last_past.transpose(0, 1))

    wrapped(patcher, Titans, "coefficients", change)


@mutant("rich, one chunk a batch", "rich")
def a_chunk_without_anything_to_store_moves_the_memory(patcher: pytest.MonkeyPatch) -> None:
    """It hands what moves on to the weights."""

    def change(original: Any, *args: Any) -> Any:
        return original(*args).map(lambda gates: gates._replace(is_stored=None))

    wrapped(patcher, gates_module.GateLayers, "gates", change)


@mutant("spectral")
def steps_are_made_orthogonal_before_momentum(patcher: pytest.MonkeyPatch) -> None:
    """Each surprise in place of what they add up to."""

    def change(original: Any, rule: Any, memory: Any, surprise: Any, coefficients: Any) -> Any:
        found = dense.built(surprise, memory.weights.dtype)
        found = orthogonalised(found) if found.ndim == 4 else found
        return original(rule.rule, memory, found, coefficients)

    wrapped(patcher, dense, "by_coefficients", change)


@mutant("spectral, equal blocks")
def blocks_take_the_coefficients_of_the_block_before(patcher: pytest.MonkeyPatch) -> None:
    """Of those that are worked out for all equal blocks at once."""

    def change(original: Any, self: Any, num: int) -> Any:
        found = original(self, num)
        return [found[max(block - 1, 0)] for block in range(num)]

    wrapped(patcher, rule_module.Coefficients, "blocks", change)


def without_the_last(original: Any, *args: Any) -> Any:
    """One of the two gradients in sums, of what all of them are used for and of what is carried on, is dropped."""
    *of_all, gradient, _ = args
    return torch.zeros_like(original(*args)) if gradient is None else original(*of_all, gradient, None)


@mutant("spectral, equal blocks")
def steps_have_no_gradient_from_what_is_carried_on(patcher: pytest.MonkeyPatch) -> None:
    """Into the next block, by the last sum."""
    wrapped(patcher, sums, "gradient_of_steps", without_the_last)


@mutant("spectral, equal blocks")
def shares_have_no_gradient_from_what_is_carried_on(patcher: pytest.MonkeyPatch) -> None:
    """Into the next block, by the last sum."""
    wrapped(patcher, sums, "gradient_of_share", without_the_last)


@mutant("spectral, equal blocks")
def a_factor_of_a_surprise_has_the_gradient_of_the_other_sign(patcher: pytest.MonkeyPatch) -> None:
    """On the way back, where the two are multiplied again."""

    def change(original: Any, *args: Any) -> Any:
        left, *right = original(*args)
        return [left, *(-each for each in right)]

    wrapped(patcher, sums, "gradients_of_factors", change)


@mutant("towards the start", "towards the start, solved")
def the_start_counts_whole(patcher: pytest.MonkeyPatch) -> None:
    """1 in place of 1 - keep, in the closed form"""

    def change(original: Any, self: DecayToStart, gates: Gates) -> Any:
        found = original(self, gates)
        return found._replace(start=torch.ones_like(found.start))

    wrapped(patcher, DecayToStart, "coefficients", change)


@mutant("towards the start, solved")
def the_start_is_not_handed_on(patcher: pytest.MonkeyPatch) -> None:
    """From block to block of those that are solved for."""

    def change(original: Any, shares: Any, num_blocks: int) -> Tensor:
        mix = original(shares, num_blocks).clone()
        mix[..., 0, -1] = 0.0
        return mix

    wrapped(patcher, solved, "slots_of", change)
