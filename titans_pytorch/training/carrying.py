"""States that are carried over segments of one document, in training and in validation.

With `--carry k` steps go in groups of k: the first reads the beginning of a stretch of a document, the next ones go on
where it ended, with the state that it left, cut from its graph. Groups begin without a state. Checkpoints,
validations and the end fall on the ends of groups, so that no state has to be kept: a resumed run is the uninterrupted
one, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_pytorch.memory.rows import detached
from titans_pytorch.training.data import Corpus, rows
from titans_pytorch.training.text import Ids


@dataclass
class Carrying:
    """The states of the micro-batches of one process, from step to step.

    carry: steps of a group; 1: nothing is carried
    """

    carry: int
    states: dict[int, Any] = field(default_factory=dict)

    def is_border(self, step: int) -> bool:
        """Whether a group ends with this step, counted from 1."""
        return step % self.carry == 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps is due at the end of a group."""
        return every > 0 and self.is_border(step) and step // every > (step - self.carry) // every

    def loss(self, model: Callable[..., Any], ids: Tensor, step: int, micro: int) -> Tensor:
        """The loss of a micro-batch, after what came before it in its group.  step: from 0"""
        if self.carry == 1:
            alone: Tensor = model(ids)
            return alone
        before = None if step % self.carry == 0 else self.states[micro]
        loss: Tensor
        loss, after = model(ids, state=before, carries=True)
        self.states[micro] = None if self.is_border(step + 1) else detached(after)
        return loss


def losses_over_segments(model: Callable[..., Any], ids: Tensor, carry: int) -> Tensor:
    """Read each sequence in so many segments.  ids: (b n) -> the loss of each token but the first (b n-1)"""
    if carry == 1:
        whole: Tensor = model(ids, per_token=True)
        return whole
    length, state, found = (ids.shape[1] - 1) // carry, None, []
    for first in range(0, carry * length, length):
        losses, state = model(ids[:, first : first + length + 1], per_token=True, state=state, carries=True)
        found.append(losses)
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class Stretches:
    """Where stretches of so many tokens can begin, so that each stays inside one document."""

    firsts: NDArray[np.int64]  # of every document that is long enough
    totals: NDArray[np.int64]  # beginnings in it and all before it

    @classmethod
    def of(cls, text: Ids, starts: NDArray[np.int64] | None, length: int) -> Stretches:
        """starts: where documents begin; None: all is one"""
        firsts = np.zeros(1, dtype=np.int64) if starts is None else starts
        counts = np.diff(np.append(firsts, len(text))) - length + 1
        return cls(firsts[counts > 0], counts[counts > 0].cumsum())

    @property
    def count(self) -> int:
        return int(self.totals[-1]) if len(self.totals) else 0

    def begin(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first tokens of stretches by their numbers, below `count`."""
        which = np.searchsorted(self.totals, numbers, side="right")
        before = np.concatenate([[0], self.totals])[which]
        return self.firsts[which] + numbers - before

    def evenly(self, count: int) -> NDArray[np.int64]:
        """The first tokens of so many stretches, spread over all documents."""
        return self.begin(np.linspace(0, self.count - 1, count).astype(np.int64))


def segment(corpus: Corpus, *, carry: int, seed: int, step: int, index: int, size: int, length: int) -> Tensor:
    """What a step reads of its group's stretches, with a token more.  -> (size length + 1)"""
    group, place = divmod(step, carry)
    stretches = Stretches.of(corpus.train, corpus.train_starts, carry * length + 1)
    numbers = np.random.default_rng([seed, group, index]).integers(0, stretches.count, size=size)
    return rows(corpus.train, stretches.begin(numbers) + place * length, length + 1)
