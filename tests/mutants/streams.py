"""Mutants of what happens when: masks, batches, reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mutants.breaking import mutant, with_gate, wrapped
from titans_pytorch import neural_memory
from titans_pytorch.fast_weights import renewal
from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.loop.loop import Loop
from titans_pytorch.fast_weights.rules import orthogonal
from titans_pytorch.memory import plan
from titans_pytorch.memory.head_norms import MultiheadRMSNorm
from titans_pytorch.memory.projections import Projections
from titans_pytorch.memory.reading import SpanReader
from titans_pytorch.neural_memory import NeuralMemory

# masks


@mutant("rich", "attention", "general")
def the_mask_is_ignored(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "project_writes",
        lambda original, self, tokens, *args: original(self, tokens._replace(is_stored=None), *args),
    )


@mutant("rich", "general")
def the_mask_is_inverted(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, tokens: Any, *args: Any) -> Any:
        mask = None if tokens.is_stored is None else ~tokens.is_stored
        return original(self, tokens._replace(is_stored=mask), *args)

    wrapped(patcher, Projections, "project_writes", change)


@mutant("rich", "general", "attention")
def masked_chunks_still_decay(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "gates",
        lambda original, self, pooled, poison, is_stored, dtype: original(self, pooled, poison, None, dtype),
    )


@mutant("attention")
def masked_tokens_are_attended(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Projections, *args: Any) -> Any:
        self.compacts_masked = False
        return original(self, *args)

    wrapped(patcher, Projections, "without_masked", change)


# batches


@mutant("plain", "rich")
def the_base_is_never_renewed(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, plan, "batches", lambda original, layout, *args: original(layout._replace(batch=None), *args))


@mutant("rich")
def the_transition_is_not_gated(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: renewal.Renewal, carry: Any) -> Any:
        return original(self._replace(gate=None), carry)

    wrapped(patcher, renewal.Renewal, "__call__", change)


@mutant("grown")
def growth_is_not_limited(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(renewal, "limit_growth", lambda weights, limit: weights)


@mutant("plain", "rich")
def batches_begin_a_chunk_late(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, layout: Any, start: int, end: int) -> Any:
        return [(first + 1, last + 1, renews) for first, last, renews in original(layout, start - 1, end - 1)]

    wrapped(patcher, plan, "batches", change)


# reading


@mutant("plain", "attention")
def reads_come_a_chunk_early(patcher: pytest.MonkeyPatch) -> None:
    """Seeing the weights before the chunk that a token completes."""
    shifted_reads(patcher, -1)


@mutant("plain", "attention")
def reads_come_a_chunk_late(patcher: pytest.MonkeyPatch) -> None:
    """A look into the future of the block."""
    shifted_reads(patcher, 1)


def shifted_reads(patcher: pytest.MonkeyPatch, shift: int) -> None:
    def change(original: Any, self: Engine, block: Any, queries: Tensor, entries: Any, slow: Any) -> Tensor:
        if isinstance(entries, slice):
            entries = torch.arange(entries.start, entries.stop)
        if block.num_chunks:
            entries = (entries + shift).clamp(0, block.num_chunks)
        return original(self, block, queries, entries, slow)

    def in_loops(original: Any, self: Loop, *args: int) -> Any:
        """matrices and a gain, (N r k ...) each"""
        matrices, gain = original(self, *args)
        rolled = [w.movedim(2, 1).flatten(0, 1).roll(-shift, 0).unflatten(0, w.shape[:3:2]) for w in matrices]
        return [w.movedim(1, 2) for w in rolled], gain

    wrapped(patcher, Engine, "read", change)
    wrapped(patcher, Loop, "weights_of", in_loops)


@mutant("read apart")
def reading_chunks_are_storing_chunks(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(
        SpanReader,
        "entries",
        lambda self, plan: (torch.arange(plan.first_group, plan.last_group) - plan.first_chunk).clamp(0),
    )


@mutant("attention")
def the_first_group_begins_with_its_first_query(patcher: pytest.MonkeyPatch) -> None:
    """Not with a zero, which stands for the token before the first one."""

    def change(original: Any, self: SpanReader, like: Tensor) -> Tensor:
        return like[:, :1] if self.group.queries is None else original(self, like)

    wrapped(patcher, SpanReader, "begun", change)


@mutant("rich")
def reads_are_not_normed(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(MultiheadRMSNorm, "forward", lambda self, x: x * (self.gamma + 1))


@mutant("rich")
def heads_are_not_gated(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, Projections, "merge", with_gate(lambda gate: None))


@mutant("plain")
def the_carry_is_dropped_between_calls(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        NeuralMemory,
        "checked_state",
        lambda original, self, state, batch: self.init_state(batch)._replace(
            seq_index=state.seq_index, cache_store_segment=state.cache_store_segment
        ),
    )


@mutant("plain")
def waiting_tokens_are_dropped_between_calls(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: NeuralMemory, state: Any, batch: int) -> Any:
        return state._replace(cache_store_segment=state.cache_store_segment * 0)

    wrapped(patcher, NeuralMemory, "checked_state", change)


@mutant("spectral")
def steps_are_not_orthogonal(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(orthogonal, "orthogonalised", lambda t: t)


@mutant("spectral")
def one_newton_schulz_iteration_less(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(orthogonal, "NUM_ITERATIONS", 4)


@mutant("lookahead and views")
def all_see_the_view_of_the_queries(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher,
        Projections,
        "project_writes",
        lambda original, self, tokens, *args: original(self, tokens._replace(values=tokens.keys), *args),
    )


@mutant("apply then update")
def a_chunk_is_read_by_the_token_that_completes_it(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, neural_memory, "layout_of", lambda original, *args: original(*args[:-1], False))
