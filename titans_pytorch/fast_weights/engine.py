"""Which way a memory's weights evolve: chosen once, from what the memory model does and what the options need.

factored   weights are never built                          (models that use their matrices as `x @ W`)
dense      each chunk's weights are built from the factors  (the same models, for options that act on each step)
general    each chunk's gradient and weights are built      (any other model)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.fast_weights.blocks.channels import ChannelBlock
from titans_pytorch.fast_weights.blocks.factored import FactoredBlock, full_precision
from titans_pytorch.fast_weights.blocks.single import SingleBlock
from titans_pytorch.fast_weights.general import OpaqueModel, StillBlock, build
from titans_pytorch.fast_weights.interface import Block, Carry, LossFn, Residual, Rows, Weights, Writes, assigned
from titans_pytorch.fast_weights.probe import ModelTraits
from titans_pytorch.fast_weights.renewal import safe_norm, smooth_limit
from titans_pytorch.fast_weights.rules.recurrence import unroll, unroll_channels
from titans_pytorch.fast_weights.taps import Surprises, TappedModel

EngineName = Literal["factored", "dense", "general"]

# Found by measuring: what starting a block costs in multiplications, and up to which size weights are built at once.
BLOCK_OVERHEAD = 5e8
CARRY_COST = 400
DENSE_BLOCK_ELEMENTS = 2**22
CHANNEL_COST = 400  # of scaling one factor of a write for one group
CHANNEL_CHUNKS = (8, 16)  # fewer in a block are slower than one by one, more need too much memory


class Rules(NamedTuple):
    """What happens to surprises and steps besides momentum and forgetting."""

    max_grad_norm: float | None = None
    is_spectral: bool = False
    use_accelerated_scan: bool = False
    is_channelwise: bool = False  # every channel is forgotten by itself


class Engine:
    """Stores writes into weights and reads queries from them.

    traits: how the memory model uses its matrices, and whether it mixes tokens
    """

    def __init__(self, name: EngineName, model: nn.Module, traits: ModelTraits, loss_fn: LossFn, rules: Rules):
        uses = traits.uses
        if name not in ("factored", "dense", "general"):
            raise ValueError(f"engine must be 'factored', 'dense' or 'general', got {name!r}")
        if name == "factored" and rules.is_spectral:
            raise ValueError("engine 'factored' cannot do spectral_norm_surprises, got both: use 'dense' or 'general'")
        if uses is None and name != "general":
            raise ValueError(
                f"engine {name!r} needs a memory model that uses its matrices as x @ w; got 'general' only"
            )
        self.name, self.rules, self.mixes_tokens = name, rules, traits.mixes_tokens
        self.model = (
            OpaqueModel(model, loss_fn) if name == "general" or uses is None else TappedModel(model, uses, loss_fn)
        )
        self.matrices = [p.shape for p in model.parameters() if p.ndim == 2]
        self.num_channels = sum(p.shape[-1] if p.ndim else 1 for p in model.parameters())
        self.num_elements = sum(p.numel() for p in model.parameters())

    def store(self, carry: Carry, writes: Writes, residual: Residual | None = None) -> tuple[Block, Tensor]:
        """A block of chunks, all surprised at the base.  -> the block, the loss of every write (r n c)"""
        surprises, loss = self.gradients(carry.base, writes, residual)
        surprises = steps_of(surprises, writes, self.rules.max_grad_norm)
        gates = assigned(carry.weights, writes.gates)
        with full_precision(loss):
            if self.name == "factored":
                if writes.num_chunks == 1:
                    return SingleBlock(carry, surprises, gates), loss
                unrolled = [(unroll_channels if self.rules.is_channelwise else unroll)(each) for each in writes.gates]
                kind = ChannelBlock if self.rules.is_channelwise else FactoredBlock
                return kind(carry, surprises, assigned(carry.weights, unrolled)), loss
            return build(carry, surprises, gates, self.rules.is_spectral, self.rules.use_accelerated_scan), loss

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Of each chunk's loss, every parameter's weighted by its own rates if it has some."""
        if len(writes.rates) == 1 or (self.name != "general" and not self.mixes_tokens):
            return self.model.gradients(base, writes, residual)
        total = Surprises({}, {})
        for name, rates in assigned(base, writes.rates).items():
            found, loss = self.model.gradients(base, writes._replace(rates=(rates,)), residual)
            total.factors.update({n: factors for n, factors in found.factors.items() if n == name})
            total.tensors.update({n: tensor for n, tensor in found.tensors.items() if n == name})
        return total, loss

    def at_rest(self, carry: Carry) -> Block:
        return StillBlock(carry)

    def read(self, block: Block, queries: Tensor, rows: Rows, slow: Weights) -> Tensor:
        """queries: (r g k d), rows: the entry of the block that each group reads, slow: (r d) -> (r g k d)"""
        return self.model.read(block, queries, rows, slow)

    def kept_elements(self, writes_per_chunk: int) -> int:
        """About how many numbers autograd keeps of a row's chunk: some of every width, or some of every weight."""
        if self.name == "factored":
            widths = 6 * sum(i + j for i, j in self.matrices)
            scaled = 2 * CHANNEL_CHUNKS[1] * self.num_channels if self.rules.is_channelwise else 0
            return writes_per_chunk * (widths + scaled)
        return 10 * self.num_elements

    def block_elements(self, writes_per_chunk: int) -> int:
        """About how many numbers a block has for a row's chunk."""
        if self.name == "factored":
            return writes_per_chunk * sum(i + j for i, j in self.matrices)
        return self.num_elements

    def block_chunks(self, rows: int, writes_per_chunk: int) -> int:
        """How many chunks make the cheapest block: products over pairs of writes grow with its square, the cost of a
        block itself (starting it, carrying the weights) is shared by its writes. Long chunks are best alone: they need
        not read and carry the momentum through products."""
        if self.name != "factored":
            return max(1, DENSE_BLOCK_ELEMENTS // (rows * self.num_elements))
        if self.rules.is_channelwise:
            return self.channel_block_chunks(rows, writes_per_chunk)
        elements, per_pair = rows * self.num_elements, 4 * rows * sum(i + j for i, j in self.matrices)
        best = max(2, round(math.sqrt((BLOCK_OVERHEAD + CARRY_COST * elements) / max(per_pair, 1)) / writes_per_chunk))
        shared = (BLOCK_OVERHEAD + CARRY_COST * elements) / best
        together = shared + writes_per_chunk * (22 * elements + best * writes_per_chunk * per_pair)
        alone = BLOCK_OVERHEAD + CARRY_COST * elements + 14 * writes_per_chunk * elements
        return 1 if alone < together else best

    def channel_block_chunks(self, rows: int, writes_per_chunk: int) -> int:
        """The same where every group of queries scales all factors of its block for itself."""
        block = BLOCK_OVERHEAD + CARRY_COST * rows * self.num_elements
        best = round(math.sqrt(block / (CHANNEL_COST * rows * self.num_channels * writes_per_chunk)))
        fewest, most = CHANNEL_CHUNKS
        return 1 if best < fewest else min(best, most)


def steps_of(surprises: Surprises, writes: Writes, max_grad_norm: float | None) -> Surprises:
    """Gradients to surprises: u = -gradient, limited in norm, times the parameter's modulation."""

    def scale(name: str, square: Tensor | None) -> Tensor:
        limit = smooth_limit(safe_norm(square), max_grad_norm) if square is not None and max_grad_norm else None
        scale = -torch.ones_like(writes.rates[0][..., 0]) if limit is None else -limit
        share = writes.modulation.get(name)
        return scale if share is None else scale * share

    factors = {
        name: f.scaled(scale(name, f.square() if max_grad_norm else None)) for name, f in surprises.factors.items()
    }
    tensors = {}
    for name, t in surprises.tensors.items():
        square = t.reshape(*t.shape[:2], -1).square().sum(dim=2) if max_grad_norm else None
        tensors[name] = t * scale(name, square).reshape(*t.shape[:2], *[1] * (t.ndim - 2))
    return Surprises(factors, tensors)
