"""Renewals of a linear memory, solved: gradients at the weights of every chunk, without a loop over chunks.

Where a memory is one matrix, the difference f = v - k W of a write is linear in those of all writes before it. With W_t
the weights before its chunk and s the step size times the slope of the loss (2 for a sum of squares),

    W_t = initial_t W + sum_o past_{o,t} M_o + sum_{i<t} surprise_{t,i} s_i k_i^T f_i

where W, M are what the block begins with and the shares depend on the gates alone (`rules.rule`). So the differences F
of a block solve a triangular system, for any momentum and forgetting that is linear:

    (1 + tril(surprise * K (s K)^T, -1)) F = V - (initial * K) W - sum_o (past_o * K) M_o

Without momentum and forgetting this is the delta rule. Solved for V, initial * K and past * K at once, and for all
blocks of a span, it leaves `chain` three products a block; the rest is what blocks of factors are anyway. Nothing is
divided by a step size or by a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.factored import FactoredBlock
from titans_pytorch.fast_weights.blocks.series import FoldedBlock
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.loop.tables import mix_of
from titans_pytorch.fast_weights.renewal import LimitGradient
from titans_pytorch.fast_weights.rules.gates import KEEP, Gates
from titans_pytorch.fast_weights.rules.rule import Rule, Shares
from titans_pytorch.fast_weights.solved.chain import Links, chained
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.fast_weights.ways import Runner


def can_solve(model: Runner, rule: Rule) -> bool:
    """Whether this file can work with a model and a rule: one matrix, one gate for all of it, no step as a matrix."""
    is_linear = isinstance(model, ClosedMLP) and not model.has_norm and len(model.matrices) == 1
    return is_linear and rule.is_factored and not any(gate.varies == "channel" for gate in rule.gates)


class SolvedWrites(NamedTuple):
    """The writes of T blocks of L, as T·r rows, and their step sizes s."""

    keys: Tensor  # (T·r L i)
    values: Tensor  # (T·r L j)
    steps: Tensor  # (T·r L 1)


def solved_blocks(
    model: Runner, rule: Rule, carry: Carry, writes: Writes, num_blocks: int
) -> tuple[FoldedBlock, Tensor]:
    """Equal blocks in which every chunk is surprised at its own weights.  -> those, the loss of every write (r n c)"""
    if not isinstance(model, ClosedMLP):
        raise TypeError(f"only linear memories are solved for, got {type(model).__name__}")
    (name,) = model.matrices
    gates, poison = without_poison(writes.gates[name], num_blocks)
    shares = rule.coefficients(gates.blocks(num_blocks)).shares()
    seen = after_forgetting(shares, gates.blocks(num_blocks)) if rule.forgets_first else shares
    written = written_of(model, writes, name, num_blocks)
    links = links_of(written, shares, seen, num_blocks)
    found, starts, end = chained(links, first_state(carry, name, rule.num_momenta))

    chunks, wide = (writes.num_chunks // num_blocks, -1), written.keys.shape[2]
    differences = found.flatten(0, 1).unflatten(1, chunks)  # (T·r b c j)
    factors = Factors(written.keys.unflatten(1, chunks), differences * written.steps.unflatten(1, chunks))
    poisoned = shares._replace(initial=shares.initial + poison)
    begins = carry_of(carry, name, starts.flatten(0, 1), wide, rule)
    inner = FactoredBlock(begins, Surprises({name: factors}, {}), PerParameter.shared([name], poisoned))
    last = carry_of(carry, name, end, wide, rule)
    ended = {name: last.weights[name] + in_rows(poison, num_blocks)[-1, :, -1, None, None]}
    blocks = FoldedBlock(inner, last._replace(base=ended, weights=ended, start=carry.start), num_blocks)
    loss = model.loss_of(differences) + poison[:, :-1, None]
    return blocks, in_rows(loss, num_blocks).movedim(0, 1).flatten(1, 2)


def in_rows(x: Tensor, num_blocks: int) -> Tensor:
    """(T·r ...) -> (T r ...)"""
    return x.unflatten(0, (num_blocks, -1))


def folded(x: Tensor, num_blocks: int) -> Tensor:
    """(r T·b ...) -> (T·r b ...)"""
    return x.unflatten(1, (num_blocks, -1)).movedim(1, 0).flatten(0, 1)


def without_poison(gates: Gates, num_blocks: int) -> tuple[Gates, Tensor]:
    """Gates that are finite, and 0 before and NaN after each chunk that is not.  -> (T·r b+1)

    In a block all is multiplied with all, and 0 times NaN is NaN: it must not reach what came before.
    """
    keep = gates.factors[KEEP]
    poison = F.pad((keep[0].detach() * 0).cumsum(dim=-1), (1, 0))
    size = keep.shape[-1] // num_blocks
    finite = gates.factors | {KEEP: keep.nan_to_num(nan=0.0)}
    return gates._replace(factors=finite), poison.unfold(1, size + 1, size).movedim(1, 0).flatten(0, 1)


def written_of(model: ClosedMLP, writes: Writes, name: str, num_blocks: int) -> SolvedWrites:
    """Keys, values and step sizes of every block."""
    steps = writes.rates[name] * model.slope(writes.keys.shape[-1])
    share = writes.modulation.get(name)
    steps = steps if share is None else steps * share.unsqueeze(2)
    of_blocks = (folded(x, num_blocks).flatten(1, 2) for x in (writes.keys, writes.values, steps.unsqueeze(3)))
    return SolvedWrites(*of_blocks)


def after_forgetting(shares: Shares, gates: Gates) -> Shares:
    """What each chunk's forgetting leaves of the weights before it."""
    kept = F.pad(gates.factors[KEEP][0], (0, 1)).exp()  # (T·r b+1)
    return shares._replace(
        initial=shares.initial * kept,
        past=shares.past * kept,
        start=None if shares.start is None else shares.start * kept,
        surprise=shares.surprise * kept.unsqueeze(2),
    )


def links_of(written: SolvedWrites, shares: Shares, seen: Shares, num_blocks: int) -> Links:
    """What the triangular system makes of values and keys, and what a block hands on.

    seen: the same shares, of the weights at which every chunk is surprised
    """
    num_chunks = shares.surprise.shape[-1]
    length = written.keys.shape[1] // num_chunks

    def of_writes(x: Tensor, *axes: int) -> Tensor:
        """Chunks become writes, along some axes."""
        for axis in axes if length > 1 else ():
            x = x.repeat_interleave(length, dim=axis)
        return x

    keys, stepped = written.keys, written.keys * written.steps
    before = of_writes(seen.surprise[:, :num_chunks], 1, 2)  # strictly below the diagonal, of chunks
    system = torch.bmm(keys, stepped.mT) * before
    starts = [seen.initial, *seen.past, *([] if seen.start is None else [seen.start])]
    shared = of_writes(torch.stack([start[:, :num_chunks] for start in starts], dim=2), 1)  # (T·r L a)
    known = torch.cat((written.values, beside(shared, keys)), dim=2)
    found = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    of_values, of_starts = found.split((written.values.shape[2], len(starts) * keys.shape[2]), dim=2)
    ends = [shares.surprise[:, -1], *shares.last_surprise]
    ends += [] if shares.start is None else [torch.zeros_like(ends[0])]
    of_ends = beside(of_writes(torch.stack(ends, dim=2), 1), stepped)
    known, of_start, handed = (in_rows(x, num_blocks) for x in (of_values, of_starts, of_ends))
    return Links(known, of_start, handed, slots_of(shares, num_blocks))


def beside(shares: Tensor, keys: Tensor) -> Tensor:
    """Keys by each of their shares, side by side.  (T·r L a), (T·r L i) -> (T·r L ai)"""
    return (shares.unsqueeze(3) * keys.unsqueeze(2)).flatten(2)


def slots_of(shares: Shares, num_blocks: int) -> Tensor:
    """What is left at a block's end of each slot in each: weights, momenta, and the learned start.  -> (T r a a)"""
    mix = mix_of(shares, num_blocks)
    if shares.start is None:
        return mix
    mix = F.pad(mix, (0, 1, 0, 1))
    mix[..., 0, -1], mix[..., -1, -1] = in_rows(shares.start[:, -1], num_blocks), 1.0
    return mix


def first_state(carry: Carry, name: str, num_momenta: int) -> Tensor:
    """Weights, momenta and the learned start one below another.  -> (r ai j)"""
    weights = carry.weights[name]
    momenta = carry.momenta.get(name, (torch.zeros_like(weights),) * num_momenta)
    slots = map(LimitGradient.apply, (weights, *momenta))
    return torch.cat([*slots, *([carry.start[name]] if name in carry.start else [])], dim=1)


def carry_of(carry: Carry, name: str, state: Tensor, wide: int, rule: Rule) -> Carry:
    """A state as what blocks begin with.  state: (... ai j)"""
    weights, *rest = state.split(wide, dim=1)
    momenta, start = rest[: rule.num_momenta], rest[rule.num_momenta :]
    return carry._replace(
        base={},
        weights={name: weights},
        momenta={name: tuple(momenta)} if momenta else {},
        start={name: start[0]} if start else {},
    )
