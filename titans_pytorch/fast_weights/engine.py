"""A memory's weights through blocks of chunks: from writes to gradients, surprises and weights, and back to reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from titans_pytorch.fast_weights.blocks.at_once import blocks_at_once
from titans_pytorch.fast_weights.blocks.channels import ChannelBlock
from titans_pytorch.fast_weights.blocks.dense import Evolve, build, by_products
from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.scan import by_scan
from titans_pytorch.fast_weights.blocks.single import SingleBlock
from titans_pytorch.fast_weights.blocks.still import StillBlock
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.interface import (
    Block,
    Carry,
    Entries,
    LossFn,
    PerParameter,
    Residual,
    Weights,
    Writes,
)
from titans_pytorch.fast_weights.loop.compiled import compiled_renewals
from titans_pytorch.fast_weights.loop.renewals import renewals
from titans_pytorch.fast_weights.loop.storing import SeriesStore, can_loop
from titans_pytorch.fast_weights.loop.tables import Series
from titans_pytorch.fast_weights.precision import full_precision
from titans_pytorch.fast_weights.probe import ModelTraits
from titans_pytorch.fast_weights.renewal import Renewal
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.omega import shares_of_window
from titans_pytorch.fast_weights.rules.rule import Coefficients, Rule, Shares
from titans_pytorch.fast_weights.solved.blocks import can_solve, solved_blocks
from titans_pytorch.fast_weights.surprises import Surprises, surprises_of
from titans_pytorch.fast_weights.ways import EngineName, fitting, runner
from titans_pytorch.losses import is_quadratic

BlockSums = PerParameter[Any] | None
"""What gates alone say about the weights of a block: `Shares` of one that is factored, `Coefficients` of one that is
built; None: not known yet, or of another kind"""


class Engine:
    """Stores writes into weights and reads queries from them.

    traits: how the memory model uses its matrices, and whether it mixes tokens
    evolve: how weights are built, where they are
    """

    def __init__(
        self,
        name: EngineName | None,
        model: nn.Module,
        traits: ModelTraits,
        loss_fn: LossFn,
        rule: Rule,
        max_grad_norm: float | None = None,
        use_accelerated_scan: bool = False,
    ) -> None:
        self.name = fitting(name, traits, rule)
        self.rule, self.max_grad_norm, self.mixes_tokens = rule, max_grad_norm, traits.mixes_tokens
        self.evolve: Evolve = by_scan if use_accelerated_scan and rule.is_linear else by_products
        self.model = runner(self.name, model, traits, loss_fn)
        is_closed = isinstance(self.model, ClosedMLP) and is_quadratic(loss_fn)
        is_known = is_closed and self.name == "factored" and max_grad_norm is None
        # whether many blocks can be stored by one loop, `store_series`, and many renewals solved for, `store_solved`
        self.has_loop = is_known and type(self.model) is ClosedMLP and can_loop(rule)
        self.can_solve = is_known and can_solve(self.model, rule)
        self.loop = renewals

    def store(
        self, carry: Carry, writes: Writes, residual: Residual | None = None, sums: BlockSums = None
    ) -> tuple[Block, Tensor]:
        """A block of chunks, all surprised at the base.  -> the block, the loss of every write (r n c)

        sums: what the block's weights are sums of, if that is known (`sums_of_blocks`)
        """
        base = carry.base
        if self.rule.forgets_first:
            base = {name: writes.gates[name].left_of(weight) for name, weight in base.items()}
        gradients, loss = self.gradients(base, writes, residual)
        surprises = surprises_of(gradients, writes, self.max_grad_norm)
        with full_precision(loss):
            return self.block(carry, surprises, writes, sums), loss[:, writes.num_older :]

    def compile_loop(self) -> None:
        """Let `torch.compile` make each step of a loop, reading included."""
        self.loop = compiled_renewals

    def store_series(
        self, carry: Carry, writes: Writes, series: Series, renewal: Renewal, longest: int
    ) -> Iterator[tuple[Block, Tensor]]:
        """Many equal blocks, and where their base is renewed, by loops of at most so many renewals.

        -> blocks that hold many each, the loss of every write (r n c)
        """
        if not isinstance(self.model, ClosedMLP):
            raise TypeError(f"only MLPs are stored in a loop, got {type(self.model).__name__}")
        with full_precision(writes.keys):
            store = SeriesStore(self.model, self.rule, carry, writes, series, renewal, self.loop)
        return store.pieces(carry, longest)

    def store_at_once(
        self, carry: Carry, writes: Writes, residual: Residual | None, num_blocks: int
    ) -> tuple[Block, Tensor]:
        """Equal blocks that are all surprised at the base, in as many operations as one.  -> as `store`"""
        gradients, loss = self.gradients(carry.base, writes, residual)
        surprises = surprises_of(gradients, writes, self.max_grad_norm)
        with full_precision(loss):
            shares = writes.gates.map(lambda gates: self.shares(gates.blocks(num_blocks)))
            return blocks_at_once(carry, surprises, shares, num_blocks, self.rule.num_momenta), loss

    def store_solved(self, carry: Carry, writes: Writes, num_blocks: int) -> tuple[Block, Tensor]:
        """Equal blocks of a linear memory, with a base that is renewed after every chunk.  -> as `store`"""
        with full_precision(writes.keys):
            return solved_blocks(self.model, self.rule, carry, writes, num_blocks)

    def block(self, carry: Carry, surprises: Surprises, writes: Writes, sums: BlockSums) -> Block:
        """The weights over the chunks of a block."""
        if self.name != "factored":
            return build(self.rule, carry, surprises, writes.gates, self.evolve, sums)
        if writes.num_chunks == 1 and self.rule.window == 1:
            return SingleBlock(carry, surprises, writes.gates, self.rule)
        kind = FactoredBlock if writes.gates.any.channels is None else ChannelBlock
        return kind(carry, surprises, writes.gates.map(self.shares) if sums is None else sums)

    def shares(self, gates: Gates) -> Shares:
        """What the weights after each chunk are sums of."""
        shares = self.rule.coefficients(gates).shares()
        return shares if self.rule.window == 1 else shares_of_window(shares, gates, self.rule.window)

    def sums_of_blocks(self, gates: PerParameter[Gates], sizes: list[int]) -> list[BlockSums]:
        """What the weights of blocks of so many chunks are sums of, equal blocks at once; None: of another kind.

        sizes: of one block after the other; negative: of those that are not asked for
        """
        found: list[BlockSums] = []
        first = 0
        for size, equal in groupby(sizes):
            num = len(list(equal))
            if self.has_sums(size):
                of_all = gates.map(partial(self.equal_sums, slice(first, first + num * size), num))
                found += [of_all.map(itemgetter(i)) for i in range(num)]
            else:
                found += [None] * num
            first += num * abs(size)
        return found

    def has_sums(self, num_chunks: int) -> bool:
        """Whether the weights of a block of so many chunks are sums that gates decide."""
        if self.name == "factored":
            return num_chunks > 1 or (num_chunks == 1 and self.rule.window > 1)
        return num_chunks > 0 and self.rule.is_linear and self.evolve is by_products

    def equal_sums(self, chunks: slice, num_blocks: int, gates: Gates) -> list[Shares] | list[Coefficients]:
        """What the weights of blocks of equal length are sums of."""
        with full_precision(gates.like):
            of_all = gates.select(chunks).blocks(num_blocks)
            of_rows = self.shares(of_all) if self.name == "factored" else self.rule.coefficients(of_all)
            return of_rows.blocks(num_blocks)

    def gradients(self, base: Weights, writes: Writes, residual: Residual | None) -> tuple[Surprises, Tensor]:
        """Gradients of each chunk's loss, every parameter's weighted by its own rates if it has some."""
        if writes.rates.is_shared or (self.name != "general" and not self.mixes_tokens):
            return self.model.gradients(base, writes, residual)
        total = Surprises({}, {})
        for name in base:
            alone = writes._replace(rates=PerParameter.shared(base, writes.rates[name]))
            found, loss = self.model.gradients(base, alone, residual)
            total.factors.update({n: factors for n, factors in found.factors.items() if n == name})
            total.tensors.update({n: tensor for n, tensor in found.tensors.items() if n == name})
        return total, loss

    def at_rest(self, carry: Carry) -> Block:
        """A block without any chunk: the weights as they are."""
        return StillBlock(carry)

    def read(self, block: Block, queries: Tensor, entries: Entries, slow: Weights) -> Tensor:
        """queries: (r g k d), entries: the entry of the block that each group reads, slow: (r d) -> (r g k d)"""
        return self.model.read(block, queries, entries, slow)
