"""Rules of the library beside that of Titans, in the words of the oracle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.support.configurations import RuleUnderTest
from tests.support.oracle import Layer, Row, Weights, orthogonalise
from titans_pytorch.fast_weights.rules.atlas import SteppedByLength
from titans_pytorch.fast_weights.rules.decay_to_start import DecayToStart
from titans_pytorch.fast_weights.rules.gated_delta import GatedDelta
from titans_pytorch.fast_weights.rules.lact import LaCT
from titans_pytorch.fast_weights.rules.orthogonal import Orthogonal
from titans_pytorch.fast_weights.rules.retention import KullbackLeibler, QNorm, Retained


class GatedDeltaByTheBook(Layer):
    """The gradient is taken at what is left after forgetting."""

    def store_chunk(
        self, row: Row, head: int, s_k: Tensor, keys: Tensor, values: Tensor, stored: Any, prev: Any
    ) -> None:
        base = row.base
        if any(stored):
            pooled = self.pool(s_k[[t for t in range(len(stored)) if stored[t]]])
            row.base = self.forget(base, pooled, head)
        super().store_chunk(row, head, s_k, keys, values, stored, prev)
        row.base = base


GATED_DELTA = RuleUnderTest(lambda: GatedDelta(1), GatedDeltaByTheBook, orders=1)
"""With momentum"""

GATED_DELTA_RULE = RuleUnderTest(lambda: GatedDelta(0), GatedDeltaByTheBook)
"""Without"""


class DecayToStartByTheBook(Layer):
    """What is forgotten gives way to the learned start."""

    def forget(self, w: Weights, pooled: Tensor, head: int) -> Weights:
        kept, whole = super().forget(w, pooled, head), self.initial(head)
        of_start = super().forget(whole, pooled, head)
        return {name: kept[name] + whole[name] - of_start[name] for name in w}


DECAY_TO_START = RuleUnderTest(lambda: DecayToStart(2), DecayToStartByTheBook, orders=2)


class AtlasByTheBook(Layer):
    """Steps are orthogonal, and as long as a gate of the chunk says."""

    def step(self, row: Row, u: Weights, pooled: Tensor, head: int) -> Weights:
        length = self.of_head("to_step_length.0", pooled, head).sigmoid()
        found = {name: orthogonalise(s) for name, s in super().step(row, u, pooled, head).items()}
        return {name: length[i if len(length) > 1 else 0] * s for i, (name, s) in enumerate(found.items())}


ATLAS = RuleUnderTest(lambda: Orthogonal(SteppedByLength(1, window=3)), AtlasByTheBook, orders=1, window=3)
GATED_DELTA_WINDOW = RuleUnderTest(lambda: GatedDelta(1, window=2), GatedDeltaByTheBook, orders=1, window=2)
DECAY_TO_START_WINDOW = RuleUnderTest(lambda: DecayToStart(2, window=3), DecayToStartByTheBook, orders=2, window=3)


class MonetaByTheBook(Layer):
    """A is moved, W = A / |A|^2 with the 4-norm of all entries; of a W, A is W / |W|^2.  Matrices alone."""

    def after(self, w: Weights, steps: Weights, pooled: Tensor, head: int) -> Weights:
        def over_its_square(x: Tensor) -> Tensor:
            return x / (x**4).sum().sqrt() if x.ndim == 2 else x

        a = super().after({name: over_its_square(x) for name, x in w.items()}, steps, pooled, head)
        return {name: over_its_square(x) for name, x in a.items()}


class MemoraByTheBook(Layer):
    """W = softmax((1 - alpha) log W + S) of every column, times the root of its length."""

    def initial(self, head: int) -> Weights:
        return {
            name: (w * len(w) ** 0.5).softmax(dim=0) * len(w) ** 0.5 if w.ndim == 2 else w
            for name, w in super().initial(head).items()
        }

    def after(self, w: Weights, steps: Weights, pooled: Tensor, head: int) -> Weights:
        logs = {name: x.log() if x.ndim == 2 else x for name, x in w.items()}
        moved = super().after(logs, steps, pooled, head)
        return {name: len(x) ** 0.5 * x.exp() / x.exp().sum(dim=0) if x.ndim == 2 else x for name, x in moved.items()}


MONETA = RuleUnderTest(lambda: Retained(QNorm(4.0), 0), MonetaByTheBook)
MEMORA = RuleUnderTest(lambda: Retained(KullbackLeibler(), 0), MemoraByTheBook)
MEMORA_MOVING = RuleUnderTest(lambda: Retained(KullbackLeibler(), 2, window=2), MemoraByTheBook, orders=2, window=2)


class LaCTByTheBook(Layer):
    """Nothing is forgotten; after a step, what every output sums over is as long as in the start."""

    def forget(self, w: Weights, pooled: Tensor, head: int) -> Weights:
        return w

    def store_chunk(
        self, row: Row, head: int, s_k: Tensor, keys: Tensor, values: Tensor, stored: Any, prev: Any
    ) -> None:
        super().store_chunk(row, head, s_k, keys, values, stored, prev)
        if not any(stored):
            return
        normed = {}
        for name, w in row.current.items():
            start = self.initial(head)[name]
            normed[name] = w if w.ndim < 2 else w * (start.norm(dim=0) / w.norm(dim=0))
        row.current = normed


class OrthogonalLaCTByTheBook(LaCTByTheBook):
    """The same with steps by Newton-Schulz."""

    def step(self, row: Row, u: Weights, pooled: Tensor, head: int) -> Weights:
        return {name: orthogonalise(s) for name, s in super().step(row, u, pooled, head).items()}


LACT = RuleUnderTest(lambda: LaCT(True), LaCTByTheBook, orders=1)
LACT_WITHOUT_MOMENTUM = RuleUnderTest(lambda: LaCT(False), LaCTByTheBook)
LACT_ORTHOGONAL = RuleUnderTest(lambda: Orthogonal(LaCT(True)), OrthogonalLaCTByTheBook, orders=1)
