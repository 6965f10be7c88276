"""What a loop multiplies by, from the gates of a rule: for all blocks of a series at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.interface import PerParameter, Writes
from titans_pytorch.fast_weights.loop.equations import Equation, Equations, equations_of
from titans_pytorch.fast_weights.loop.packing import Packing
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.rule import Rule, Shares
from titans_pytorch.memory_models import NORM_GAIN


class Series(NamedTuple):
    """Equal blocks one after the other."""

    num_blocks: int  # T
    per_renewal: int  # k, blocks that are surprised at one base
    renews_last: bool  # whether the base is renewed after the last one

    @property
    def num_renewals(self) -> int:
        return self.num_blocks // self.per_renewal


class Tables(NamedTuple):
    """What multiplies, pack by pack, see `parts.Inputs`."""

    equations: tuple[Equation, ...] | None  # of blocks of one chunk; None: by shares
    mixes: list[Tensor]  # blocks or renewals first
    shares: list[Tensor]  # (T g r l a)
    of_blocks: PerParameter[Shares] | None  # by shares: what weights on the way are sums of, with T·r rows


def tables_of(rule: Rule, writes: Writes, packing: Packing, series: Series) -> Tables:
    """By the rule's equations where a block is one chunk, by shares where it has several."""
    length, names = writes.keys.shape[2], packing.places
    if writes.num_chunks == series.num_blocks and writes.rates.is_shared and not writes.modulation:
        equations = equations_of_all(rule, writes.gates)
        if equations is not None:
            mixes = packing.of_rows(equations.map(gates_of_blocks).each, 2)
            if NORM_GAIN in names:
                of_gain = shares_of(rule, writes.gates[NORM_GAIN], series.num_renewals)
                mixes[names[NORM_GAIN].pack] = table_of(of_gain, series, length)
            return Tables(equations.any.each, mixes, [], None)
    shares = writes.gates.map(lambda gates: shares_of(rule, gates, series.num_blocks))
    mixes = packing.of_rows(shares.map(lambda found: mix_of(found, series.num_blocks)).each, 1)
    of_tokens = {name: share_of(shares[name], own_share(writes, name), series, length) for name in names}
    return Tables(None, mixes, packing.of_rows(of_tokens, 1), shares)


def equations_of_all(rule: Rule, gates: PerParameter[Gates]) -> PerParameter[Equations] | None:
    """The rule's equations with the gates of every parameter; None where they cannot be written down."""
    found = gates.map(lambda gates: equations_of(rule, gates))
    each = {name: equations for name, equations in found.each.items() if equations is not None}
    return PerParameter(each, found.is_shared) if len(each) == len(found.each) else None


def gates_of_blocks(equations: Equations) -> Tensor:
    """(r T) each -> (T G r 1 1)"""
    return torch.stack(equations.gates).permute(2, 0, 1)[..., None, None]


def shares_of(rule: Rule, gates: Gates, num_blocks: int) -> Shares:
    """What the weights of so many blocks are sums of, with T·r rows."""
    return rule.coefficients(gates.blocks(num_blocks)).shares()


def mix_of(shares: Shares, num_blocks: int) -> Tensor:
    """What is left of weights and momenta at the end of each block.  -> (T r a a), after and before"""
    of_weights = torch.stack((shares.initial[..., -1], *shares.past[..., -1]), dim=-1)
    nothing = torch.zeros_like(shares.initial[..., -1])
    of_momenta = [torch.stack((nothing, *row), dim=-1) for row in shares.last_past]
    return torch.stack((of_weights, *of_momenta), dim=-2).unflatten(0, (num_blocks, -1))


def own_share(writes: Writes, name: str) -> Tensor | None:
    """How much of every write's surprise a parameter takes, where others take other shares.  -> (r n c), (r n 1)"""
    modulation, rates = writes.modulation.get(name), None if writes.rates.is_shared else writes.rates[name]
    if modulation is None:
        return rates
    return modulation.unsqueeze(2) if rates is None else modulation.unsqueeze(2) * rates


def share_of(shares: Shares, own: Tensor | None, series: Series, length: int) -> Tensor:
    """What every token's surprise adds to weights and momenta at the end of its block.  -> (T r l a)"""
    of_chunks = torch.stack((shares.surprise[..., -1, :], *shares.last_surprise), dim=-1)  # (T·r b a)
    of_tokens = of_chunks.unflatten(0, (series.num_blocks, -1)).repeat_interleave(length, dim=2)
    if own is None:
        return of_tokens
    by_block = own.expand(-1, -1, length).unflatten(1, (series.num_blocks, -1))  # (r T b c)
    return of_tokens * by_block.movedim(1, 0).flatten(2).unsqueeze(-1)


def table_of(shares: Shares, series: Series, length: int) -> Tensor:
    """What moves a gain through a renewal at once, see `ByTable`.

    shares: of renewals, (N·r ...); length: tokens of a chunk  -> (N r a+k-1 a+k-1+L)
    """
    k, orders = series.per_renewal, len(shares.past)
    nothing = torch.zeros_like(shares.initial[..., :1])
    of_weights = torch.stack((shares.initial, *shares.past), dim=-1)[:, 1:]  # (N·r k a), after every chunk
    of_momenta = [torch.stack((nothing[:, 0], *row), dim=-1) for row in shares.last_past]
    old = torch.stack((of_weights[:, -1], *of_momenta, *of_weights[:, :-1].unbind(1)), dim=1)
    new = torch.cat((shares.surprise[:, -1:], shares.last_surprise.movedim(0, 1), shares.surprise[:, 1:-1]), dim=1)
    between = nothing.unsqueeze(1).expand(-1, k + orders, k - 1)
    table = torch.cat((old, between, new.repeat_interleave(length, dim=-1)), dim=-1)
    return table.unflatten(0, (series.num_renewals, -1))
