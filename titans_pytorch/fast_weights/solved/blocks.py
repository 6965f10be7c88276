"""Renewals of a linear memory, solved: gradients at the weights of every chunk, without a loop over chunks.

Where a memory is one matrix, the difference f = v - k W of a write is linear in those of all writes before it. With W_t
the weights before its chunk and s the step size times the slope of the loss (2 for a sum of squares),

    W_t = initial_t W + sum_o past_{o,t} M_o + sum_{i<t} surprise_{t,i} s_i k_i^T f_i

where W, M are what the block begins with and the shares depend on the gates alone (`rules.rule`). So the differences F
of a block solve a triangular system, for any momentum and forgetting that is linear:

    (1 + tril(surprise * K (s K)^T, -1)) F = V - (initial * K) W - sum_o (past_o * K) M_o

Without momentum and forgetting this is the delta rule. All systems of a span are inverted at once, which leaves `chain`
four products a block; the rest is what blocks of factors are anyway. Nothing is divided by a step size or by a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.blocks.series import FoldedBlock
from titans_pytorch.fast_weights.closed_form import ClosedMLP
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.layerwise import LayerwiseMLP
from titans_pytorch.fast_weights.loop.tables import mix_of
from titans_pytorch.fast_weights.renewal import LimitGradient
from titans_pytorch.fast_weights.rules.gates import KEEP, Gates
from titans_pytorch.fast_weights.rules.rule import Memory, Rule, Shares
from titans_pytorch.fast_weights.solved.chain import Links, chained
from titans_pytorch.fast_weights.solved.stacked import StackedBlock
from titans_pytorch.fast_weights.surprises import Factors, Surprises
from titans_pytorch.fast_weights.ways import Runner
from titans_pytorch.memory_models import hidden_keys


def can_solve(model: Runner, rule: Rule) -> bool:
    """Whether this file can work with a model and a rule.

    Its losses are linear in one matrix each, one gate holds for all of it, and no step has to be built.
    """
    is_linear = isinstance(model, LayerwiseMLP) or (
        isinstance(model, ClosedMLP) and not model.has_norm and len(model.matrices) == 1
    )
    has_channels = any(gate.varies == "channel" for gate in rule.gates)
    return is_linear and rule.is_factored and rule.window == 1 and not has_channels


class SolvedWrites(NamedTuple):
    """The writes of T blocks of b chunks and L writes each, as T·r rows, into one matrix."""

    keys: Tensor  # (T·r L i)
    values: Tensor  # (T·r L j)
    steps: Tensor  # (T·r L 1)  s


class Solved(NamedTuple):
    """One matrix through all blocks."""

    differences: Tensor  # (T·r L j)
    surprises: Factors  # (T·r b c ...)
    shares: Shares  # with T·r rows
    states: Tensor  # (T·r ai j)  what each block begins with, its slots one below another
    starts: Memory  # (T·r i j)  the same, slot by slot
    last: Memory  # (r i j)
    poison: Tensor  # (T·r b+1)  NaN where weights are not finite, else 0


def solved_blocks(
    model: Runner, rule: Rule, carry: Carry, writes: Writes, num_blocks: int
) -> tuple[FoldedBlock, Tensor]:
    """Equal blocks in which every chunk is surprised at its own weights.  -> those, the loss of every write (r n c)"""
    if not isinstance(model, ClosedMLP):
        raise TypeError(f"only linear memories are solved for, got {type(model).__name__}")
    keys, values = (folded(x, num_blocks).flatten(1, 2) for x in (writes.keys, writes.values))
    each: dict[str, Solved] = {}
    for name in model.matrices:
        if each:  # its keys are made of what the one before has answered, v - f
            keys = hidden_keys(values - [*each.values()][-1].differences)
        written = SolvedWrites(keys, values, steps_of(model, writes, name, num_blocks))
        memory = begun(carry, name, rule.num_momenta)
        each[name] = solved(rule, memory, written, writes.gates[name], num_blocks)

    nothing = Carry({}, {}, {}, {})
    begins = nothing.with_memories({name: one.starts for name, one in each.items()})
    begins = begins._replace(start={n: one.starts.start for n, one in each.items() if one.starts.start is not None})
    shares = PerParameter({name: one.shares for name, one in each.items()}, len(each) == 1)
    surprises = Surprises({name: one.surprises for name, one in each.items()}, {})
    inner = StackedBlock(begins, surprises, shares, {name: one.states for name, one in each.items()})
    last = carry.with_memories({name: one.last for name, one in each.items()})
    blocks = FoldedBlock(inner, last._replace(base=last.weights), num_blocks)
    *_, (differences, *_, poison) = each.values()
    loss = model.loss_of(differences.unflatten(1, (poison.shape[1] - 1, -1)))
    loss = in_rows(loss + poison[:, :-1, None], num_blocks)
    return blocks, loss.movedim(0, 1).flatten(1, 2)


def solved(rule: Rule, memory: Memory, written: SolvedWrites, gates: Gates, num_blocks: int) -> Solved:
    """One matrix: its differences by triangular systems, and what each block begins with."""
    gates, poison = without_poison(gates, num_blocks)
    shares = rule.coefficients(gates.blocks(num_blocks)).shares()
    seen = after_forgetting(shares, gates.blocks(num_blocks)) if rule.forgets_first else shares
    links = links_of(written, shares, seen, num_blocks)
    slots = [memory.weights, *memory.moved, *([] if memory.start is None else [memory.start])]
    found, starts, end = chained(links, torch.cat(slots, dim=1))

    chunks, wide = (shares.surprise.shape[-1], -1), written.keys.shape[2]
    differences = found.flatten(0, 1)
    factors = Factors(written.keys.unflatten(1, chunks), (differences * written.steps).unflatten(1, chunks))
    last = memory_of(end, wide, memory)
    last = last._replace(weights=last.weights + in_rows(poison, num_blocks)[-1, :, -1, None, None])
    poisoned = shares._replace(initial=shares.initial + poison)
    states = starts.flatten(0, 1)
    return Solved(differences, factors, poisoned, states, memory_of(states, wide, memory), last, poison)


def begun(carry: Carry, name: str, num_momenta: int) -> Memory:
    """One parameter before the first block, with zeros where nothing has moved yet; its gradient is limited here."""
    weights = carry.weights[name]
    momenta = carry.momenta.get(name, (torch.zeros_like(weights),) * num_momenta)
    return Memory(LimitGradient.apply(weights), tuple(map(LimitGradient.apply, momenta)), carry.start.get(name))


def memory_of(state: Tensor, wide: int, like: Memory) -> Memory:
    """Weights, momenta and the learned start, which lie one below another.  state: (... ai j)"""
    weights, *rest = state.split(wide, dim=1)
    o = len(like.momenta)
    return Memory(weights, tuple(rest[:o]), None if like.start is None else rest[o])


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


def steps_of(model: ClosedMLP, writes: Writes, name: str, num_blocks: int) -> Tensor:
    """Step sizes of one matrix, times the slope of the loss.  -> (T·r L 1)"""
    steps = writes.rates[name] * model.slope(writes.keys.shape[-1])
    share = writes.modulation.get(name)
    steps = steps if share is None else steps * share.unsqueeze(2)
    return folded(steps, num_blocks).flatten(1).unsqueeze(2)


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
    of_start = beside(of_writes(torch.stack([start[:, :num_chunks] for start in starts], dim=2), 1), keys)
    ends = [shares.surprise[:, -1], *shares.last_surprise]
    ends += [] if shares.start is None else [torch.zeros_like(ends[0])]
    handed = beside(of_writes(torch.stack(ends, dim=2), 1), stepped)
    values, of_start, handed, system = (in_rows(x, num_blocks) for x in (written.values, of_start, handed, system))
    return Links(values, of_start, handed, slots_of(shares, num_blocks), system)


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
