"""The family's tests object: each rule of the four models is broken on purpose, and a comparison or a cut notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.reference import Reference
from tests.support.titans_configurations import build, build_backbone, random_ids, random_inputs
from tests.test_titans import in_pieces
from titans_pytorch import NeuralMemory
from titans_pytorch.attention import windowed
from titans_pytorch.titans import gate
from titans_pytorch.titans.mixers import mac, mag, mal, mixer

TOKENS = 9


def equals_its_equations(variant: str) -> bool:
    model = build_backbone(variant, depth=1)
    x = random_inputs(1, TOKENS)
    reference = Reference(variant, model.config, dict(model.named_parameters()))(x)
    return torch.allclose(model(x)[0], reference, rtol=1e-9, atol=1e-9)


def streams(variant: str) -> bool:
    model, ids = build(variant, depth=1), random_ids(1, 2 * TOKENS)
    with torch.no_grad():
        return torch.allclose(in_pieces(model, ids, (3, 1, 7, 7))[0], model(ids)[0], rtol=1e-9, atol=1e-9)


Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[Patch, str, Callable[[str], bool]]] = {}


def mutant(variant: str, notices: Callable[[str], bool]) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__.replace("_", " ")] = (patch, variant, notices)
        return patch

    return register


def wrapped(patcher: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    patcher.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


@mutant("mac", equals_its_equations)
def what_was_read_for_later_tokens_is_seen(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, num_queries: int, num_tokens: int, num_persistent: int, *args: Any) -> Any:
        mask = original(num_queries, num_tokens, num_persistent, *args).clone()
        mask[:, num_persistent : num_persistent + num_tokens] = True
        return mask

    wrapped(patcher, mac, "context_mask", change)


@mutant("mac", equals_its_equations)
def the_context_is_read_from_the_current_memory(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Any, start: int, state: Any) -> Any:
        segment = state.segment._replace(before=self.memory.init_weights(len(x)))
        return original(self, x, start, state._replace(segment=segment))

    wrapped(patcher, mac.MemoryAsContext, "in_segment", change)


@mutant("mac", equals_its_equations)
def the_gate_reads_after_the_whole_segment(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Any, start: int, state: Any) -> Any:
        memory = self.memory

        def late(y: Any, state: Any) -> Any:
            _, state = memory(y, state=state)
            return memory.retrieve_memories(y, state.states[0]), state

        self.__dict__["memory"] = late
        late.ask = memory.ask  # type: ignore[attr-defined]
        try:
            return original(self, x, start, state)
        finally:
            del self.__dict__["memory"]

    wrapped(patcher, mac.MemoryAsContext, "in_segment", change)


@mutant("mac", streams)
def the_memory_before_the_segment_is_forgotten(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Any, start: int, state: Any) -> Any:
        if state is not None:
            state = state._replace(segment=state.segment._replace(before=state.memory.states[0]))
        return original(self, x, start, state)

    wrapped(patcher, mac.MemoryAsContext, "forward", change)


@mutant("mac", streams)
def queries_forget_the_tokens_before(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, NeuralMemory, "ask", lambda original, self, x, weights, tail: original(self, x, weights))


@mutant("mag", streams)
def the_memory_is_not_carried(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Any, start: int, state: Any) -> Any:
        return original(self, x, start, None if state is None else state._replace(memory=self.begin(x).memory))

    wrapped(patcher, mag.MemoryAsGate, "forward", change)


@mutant("mal", streams)
def the_window_is_not_carried(patcher: pytest.MonkeyPatch) -> None:
    def change(original: Any, self: Any, x: Any, start: int, state: Any) -> Any:
        return original(self, x, start, None if state is None else state._replace(recent=None))

    wrapped(patcher, mal.MemoryAsLayer, "forward", change)


@mutant("mag", equals_its_equations)
def the_window_is_one_token_longer(patcher: pytest.MonkeyPatch) -> None:
    wrapped(
        patcher, windowed, "window_mask", lambda original, i, j, p, window, *rest: original(i, j, p, window + 1, *rest)
    )


@mutant("lmm", equals_its_equations)
def the_memory_does_not_see_persistent_tokens(patcher: pytest.MonkeyPatch) -> None:
    patcher.setattr(mixer.Mixer, "remember", lambda self, first: (first, None))


@mutant("mag", equals_its_equations)
def the_gate_swaps_its_sides(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, gate.Gate, "forward", lambda original, self, y, m: original(self, m, y))


@mutant("mal", equals_its_equations)
def attention_sees_the_input(patcher: pytest.MonkeyPatch) -> None:
    wrapped(patcher, mal.MemoryAsLayer, "normed", lambda original, self, read, x: original(self, x, x))


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_the_family_as_it_is_passes(variant: str) -> None:
    assert equals_its_equations(variant)
    assert streams(variant)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, variant, notices = MUTANTS[name]
    patch(monkeypatch)
    assert not notices(variant)
