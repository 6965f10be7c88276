"""The equations of a rule, written down once instead of run: which sums one chunk works out, in which order.

A rule speaks of `gate * value` and `+` alone (`rules.rule`).  Run with gates and values that only take notes, its two
steps become a list of sums; for Titans with one order of momentum (slot 1; weights are slot 0)

    slot 1 = eta * slot 1 + surprise
    slot 0 = keep * slot 0 + the new slot 1

A loop over chunks can work such sums out in place, and go through them backwards for the gradient.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.rules.gates import KEEP, ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Rule
from titans_pytorch.fast_weights.scale import ZERO, Scale, Zero

Kind = Literal["old", "new", "surprise"]


class Source(NamedTuple):
    """What a sum is made of: a slot as it was, a sum that was worked out before, or the chunk's surprise."""

    kind: Kind
    number: int = 0


class Term(NamedTuple):
    """One part of a sum.  gate: the number of the gate that multiplies it, None: 1"""

    gate: int | None
    source: Source


class Equation(NamedTuple):
    """A sum, and the slot that it becomes; None: others are made of it."""

    terms: tuple[Term, ...]
    slot: int | None


class Equations(NamedTuple):
    """What a chunk works out, in order, with the gates of all chunks."""

    each: tuple[Equation, ...]
    gates: list[Tensor]  # (r n) each, of channels (r j n)


class Value:
    """Something that an equation speaks of."""

    def __add__(self, other: Any) -> Value:
        return self if isinstance(other, Zero) else Total((*terms_of(self), *terms_of(other)))

    __radd__ = __add__


class Known(Value):
    """What is there before the chunk."""

    def __init__(self, source: Source) -> None:
        self.source = source


class Total(Value):
    """A sum.  parts: (gate or None for 1, value) each"""

    def __init__(self, parts: tuple[tuple[Tensor | None, Value], ...]) -> None:
        self.parts = parts


class Product(Value):
    """A gate times something."""

    def __init__(self, gate: Tensor, value: Value) -> None:
        self.gate, self.value = gate, value


class NotedGate(Scale):
    """A gate of every chunk that takes notes of what it multiplies."""

    def __mul__(self, x: Any) -> Any:
        return x if isinstance(x, Zero) else Product(self.value, settled(x))

    def __rsub__(self, one: float) -> NotedGate:
        return NotedGate(one - self.value)


def terms_of(value: Any) -> tuple[tuple[Tensor | None, Value], ...]:
    if isinstance(value, Product):
        return ((value.gate, value.value),)
    if isinstance(value, Value):
        return ((None, value),)
    raise TypeError(f"a rule adds values to values, got {type(value).__name__}")


def settled(value: Any) -> Value:
    """A product that is used again becomes a sum of one term."""
    return Total(terms_of(value)) if isinstance(value, Product) or not isinstance(value, Value) else value


def equations_of(rule: Rule, gates: Gates) -> Equations | None:
    """A rule's equations for one chunk after the other; None: it does more than multiply by gates and add."""
    values: dict[str, list[Any]] = {
        name: [NotedGate(log.exp()) for log in logs] for name, logs in gates.factors.items()
    }
    values |= {name: [NotedGate(share) for share in shares] for name, shares in gates.shares.items()}
    noted = ChunkGates(values, None)
    surprise, weights = Known(Source("surprise")), Known(Source("old", 0))
    momenta: Any = tuple(Known(Source("old", 1 + order)) for order in range(rule.num_momenta))
    try:
        step, moved = rule.move(momenta, surprise, noted)  # type: ignore[arg-type]
        kept = rule.retain(weights, step, noted, ZERO)  # type: ignore[arg-type]
        return in_order([settled(kept), *map(settled, moved)], gates.is_stored)
    except (AttributeError, TypeError):  # whatever else a rule of somebody's own does, its coefficients know
        return None


def can_note(rule: Rule) -> bool:
    """Whether the equations of a rule can be written down."""
    logs = {gate.name: torch.zeros(gate.number, 1, 1) for gate in rule.gates if gate.kind in ("factor", "decay")}
    shares = {gate.name: torch.ones(gate.number, 1, 1) for gate in rule.gates if gate.kind == "share"}
    return equations_of(rule, Gates({KEEP: torch.zeros(1, 1, 1)} | logs, shares, None)) is not None


def in_order(slots: list[Value], is_stored: Tensor | None) -> Equations:
    """Sums in an order in which each is worked out after what it is made of.  slots: what becomes of each"""
    found: list[Equation] = []
    gates: list[Tensor] = []
    numbers: dict[int, int] = {}
    of_slot = {id(value): slot for slot, value in reversed(list(enumerate(slots)))}

    def gate_number(gate: Tensor) -> int:
        for number, known in enumerate(gates):
            if known is gate:
                return number
        gates.append(gate)
        return len(gates) - 1

    def source(value: Value) -> Source:
        if isinstance(value, Known):
            return value.source
        if id(value) not in numbers:
            write(value, of_slot.get(id(value)))
        return Source("new", numbers[id(value)])

    def write(value: Value, slot: int | None) -> None:
        parts = value.parts if isinstance(value, Total) else ((None, value),)
        terms = [Term(None if gate is None else gate_number(gate), source(part)) for gate, part in inlined(parts)]
        numbers[id(value)] = len(found)
        found.append(Equation(tuple(terms), slot))

    uses = counted_uses(slots)

    def inlined(parts: tuple[tuple[Tensor | None, Value], ...]) -> list[tuple[Tensor | None, Value]]:
        """Sums that nothing else is made of, as parts of what they are added to."""
        flat: list[tuple[Tensor | None, Value]] = []
        for gate, part in parts:
            is_own = gate is None and isinstance(part, Total) and uses[id(part)] == 1 and id(part) not in of_slot
            flat += inlined(part.parts) if is_own and isinstance(part, Total) else [(gate, part)]
        return flat

    for slot, value in enumerate(slots):
        if of_slot[id(value)] != slot or isinstance(value, Known):  # the same as another slot, or as it was
            found.append(Equation((Term(None, source(value)),), slot))
        elif id(value) not in numbers:
            write(value, slot)
    made = Equations(tuple(found), gates)
    return made if is_stored is None else where_stored(made, is_stored)


def counted_uses(slots: list[Value]) -> dict[int, int]:
    """How often each sum is a part of another."""
    uses: dict[int, int] = {}
    waiting, seen = list(slots), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, Total):
            continue
        seen.add(id(value))
        for _, part in value.parts:
            uses[id(part)] = uses.get(id(part), 0) + 1
            waiting.append(part)
    return uses


def where_stored(made: Equations, is_stored: Tensor) -> Equations:
    """Equations under which a chunk without anything to store leaves every slot as it was.  is_stored: (r n)"""
    gates = list(made.gates)

    def only_stored(gate: int | None, otherwise: float) -> int:
        value = is_stored.new_ones((), dtype=gates[0].dtype) if gate is None else made.gates[gate]
        gates.append(torch.where(is_stored if value.ndim < 3 else is_stored.unsqueeze(1), value, otherwise))
        return len(gates) - 1

    def of(equation: Equation) -> Equation:
        if equation.slot is None:
            return equation
        own = Source("old", equation.slot)
        terms = [Term(only_stored(t.gate, float(t.source == own)), t.source) for t in equation.terms]
        if all(term.source != own for term in terms):
            gates.append((~is_stored).to(gates[0].dtype))
            terms.append(Term(len(gates) - 1, own))
        return Equation(tuple(terms), equation.slot)

    return Equations(tuple(map(of, made.each)), gates)


# ---- what a loop asks of them


def moves_in_place(equations: tuple[Equation, ...]) -> bool:
    """Whether no equation looks at a momentum as it was after another one has moved it."""
    moved: set[int] = set()
    for equation in equations:
        if any(term.source.kind == "old" and term.source.number in moved for term in equation.terms):
            return False
        moved |= set() if equation.slot is None else {equation.slot}
    return True


def sorted_terms(equation: Equation) -> tuple[list[Source], list[tuple[int, Source]]]:
    """What an equation adds as it is, and what it multiplies by gates."""
    plain = [term.source for term in equation.terms if term.gate is None]
    return plain, [(term.gate, term.source) for term in equation.terms if term.gate is not None]


def num_sums(equations: tuple[Equation, ...]) -> int:
    """How many sums there are to keep beside the slots."""
    return sum(equation.slot is None for equation in equations) + gates_surprise(equations)


def gates_surprise(equations: tuple[Equation, ...]) -> bool:
    """Whether a gate multiplies the surprise itself."""
    return any(t.gate is not None and t.source.kind == "surprise" for equation in equations for t in equation.terms)


def gates_new_momentum(equations: tuple[Equation, ...]) -> bool:
    """Whether a gate multiplies a momentum that has just been moved."""
    gated = [term.source for equation in equations for term in equation.terms if term.gate is not None]
    return any(source.kind == "new" and equations[source.number].slot for source in gated)


def carrier_of(equations: tuple[Equation, ...]) -> int:
    """The one equation that adds the surprise as it is, so its gradient is that of the surprise; -1: none is."""
    uses = [(number, t.gate) for number, e in enumerate(equations) for t in e.terms if t.source.kind == "surprise"]
    return uses[0][0] if len(uses) == 1 and uses[0][1] is None else -1


def adds_to_momentum(equations: tuple[Equation, ...], carrier: int) -> bool:
    """Whether the surprise alone is added as it is, and to a momentum: those lie in one piece, weights do not."""
    if carrier < 0:
        return False
    plain, _ = sorted_terms(equations[carrier])
    return len(plain) == 1 and (equations[carrier].slot or 0) > 0


def takers_of(equations: tuple[Equation, ...], number: int) -> list[tuple[int, int | None]]:
    """The slots whose equations take what another one has just worked out, and by which gates."""
    return [
        (equation.slot, term.gate)
        for equation in equations
        for term in equation.terms
        if equation.slot is not None and term.source == Source("new", number)
    ]


def sums_new_slots(equations: tuple[Equation, ...]) -> bool:
    """Whether a sum that becomes no slot is made of slots that have just been worked out."""
    sources = [term.source for equation in equations for term in equation.terms if equation.slot is None]
    return any(source.kind == "new" and equations[source.number].slot is not None for source in sources)
