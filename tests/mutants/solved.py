"""Mutants of renewals that are solved for, and of what is handed from block to block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, wrapped
from titans_pytorch.fast_weights import layerwise
from titans_pytorch.fast_weights.layerwise import LayerwiseMLP
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.solved import blocks
from titans_pytorch.fast_weights.solved.blocks import SolvedWrites
from titans_pytorch.fast_weights.solved.chain import Chain, Links

ALL = ("solved", "solved, two orders")


def systems_become(patcher: pytest.MonkeyPatch, change: Any) -> None:
    """The triangular system is another."""

    def solve(original: Any, system: Tensor, known: Tensor, **options: Any) -> Tensor:
        return original(change(system), known, **options)

    wrapped(patcher, torch.linalg, "solve_triangular", solve)


def shares_before_become(patcher: pytest.MonkeyPatch, change: Any) -> None:
    """What a write sees of those before it is something else, while blocks are read as they are."""

    def links(original: Any, written: SolvedWrites, shares: Any, seen: Any, num_blocks: int) -> Links:
        return original(written, shares, change(seen), num_blocks)

    wrapped(patcher, blocks, "links_of", links)


@mutant(*ALL)
def writes_climb_on_each_other(patcher: pytest.MonkeyPatch) -> None:
    systems_become(patcher, lambda system: -system)


@mutant(*ALL)
def writes_do_not_see_each_other(patcher: pytest.MonkeyPatch) -> None:
    systems_become(patcher, torch.zeros_like)


@mutant(*ALL)
def a_write_does_not_see_the_one_before_it(patcher: pytest.MonkeyPatch) -> None:
    """The triangle begins a chunk too low."""
    systems_become(patcher, lambda system: system.tril(-2) * (system.cumsum(1) != system))


@mutant("solved, two orders")
def a_write_sees_its_own_chunk(patcher: pytest.MonkeyPatch) -> None:
    """The triangle is one of writes, not of chunks."""

    def change(shares: Any) -> Any:
        after = shares.surprise.clone()
        after[:, :-1] = shares.surprise[:, 1:]
        return shares._replace(surprise=after)

    shares_before_become(patcher, change)


@mutant(*ALL)
def step_sizes_are_those_of_who_looks(patcher: pytest.MonkeyPatch) -> None:
    """(s K) K^T in place of K (s K)^T"""

    def change(original: Any, a: Tensor, b: Tensor) -> Tensor:
        is_system = a.shape == b.mT.shape and a.shape[1] == b.shape[2] and a.shape[1] != a.shape[2]
        return original(b.mT, a.mT) if is_system else original(a, b)

    def links(original: Any, *args: Any) -> Links:
        with pytest.MonkeyPatch.context() as inside:
            wrapped(inside, torch, "bmm", change)
            return original(*args)

    wrapped(patcher, blocks, "links_of", links)


@mutant(*ALL)
def what_a_block_begins_with_is_not_forgotten(patcher: pytest.MonkeyPatch) -> None:
    shares_before_become(patcher, lambda shares: shares._replace(initial=torch.ones_like(shares.initial)))


@mutant("solved")
def a_write_sees_no_momentum_from_before_its_block(patcher: pytest.MonkeyPatch) -> None:
    shares_before_become(patcher, lambda shares: shares._replace(past=torch.zeros_like(shares.past)))


@mutant(*ALL)
def writes_see_each_other_without_momentum(patcher: pytest.MonkeyPatch) -> None:
    """By forgetting alone."""

    def change(shares: Any) -> Any:
        return shares._replace(surprise=shares.surprise.sign() * shares.initial[:, -1:, None])

    shares_before_become(patcher, change)


@mutant(*ALL)
def a_block_hands_on_what_its_writes_would_without_steps(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, written: SolvedWrites, *args: Any) -> Links:
        found = original(written, *args)
        return found._replace(handed=found.handed / written.steps.mean())

    wrapped(patcher, blocks, "links_of", change)


@mutant("solved")
def momenta_do_not_reach_the_next_block(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, links: Links, start: Tensor) -> Any:
        mix = links.mix.clone()
        mix[..., 0, 1] = 0
        return original(links._replace(mix=mix), start)

    wrapped(patcher, blocks, "chained", change)


@mutant("solved")
def blocks_do_not_wait_for_each_other_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, ctx: Any, of_differences: Any, of_starts: Any, of_end: Any) -> Any:
        return original(ctx, of_differences, torch.zeros_like(of_starts), of_end)

    wrapped(patcher, Chain, "backward", change)


@mutant("solved")
def what_a_block_begins_with_has_no_part_in_differences_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, ctx: Any, *bars: Any) -> Any:
        found = original(ctx, *bars)
        return found[0], torch.zeros_like(found[1]), *found[2:]

    wrapped(patcher, Chain, "backward", change)


@mutant("solved")
def slots_are_mixed_the_wrong_way_round(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, blocks, "slots_of", lambda original, *args: original(*args).mT)


@mutant("gated delta")
def what_is_surprising_is_so_before_forgetting(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(blocks, "after_forgetting", lambda shares, gates: shares)


@mutant("gated delta")
def the_forgetting_is_that_of_the_chunk_before(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, shares: Any, gates: Any) -> Any:
        factors = {name: log.roll(1, -1) for name, log in gates.factors.items()}
        return original(shares, gates._replace(factors=factors))

    wrapped(patcher, blocks, "after_forgetting", change)


@mutant("gated delta, chunk by chunk")
def a_single_chunk_is_surprised_before_forgetting(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Gates, "left_of", lambda original, self, weight: weight)


@mutant("layerwise")
def keys_of_later_layers_have_no_gradient(patcher: pytest.MonkeyPatch) -> None:
    """So that nothing outside asks the layer before for anything."""
    wrapped(patcher, blocks, "hidden_keys", lambda original, answers: original(answers.detach()))


@mutant("layerwise", "layerwise, chunk by chunk")
def later_layers_are_given_what_was_answered_bare(patcher: pytest.MonkeyPatch) -> None:
    for owner in (blocks, layerwise):
        patcher.setattr(owner, "hidden_keys", lambda answers: answers)


@mutant("layerwise")
def all_layers_step_as_the_first(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, model: Any, writes: Any, name: str, num_blocks: int) -> Tensor:
        return original(model, writes, model.matrices[0], num_blocks)

    wrapped(patcher, blocks, "steps_of", change)


@mutant("layerwise, chunk by chunk")
def errors_are_those_of_the_last_layer(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: LayerwiseMLP, *args: Any) -> Any:
        found, loss = original(self, *args)
        error = found.factors[self.matrices[-1]].right
        factors = {name: each._replace(right=error) for name, each in found.factors.items()}
        return found._replace(factors=factors), loss

    wrapped(patcher, LayerwiseMLP, "gradients", change)
