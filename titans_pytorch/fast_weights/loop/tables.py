"""What a loop multiplies by, from the gates of a rule: for all blocks of a series at once."""

from __future__ import annotations

from collections.abc import Mapping
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
    queries: Tensor | None = None  # (r n c d)  that read the weights each chunk begins with, if the loop is to read
    num_places: int | None = None  # renewals whose starts are kept, where nobody looks at them afterwards; None: all

    @property
    def num_renewals(self) -> int:
        return self.num_blocks // self.per_renewal


class Tables(NamedTuple):
    """What multiplies, pack by pack, see `parts.Inputs`."""

    equations: tuple[Equation, ...] | None  # of blocks of one chunk; None: by shares
    mixes: list[Tensor]  # blocks or renewals first
    shares: list[Tensor | None]  # by shares (T g r l a); by equations (N g r L 1), None: all of every surprise
    of_blocks: PerParameter[Shares] | None  # by shares: what weights on the way are sums of, with T·r rows


def tables_of(rule: Rule, writes: Writes, packing: Packing, series: Series) -> Tables:
    """By the rule's equations where a block is one chunk, by shares where it has several."""
    length, names = writes.keys.shape[2], packing.places
    if writes.num_chunks == series.num_blocks:
        equations = equations_of_all(rule, writes.gates)
        if equations is not None:
            return tables_of_equations(rule, equations, writes, packing, series)
    shares = writes.gates.map(lambda gates: shares_of(rule, gates, series.num_blocks))
    mixes = packing.of_rows(shares.map(lambda found: mix_of(found, series.num_blocks)).each, 1)
    taken = {name: share_of(shares[name], own_share(writes, name), series, length) for name in names}
    return Tables(None, mixes, list(packing.of_rows(taken, 1)), shares)


def tables_of_equations(
    rule: Rule, equations: PerParameter[Equations], writes: Writes, packing: Packing, series: Series
) -> Tables:
    """Gates of every block and, where parameters take shares in surprises, those; for a gain a table of both."""
    length = writes.keys.shape[2]
    gates = {name: gates_of_blocks(equations[name], writes.gates.any.channels is not None) for name in packing.places}
    mixes = packing.of_rows(gates, 2)
    own = {name: own_share(writes, name) for name in packing.places}
    taken = {name: of_tokens(share, series.num_renewals, length) for name, share in own.items() if share is not None}
    shares: list[Tensor | None] = [None] * len(packing.packs)
    if taken:
        shares = list(packing.of_rows(taken, 1))
    if has_table(packing, gates):
        of_gain = shares_of(rule, writes.gates[NORM_GAIN], series.num_renewals)
        place = packing.places[NORM_GAIN].pack
        mixes[place], shares[place] = table_of(of_gain, series, length, taken.get(NORM_GAIN)), None
    return Tables(equations.any.each, mixes, shares, None)


def has_table(packing: Packing, gates: Mapping[str, Tensor]) -> bool:
    """Whether a gain is moved by a table: all of it by the same gates."""
    return NORM_GAIN in packing.places and gates[NORM_GAIN].shape[-1] == 1


def of_tokens(share: Tensor, num_renewals: int, length: int) -> Tensor:
    """(r n c) or (r n 1) -> (N r L 1)"""
    by_renewal = share.expand(-1, -1, length).unflatten(1, (num_renewals, -1))
    return by_renewal.movedim(1, 0).flatten(2).unsqueeze(-1)


def equations_of_all(rule: Rule, gates: PerParameter[Gates]) -> PerParameter[Equations] | None:
    """The rule's equations with the gates of every parameter; None where they cannot be written down."""
    found = gates.map(lambda gates: equations_of(rule, gates))
    each = {name: equations for name, equations in found.each.items() if equations is not None}
    return PerParameter(each, found.is_shared) if len(each) == len(found.each) else None


def gates_of_blocks(equations: Equations, has_channels: bool) -> Tensor:
    """(r T) each, of channels (r j T) -> (T G r 1 1), of channels (T G r 1 j)"""
    if not has_channels:
        return torch.stack(equations.gates).permute(2, 0, 1)[..., None, None]
    of_channels = torch.broadcast_tensors(*(gate if gate.ndim == 3 else gate.unsqueeze(1) for gate in equations.gates))
    return torch.stack(of_channels).permute(3, 0, 1, 2).unsqueeze(3)


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


def table_of(shares: Shares, series: Series, length: int, taken: Tensor | None) -> Tensor:
    """What moves a gain through a renewal at once, see `ByTable`.

    shares: of renewals, (N·r ...); length: tokens of a chunk; taken: of every token's surprise, (N r L 1), None: all
    -> (N r a+k-1 a+k-1+L)
    """
    k, orders = series.per_renewal, len(shares.past)
    nothing = torch.zeros_like(shares.initial[..., :1])
    of_weights = torch.stack((shares.initial, *shares.past), dim=-1)[:, 1:]  # (N·r k a), after every chunk
    of_momenta = [torch.stack((nothing[:, 0], *row), dim=-1) for row in shares.last_past]
    old = torch.stack((of_weights[:, -1], *of_momenta, *of_weights[:, :-1].unbind(1)), dim=1)
    new = torch.cat((shares.surprise[:, -1:], shares.last_surprise.movedim(0, 1), shares.surprise[:, 1:-1]), dim=1)
    between = nothing.unsqueeze(1).expand(-1, k + orders, k - 1)
    new = new.repeat_interleave(length, dim=-1)
    new = new if taken is None else new * taken.flatten(0, 1).mT
    table = torch.cat((old, between, new), dim=-1)
    return table.unflatten(0, (series.num_renewals, -1))
