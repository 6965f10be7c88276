"""One renewal as a plain function of tensors: its surprises, its blocks, and what happens where the base is renewed.

The formulas are those of `loop.mlp` and `loop.evolution`, without a place in memory for anything: ordinary autograd
goes through them, and a compiler makes a few dozen kernels of both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.loop.equations import Equation, Source
from titans_pytorch.fast_weights.loop.packing import Place
from titans_pytorch.fast_weights.renewal import LimitGradient, limit_growth
from titans_pytorch.memory_models import NORM_EPS

Slots = list[Tensor]
"""A parameter's weights and momenta as they lie in its pack, (r p q) each"""


class Form(NamedTuple):
    """What one renewal does, as far as it is no tensor."""

    matrices: tuple[Place, ...]  # in the order of the layers
    gain: Place | None  # of a gain that storing changes
    per_renewal: int  # blocks, k
    equations: tuple[Equation, ...] | None  # of blocks of one chunk; None: by shares
    renews: bool  # whether the base is renewed afterwards

    @property
    def places(self) -> tuple[Place, ...]:
        """Where every parameter lies; the gain comes last."""
        return self.matrices if self.gain is None else (*self.matrices, self.gain)


class Given(NamedTuple):
    """What one renewal is given, beside weights; lists are of packs."""

    keys: Tensor  # (r L d)
    offset: Tensor  # (r L d)
    step: Tensor  # (r L 1)
    gain: Tensor | None  # (r 1 d)
    mixes: list[Tensor]  # as `parts.Inputs` has them: (k ...), of a gain by equations (r a+k-1 a+k-1+L)
    shares: list[Tensor]  # (k g r l a)
    limit: Tensor | None  # (r)
    queries: Tensor | None  # (r k c d)  that read the weights each block begins with, where a block is one chunk


class Surprise(NamedTuple):
    """The surprise of every parameter as products, token by token; that of a gain is a sum over tokens."""

    reads: Tensor | None  # (r c d)  of what was read at the base in the same products
    inputs: list[Tensor]  # (r L i)
    errors: list[Tensor]  # (r L j), those of a gain the last
    error: Tensor  # (r L d)  of what was predicted


class Stepped(NamedTuple):
    """What a renewal gives."""

    slots: list[Slots]  # of every parameter, afterwards
    starts: list[list[Tensor]]  # by shares, of every parameter's slots where its blocks began (r k p q)
    between: list[list[Tensor]]  # by equations, every parameter's weights where its blocks but the first began (r p q)
    surprise: Surprise  # its inputs and errors only by shares
    reads: Tensor | None  # (r k c d)


def renewal(form: Form, given: Given, base: list[Tensor] | None, slots: list[Slots]) -> Stepped:
    """From weights and momenta to those after a renewal.

    base: of every parameter (r p q), where surprises are taken; None: at the weights
    """
    slots = [[contiguous_both_ways(slot) for slot in each] for each in slots]
    queries = None if given.queries is None or form.equations is None else list(given.queries.unbind(1))
    if base is None:
        at_start = None if queries is None else queries.pop(0)  # by the same products
        surprise = surprise_at(form, given, [each[0] for each in slots], at_start)
    else:
        surprise = surprise_at(form, given, base, None)
    paths = []  # of every parameter, the slots before and after its blocks
    for number, place in enumerate(form.places):
        left, right = factors(form, surprise, number)
        mix = given.mixes[place.pack]
        if form.equations is None:
            shares = given.shares[place.pack][:, place.number]
            path = by_shares(slots[number], left, right, mix[:, place.number], shares)
        elif place == form.gain:
            path = by_table(slots[number], right, mix, form.per_renewal)
        else:
            path = by_equations(form.equations, slots[number], left, right, mix[:, :, place.number])
        paths.append(path)
    after = [path[-1] for path in paths]
    after = renewed(after, given.limit) if form.renews else after
    if form.equations is None:
        starts = [[torch.stack(slot, dim=1) for slot in zip(*path[:-1], strict=True)] for path in paths]
        return Stepped(after, starts, [], surprise, None)
    weights = [[slots[0] for slots in path[:-1]] for path in paths]
    reads = None if queries is None else all_read(form, given, weights, queries, surprise.reads)
    return Stepped(after, [], [each[1:] for each in weights], Surprise(None, [], [], surprise.error), reads)


def contiguous_both_ways(x: Tensor) -> Tensor:
    """The identity, whose gradient lies in order too: the step before would copy another one."""
    return x.flatten(1).unflatten(1, x.shape[1:])


# ---- the surprise


def surprise_at(form: Form, given: Given, base: list[Tensor], queries: Tensor | None) -> Surprise:
    """The MLP's surprises at a base, see `loop.mlp`, and what is read there.  base: (r p q) each"""
    matrices = [turned(weight, place) for weight, place in zip(base, form.matrices, strict=False)]
    length = given.keys.shape[1]
    x, inputs, slopes = given.keys if queries is None else torch.cat((given.keys, queries), dim=1), [given.keys], []
    for weight in matrices[:-1]:
        z = torch.bmm(x, weight)
        x = F.gelu(z)
        inputs.append(x[:, :length])
        slopes.append(gelu_slope(z[:, :length]))
    out = torch.bmm(x, matrices[-1])
    gain = given.gain if form.gain is None else base[-1] + 1
    answers, of_gain = out, []
    if gain is not None:
        normed, scale = norm(out)
        answers = normed * gain
        normed, scale = normed[:, :length], scale[:, :length]
    predicted = answers[:, :length]
    if gain is None:
        error = (predicted + given.offset) * given.step
    else:
        weighted = (predicted + given.offset) * given.step
        error = norm_gradient(weighted * gain, normed, scale)
        of_gain = [] if form.gain is None else [weighted * normed]
    errors = [error]
    for weight, slope in zip(matrices[:0:-1], slopes[::-1], strict=True):
        errors.insert(0, torch.bmm(errors[0], weight.mT) * slope)
    reads = None
    if queries is not None:
        reads = answers[:, length:] if gain is None else answers[:, length:] + queries
    return Surprise(reads, inputs, errors + of_gain, predicted + given.offset)


def factors(form: Form, surprise: Surprise, number: int) -> tuple[Tensor, Tensor]:
    """A parameter's surprise as it lies in its pack.  -> (r L p), (r L q)"""
    right = surprise.errors[number]
    if number == len(form.matrices):  # the gain: summed over tokens
        return right.new_ones(*right.shape[:2], 1), right
    left = surprise.inputs[number]
    return (right, left) if form.places[number].is_turned else (left, right)


def turned(weight: Tensor, place: Place) -> Tensor:
    return weight.mT if place.is_turned else weight


def norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) over the last axis, and 1 / deviation."""
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()
    return centred * scale, scale


def norm_gradient(of_normed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """From the gradient with respect to norm(x) to that with respect to x."""
    along = (of_normed * normed).mean(dim=-1, keepdim=True)
    return scale * (of_normed - of_normed.mean(dim=-1, keepdim=True) - normed * along)


def gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(z * z * -0.5) * (1 / math.sqrt(2 * math.pi))
    return torch.erf(z * math.sqrt(0.5)) * 0.5 + 0.5 + z * density


def all_read(
    form: Form, given: Given, weights: list[list[Tensor]], queries: list[Tensor], first: Tensor | None
) -> Tensor:
    """Each chunk's queries through the weights it begins with.

    weights: (r p q) by parameter and block; queries: (r c d) of the last blocks; first: what is read already
    """
    blocks = list(zip(*weights, strict=True))[-len(queries) :] if queries else []
    found = [read(form, given, at, x) for at, x in zip(blocks, queries, strict=True)]
    return torch.stack(found if first is None else [first, *found], dim=1)


def read(form: Form, given: Given, at: Sequence[Tensor], queries: Tensor) -> Tensor:
    """at: of every parameter (r p q); queries: (r c d) -> same"""
    x = queries
    for layer, (weight, place) in enumerate(zip(at, form.matrices, strict=False)):
        x = torch.bmm(F.gelu(x) if layer > 0 else x, turned(weight, place))
    gain = given.gain if form.gain is None else at[-1] + 1
    return x if gain is None else norm(x)[0] * gain + queries


# ---- what it does to weights and momenta; each from the slots before a renewal to those before and after its blocks


def by_equations(
    equations: tuple[Equation, ...], slots: Slots, left: Tensor, right: Tensor, gates: Tensor
) -> list[Slots]:
    """The rule's own sums, block by block.  gates: (k G r 1 1)"""
    found = [slots]
    lefts, rights = (part.chunk(len(gates), dim=1) for part in (left, right))
    for block, of_block in enumerate(gates.unbind(0)):
        sums: list[Tensor] = []
        surprise, new = torch.bmm(lefts[block].mT, rights[block]), list(found[-1])
        for equation in equations:
            terms = [(t.gate, value(t.source, found[-1], sums, surprise)) for t in equation.terms]
            sums.append(total([x if gate is None else x * of_block[gate] for gate, x in terms], surprise))
            if equation.slot is not None:
                new[equation.slot] = sums[-1]
        found.append(new)
    return found


def value(source: Source, old: Slots, sums: list[Tensor], surprise: Tensor) -> Tensor:
    if source.kind == "surprise":
        return surprise
    return old[source.number] if source.kind == "old" else sums[source.number]


def total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of what is there; of nothing, zeros."""
    if not parts:
        return torch.zeros_like(like)
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def by_shares(slots: Slots, left: Tensor, right: Tensor, mix: Tensor, shares: Tensor) -> list[Slots]:
    """Sums with shares that depend on the gates alone.  mix: (k r a a), shares: (k r l a)"""
    found = [slots]
    lefts, rights = (part.chunk(len(mix), dim=1) for part in (left, right))
    for block in range(len(mix)):
        new = []
        for slot in range(len(slots)):
            surprise = torch.bmm((lefts[block] * shares[block, :, :, slot, None]).mT, rights[block])
            before = [number for number in range(len(slots)) if number > 0 or slot == 0]  # no momentum is of weights
            old = [found[-1][number] * mix[block, :, slot, number, None, None] for number in before]
            new.append(total(old, surprise) + surprise)
        found.append(new)
    return found


def by_table(slots: Slots, right: Tensor, table: Tensor, per_renewal: int) -> list[Slots]:
    """A gain through all blocks by one product with a table, see `loop.by_table`.  right: (r L d)"""
    num_slots = len(slots)
    head = num_slots + per_renewal - 1
    moved = torch.bmm(table[:, :, :num_slots], torch.cat(slots, dim=1)) + torch.bmm(table[:, :, head:], right)
    rows = [row.clone(memory_format=torch.contiguous_format) for row in moved.split(1, dim=1)]
    between = [[row, *slots[1:]] for row in rows[num_slots:]]  # only weights are looked at inside a renewal
    return [slots, *between, rows[:num_slots]]


# ---- where the base is renewed


def renewed(slots: list[Slots], limit: Tensor | None) -> list[Slots]:
    """Limits of weights and of all gradients, as in `fast_weights.renewal`."""
    weights = {str(number): each[0] for number, each in enumerate(slots)}
    weights = weights if limit is None else limit_growth(weights, limit)
    found = [[weights[str(number)], *each[1:]] for number, each in enumerate(slots)]
    return [[LimitGradient.apply(slot) for slot in each] for each in found]
