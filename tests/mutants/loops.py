"""Mutants of the loop over renewals and of its gradient, which is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, wrapped
from titans_pytorch.fast_weights.loop import by_equations, by_shares, by_table, limits, loop, mlp, storing
from titans_pytorch.fast_weights.loop.by_equations import ByEquations, Momenta
from titans_pytorch.fast_weights.loop.by_shares import ByShares
from titans_pytorch.fast_weights.loop.by_table import ByTable
from titans_pytorch.fast_weights.loop.equations import Source
from titans_pytorch.fast_weights.loop.evolution import Others
from titans_pytorch.fast_weights.loop.loop import Loop
from titans_pytorch.fast_weights.loop.mlp import MLPSurprise
from titans_pytorch.fast_weights.loop.reading import ReadBars
from titans_pytorch.fast_weights.loop.storing import SeriesStore

ALL = ("loop", "loop of two", "loop of shares")


@mutant(*ALL)
def bases_are_stale(patcher: pytest.MonkeyPatch) -> None:
    """Every renewal is surprised where the one before it was."""
    wrapped(patcher, Loop, "base", lambda original, self, n: original(self, max(n - 1, 0)))


@mutant(*ALL)
def bases_are_stale_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Loop, *args: Any) -> Any:
        base = self.base
        self.base = lambda n: base(max(n - 1, 0))  # type: ignore[method-assign]
        try:
            return original(self, *args)
        finally:
            self.base = base  # type: ignore[method-assign]

    wrapped(patcher, Loop, "surprise_backward", change)


@mutant("loop", "loop of shares")
def the_bend_of_the_norm_is_dropped(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        return [(torch.zeros_like(mean), pair) for mean, pair in original(*args)]

    wrapped(patcher, mlp, "bends", change)


@mutant("loop", "loop of shares")
def the_two_sums_of_the_norm_change_places(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, mlp, "bends", lambda original, *args: [(mean, pair.flip(2)) for mean, pair in original(*args)])


@mutant(*ALL)
def gelu_has_no_second_derivative(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = original(z)
        return first, second * 0

    wrapped(patcher, mlp, "gelu_derivatives", change)


@mutant(*ALL)
def gelu_bends_the_other_way(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = original(z)
        return first, -second

    wrapped(patcher, mlp, "gelu_derivatives", change)


@mutant(*ALL)
def weights_are_thought_to_act_on_the_way_there_alone(patcher: pytest.MonkeyPatch) -> None:
    """The gradient of a base through the errors, which are products with it too, is dropped."""

    def change(original: Any, self: MLPSurprise, n: int, base: Any, *args: Any) -> Any:
        *args, add = args  # type: ignore[assignment]
        errors = [each[n] for each in self.errors]

        def without(layer: int, a: Tensor, b: Tensor) -> None:
            if not any(b is error for error in errors):
                add(layer, a, b)

        return original(self, n, base, *args, without)

    wrapped(patcher, MLPSurprise, "backward", change)


@mutant(*ALL)
def the_loss_asks_for_nothing(patcher: pytest.MonkeyPatch) -> None:
    """What was predicted has no gradient from whoever looks at the losses."""
    patcher.setattr(MLPSurprise, "plus_error_bar", lambda self, n, bar: bar)


@mutant(*ALL)
def readers_ask_for_nothing(patcher: pytest.MonkeyPatch) -> None:
    for of_some in ("of_renewal", "of_block"):
        wrapped(patcher, Others, of_some, lambda original, *args: torch.zeros_like(original(*args)))


@mutant("loop", "loop of two")
def gates_multiply_what_comes_after(patcher: pytest.MonkeyPatch) -> None:
    """Their gradients are products with weights and momenta a renewal too late."""

    def change(original: Any, self: ByEquations, source: Source, n: int) -> list[Tensor]:
        return original(self, source, (n + 1) % len(self.left))

    wrapped(patcher, ByEquations, "values_of", change)


@mutant("loop of two")
def momenta_inside_of_a_renewal_are_those_of_the_one_after_it(patcher: pytest.MonkeyPatch) -> None:
    """They are not worked out again on the way back."""

    def change(original: Any, self: ByEquations, n: int, left: Tensor) -> None:
        original(self, min(n + 1, len(self.left) - 1), left)

    wrapped(patcher, ByEquations, "go_again", change)


@mutant("loop of two")
def momenta_inside_of_a_renewal_do_not_hear_of_weights(patcher: pytest.MonkeyPatch) -> None:
    """A part of their gradients is dropped."""

    def change(original: Any, self: ByEquations, block: int) -> None:
        takers, self.takers = self.takers, [[] for _ in self.takers]
        original(self, block)
        self.takers = takers

    wrapped(patcher, ByEquations, "start_of", change)


@mutant("loop", "loop of two")
def momenta_have_no_past_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: ByEquations, block: int) -> None:
        self.to_start = [self.to_start[0], *([] for _ in self.to_start[1:])]
        original(self, block)

    wrapped(patcher, ByEquations, "start_of", change)


@mutant("loop of shares")
def shares_are_those_of_the_next_block_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: ByShares, *args: Any) -> None:
        original(self, *args)
        self.shares = self.shares[1:] + self.shares[:1]

    wrapped(patcher, ByShares, "begin_backward", change)


@mutant("loop of shares")
def weights_do_not_hand_on_to_momenta(patcher: pytest.MonkeyPatch) -> None:
    """A momentum's gradient by way of the weights is dropped."""

    def change(original: Any, self: ByShares, *args: Any) -> None:
        original(self, *args)
        self.crossed = []

    wrapped(patcher, ByShares, "begin_backward", change)


@mutant("loop", "loop of two")
def the_table_of_a_gain_is_used_once(patcher: pytest.MonkeyPatch) -> None:
    """The gradient of a gain does not pass from one renewal to the one before."""

    def change(original: Any, self: ByTable, n: int) -> tuple[Tensor, Tensor]:
        before = self.head_bars[n].clone()
        found = original(self, n)
        self.head_bars[n].copy_(before)
        return found  # type: ignore[no-any-return]

    wrapped(patcher, ByTable, "factor_bars", change)


@mutant("grown loop")
def a_limited_base_is_free_to_grow_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, bars: Any, weights: Any, limit: Tensor, *args: Any) -> Tensor:
        return torch.zeros_like(limit)

    patcher.setattr(loop, "growth_backward", lambda *args: change(limits.growth_backward, *args))


@mutant("grown loop")
def the_loop_limits_no_growth(patcher: pytest.MonkeyPatch) -> None:
    def change(weights: Any, limit: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(limit), torch.zeros_like(limit)

    patcher.setattr(loop, "limit_growth", change)


@mutant("loop", "loop of two")
def the_first_place_keeps_what_it_began_with(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(ByEquations, "start_again", lambda self: None)


@mutant("loop of two")
def blocks_inside_a_renewal_trade_what_is_read(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, loop, "read", lambda original, queries, *args: original(queries.roll(1, dims=2), *args))


def reading_goes_back_by(patcher: pytest.MonkeyPatch, change: Callable[[ReadBars], ReadBars]) -> None:
    wrapped(patcher, loop, "read_backward", lambda original, *args: change(original(*args)))


@mutant("loop", "loop of two")
def what_is_read_does_not_hear_of_queries(patcher: pytest.MonkeyPatch) -> None:
    reading_goes_back_by(patcher, lambda bars: bars._replace(queries=torch.zeros_like(bars.queries)))


@mutant("loop", "loop of two")
def what_is_read_moves_the_gain_the_other_way(patcher: pytest.MonkeyPatch) -> None:
    reading_goes_back_by(patcher, lambda bars: bars._replace(gain=None if bars.gain is None else -bars.gain))


@mutant("loop", "loop of two")
def what_is_read_moves_matrices_of_the_renewal_before(patcher: pytest.MonkeyPatch) -> None:
    def late(bars: ReadBars) -> ReadBars:
        return bars._replace(products=[(left, right.roll(1, dims=0)) for left, right in bars.products])

    reading_goes_back_by(patcher, late)


@mutant("loop of two")
def what_is_read_moves_matrices_of_the_other_block(patcher: pytest.MonkeyPatch) -> None:
    def crossed(bars: ReadBars) -> ReadBars:
        return bars._replace(products=[(left.flip(1), right) for left, right in bars.products])

    reading_goes_back_by(patcher, crossed)


@mutant("loop cut in a batch")
def an_unfinished_batch_is_surprised_at_the_first_base(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: SeriesStore, carry: Any, results: Any, shape: Any, is_last: Any) -> Any:
        after = original(self, carry, results, shape, is_last)
        return after if shape.renews_last else after._replace(base=carry.base)

    wrapped(patcher, storing.SeriesStore, "carry_after", change)


@mutant("loop", "loop of two")
def equations_forget_the_momentum(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, equation: Any) -> Any:
        plain, gated = original(equation)
        return plain, [(gate, source) for gate, source in gated if not (source.kind == "old" and source.number == 1)]

    wrapped(patcher, by_equations, "sorted_terms", change)


@mutant("loop of shares")
def scaled_factors_are_those_of_the_first_slot(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: ByShares, block: int) -> Tensor:
        found = original(self, block).unflatten(2, (self.num_slots, -1))
        return found[:, :, :1].expand_as(found).flatten(2)

    wrapped(patcher, by_shares.ByShares, "scaled_left", change)


@mutant("loop of two")
def a_gain_between_blocks_is_that_of_the_renewal(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: ByTable, *args: Any) -> Tensor:
        found = original(self, *args)
        return found[:, :, :1].expand_as(found)  # type: ignore[no-any-return]

    wrapped(patcher, by_table.ByTable, "weights_of", change)


@mutant("gated loop")
def the_base_goes_all_the_way(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(loop, "approach", lambda *args: None)


@mutant("gated loop")
def the_old_base_is_forgotten_on_the_way_back(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        of_bases, of_share = original(*args)
        return [torch.zeros_like(bar) for bar in of_bases], of_share

    wrapped(patcher, loop, "approach_backward", change)


@mutant("gated loop")
def nobody_asks_how_far_the_base_went(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, *args: Any) -> Any:
        of_bases, of_share = original(*args)
        return of_bases, of_share * 0

    wrapped(patcher, loop, "approach_backward", change)


@mutant("paper", "paper, one chunk a batch")
def parameters_take_all_of_every_surprise(patcher: pytest.MonkeyPatch) -> None:
    """Whatever their own step sizes say."""
    wrapped(patcher, ByEquations, "taken_left", lambda original, self, n: self.left[n])


@mutant("paper", "paper, one chunk a batch")
def gates_of_channels_get_the_gradient_of_all(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: ByEquations, n: int) -> None:
        original(self, n)
        found = self.found[-1]
        self.found[-1] = [None if bar is None else bar.mean(dim=-1, keepdim=True).expand_as(bar) for bar in found]

    wrapped(patcher, ByEquations, "add_gate_bars", change)


@mutant(*ALL[:2])
def what_comes_out_without_gradients_is_what_came_in(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Loop, pack: int) -> Any:
        given = self.inputs.states[pack]
        before = given.clone()
        return given.copy_(before) if (found := original(self, pack)) is given else found

    wrapped(patcher, Loop, "last", change)


@mutant(*ALL[:2])
def without_gradients_momenta_stay_as_they_came(patcher: pytest.MonkeyPatch) -> None:
    """They move in a tensor of their own, which nobody looks at."""

    def change(original: Any, *args: Any) -> Any:
        kept = original(*args)
        return kept._replace(
            momenta=[Momenta(*(part if part is None else part.clone() for part in m)) for m in kept.momenta]
        )

    wrapped(patcher, loop, "begin", change)
