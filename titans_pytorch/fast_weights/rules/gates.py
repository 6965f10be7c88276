"""The values of a rule's gates: for all chunks of a block at once, or for one chunk of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.scale import Scale, along

KEEP = "keep"
"""The gate that multiplies old weights; every memory has one, of constant 1 where a rule asks for none"""


class ChunkGates:
    """The gates of one chunk, as factors of a rule's equations: `gates.keep * weights`, `gates["momentum"][0] * m`."""

    def __init__(self, values: dict[str, list[Any]], is_stored: Tensor | None) -> None:
        self.values, self.is_stored = values, is_stored

    @property
    def keep(self) -> Any:
        """What multiplies old weights: 1 minus what is forgotten."""
        return self.values[KEEP][0]

    def __getitem__(self, name: str) -> list[Any]:
        """As many as the rule has asked for; none where it has asked for none."""
        return self.values.get(name, [])

    def stored(self, new: Tensor, old: Tensor | float) -> Tensor:
        """What is there after the chunk: the new if it stores anything, else the old.  (r ...)"""
        if self.is_stored is None:
            return new
        return torch.where(self.is_stored.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def acting_on(self, x: Tensor) -> ChunkGates:
        """Fit to multiply tensors shaped like x: while compiling plain tensors, as the compiler fuses for itself."""
        if not torch.compiler.is_compiling():
            return self
        values = {name: [along(scale.value, x) for scale in scales] for name, scales in self.values.items()}
        return ChunkGates(values, self.is_stored)


class Gates(NamedTuple):
    """The gates of a block's chunks, for one parameter of the memory.

    Factors are kept as logarithms, so that products of many stay exact. Where nothing is stored their logarithm is 0.
    A chunk that is not finite has a NaN in the logarithm of `keep`: so the weights after it are NaN, and none before.
    """

    factors: dict[str, Tensor]  # name -> logarithms (o r n), of channels (o r j n)
    shares: dict[str, Tensor]  # name -> (p r n), of what is new
    is_stored: Tensor | None  # (r n) bool: chunks with something to store; None: all

    @property
    def num_chunks(self) -> int:
        return self.factors[KEEP].shape[-1]

    @property
    def channels(self) -> int | None:
        """How many entries a weight's last axis has, where each has gates of its own."""
        keep = self.factors[KEEP]
        return keep.shape[-2] if keep.ndim == 4 else None

    @property
    def like(self) -> Tensor:
        """A tensor (r n) of their dtype and device."""
        keep = self.factors[KEEP][0]
        return keep if keep.ndim == 2 else keep[:, 0]

    def select(self, chunks: slice) -> Gates:
        factors = {name: value[..., chunks] for name, value in self.factors.items()}
        shares = {name: value[..., chunks] for name, value in self.shares.items()}
        return Gates(factors, shares, None if self.is_stored is None else self.is_stored[:, chunks])

    def blocks(self, num: int) -> Gates:
        """So many equal blocks, as if each had rows of its own.  (... r bn) -> (... b·r n)"""

        def folded(x: Tensor, axis: int) -> Tensor:
            split = x.unflatten(-1, (num, -1)).movedim(-2, axis)
            return split.flatten(axis, axis + 1)

        factors = {name: folded(value, 1) for name, value in self.factors.items()}
        shares = {name: folded(value, 1) for name, value in self.shares.items()}
        return Gates(factors, shares, None if self.is_stored is None else folded(self.is_stored, 0))

    def of_chunk(self, chunk: int) -> ChunkGates:
        values = {name: [Scale(log) for log in logs[..., chunk].exp()] for name, logs in self.factors.items()}
        values |= {name: [Scale(share) for share in shares[..., chunk]] for name, shares in self.shares.items()}
        return ChunkGates(values, None if self.is_stored is None else self.is_stored[:, chunk])

    def left_of(self, weight: Tensor) -> Tensor:
        """What is left of a weight after the forgetting of the only chunk.  (r ...) -> (r ...)"""
        scale: Tensor = self.of_chunk(0).keep.value
        return weight * along(scale, weight)

    def products(self, name: str) -> list[Tensor]:
        """What each of these gates leaves after chunk j (row) of what was there at the start or came in chunk i.

        (... n+1 n+1), column 0 for the start; what comes in a chunk without anything to store is not counted.
        """
        if name not in self.factors:
            return []
        found = [products(logs) for logs in self.factors[name]]
        if self.is_stored is None:
            return found
        counts = torch.nn.functional.pad(self.is_stored, (1, 0), value=True).unsqueeze(-2)
        return [table * (counts if table.ndim == 3 else counts.unsqueeze(1)) for table in found]


def products(log_gates: Tensor) -> Tensor:
    """All products of consecutive gates.  (... n) -> (... n+1 n+1), [j, i] = prod_{k=i+1..j} gate_k, 0 above

    Every sum of logarithms is taken by itself: differences of one long cumulative sum would lose digits, quotients of
    products would divide by zero.
    """
    n = log_gates.shape[-1]
    rows = log_gates.new_zeros(*log_gates.shape[:-1], 1)
    logs = torch.cat((rows, log_gates), dim=-1).unsqueeze(-1).expand(*log_gates.shape[:-1], n + 1, n + 1)
    return logs.tril(-1).cumsum(dim=-2).exp().tril()
