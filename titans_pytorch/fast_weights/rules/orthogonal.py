"""Orthogonal steps: five Newton-Schulz iterations towards the nearest matrix with equal singular values.

Each iteration multiplies t from the left by a polynomial of A = t t^T,  t <- P t with P = a + b A + c A A.  All P
commute with A, so the iterations can run on the small square side alone,  A <- P A P = A P^2;  t is touched twice.

What comes out is F t, F being the product of all P: the singular values of t after one function, which makes the
Jacobian symmetric. So the gradient is the derivative in the direction G of the gradient that comes in,

    F G + F' t     F' being that of F where A moves by  A' = G t^T + t G^T

and it is made of squares on the small side, that cost one product each:  (A A)' = A A' + (A A')^T.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.fast_weights.inner_gradient import is_transformed, plus_product
from titans_pytorch.fast_weights.norms import safe_norm
from titans_pytorch.fast_weights.noted import current_notes
from titans_pytorch.fast_weights.precision import full_precision
from titans_pytorch.fast_weights.rules.gates import ChunkGates, Gates
from titans_pytorch.fast_weights.rules.rule import Coefficients, Rule, Term

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-7

CACHED_BYTES = 1 << 20
"""Square matrices that a CPU works on at once, found on one with 2 MB of cache: what is made of them stays in there"""


class Orthogonal(Rule):
    """Another rule, whose step of every matrix is made orthogonal before it is added."""

    why_built = "spectral_norm_surprises, which acts on every step"

    def __init__(self, rule: Rule) -> None:
        self.rule, self.gates, self.num_momenta = rule, rule.gates, rule.num_momenta
        self.is_linear, self.uses_start = rule.is_linear, rule.uses_start
        self.forgets_first, self.window = rule.forgets_first, rule.window
        self.transform = orthogonalised

    def move(self, momenta: tuple[Term, ...], surprise: Term, gates: ChunkGates) -> tuple[Term, tuple[Term, ...]]:
        """What the other rule adds, before it is made orthogonal."""
        return self.rule.move(momenta, surprise, gates)

    def retain(self, weights: Term, step: Term, gates: ChunkGates, start: Term) -> Term:
        """What the other rule keeps."""
        return self.rule.retain(weights, step, gates, start)

    def begun(self, weights: Tensor) -> Tensor:
        """What a learned start stands for to the other rule."""
        return self.rule.begun(weights)

    def coefficients(self, gates: Gates) -> Coefficients:
        """Those of the other rule: `transform` acts between its step and its weights."""
        return self.rule.coefficients(gates)


def orthogonalised(t: Tensor) -> Tensor:
    """t: (... i j) -> (... i j), every matrix on its own"""
    flat = t.flatten(0, -3)
    parts = slices(flat)
    notes = current_notes()
    if is_transformed():
        out = joined([iterated(part) for part in parts])
    elif flat.requires_grad and torch.is_grad_enabled():
        out = Iterated.apply(flat, *notes.taken(len(parts)))
    else:
        out = applied((notes.noted(partial(whole_factor, part)) for part in parts), flat)
    return out.unflatten(0, t.shape[:-2])


class Iteration(NamedTuple):
    """One iteration on the small side.  (m i i) each, symmetric"""

    gram: Tensor  # A before it
    step: Tensor  # P
    factor: Tensor  # F after it, the product of all P so far


class Iterated(torch.autograd.Function):
    """All iterations.  Of what they make, the Gram matrices are kept, which cost most to make and to a quarter fill it.

    known: the factor of each part, if an earlier run noted it; then nothing is kept, and they are made on the way back
    (m i j) -> same
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, *known: Tensor) -> Tensor:
        ctx.num_known = len(known)
        if known:
            ctx.save_for_backward(t, *known)
            return applied(known, t)
        factors: list[Tensor] = []
        kept: list[Tensor] = []
        for part in slices(t):
            gram, norm = scaled_gram(part)
            done = list(iterations(gram))
            factors.append(done[-1].factor / norm)
            kept += [iteration.gram for iteration in done[1:]]
        ctx.save_for_backward(t, *kept)
        return applied(factors, t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        t, *kept = ctx.saved_tensors
        parts = slices(t)
        if torch.is_grad_enabled():  # it will be differentiated itself, so all is made of t again
            kept = []
        known, grams = (kept, []) if ctx.num_known else ([], kept)
        size = len(grams) // len(parts)
        out = torch.empty_like(t) if len(parts) > 1 and not torch.is_grad_enabled() else None
        places = [None] * len(parts) if out is None else slices(out)
        of_parts = gradient.split([len(part) for part in parts])
        with full_precision(gradient):
            found = [
                gradient_of_iterated(
                    part, of_part, grams[i * size : (i + 1) * size], known[i] if known else None, places[i]
                )
                for i, (part, of_part) in enumerate(zip(parts, of_parts, strict=True))
            ]
        return joined(found) if out is None else out, *(None,) * ctx.num_known


def iterated(t: Tensor) -> Tensor:
    """All iterations, of which nothing is kept.  (m i j) -> same"""
    return torch.bmm(*on_small_side(whole_factor(t), t))


def whole_factor(t: Tensor) -> Tensor:
    """What all iterations multiply with, the division by the norm included.  (m i j) -> (m i i), (m j j)"""
    gram, norm = scaled_gram(t)
    (last,) = deque(iterations(gram), maxlen=1)
    return last.factor / norm


def gradient_of_iterated(
    t: Tensor, gradient: Tensor, kept: Sequence[Tensor], known: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """The gradient of what went in, for that of what came out.  (m i j) each -> same

    With the norm n of t, u = t / n and the gradient G of u, which is found as the head of this file says, that of t is
    (G - u <u, G>) / n.  Both are sums of t and the gradient that came in, with factors that are made on the small side.
    kept: the Gram matrices of all iterations but the first; none: they are made again
    known: `whole_factor` of t, if an earlier run noted it; out: where it is written to
    """
    gram, norm = scaled_gram(t)
    half_move = small_side(t, gradient) / norm
    moves = doubled(half_move)
    factor, change = factor_and_change(iterations(gram, kept, known), half_move)
    whole = factor / norm if known is None else known
    along = (change * gram).add(whole * moves * norm, alpha=0.5).sum(dim=(-2, -1), keepdim=True)
    along = torch.where(norm > SMALLEST_NORM, along, 0.0)  # a norm that is clamped does not move
    change = torch.addcmul(change, along, eye_like(gram), value=-1) / norm.square()
    return torch.bmm(*on_small_side(whole, gradient), out=out).baddbmm_(*on_small_side(change, t))


def iterations(gram: Tensor, later: Sequence[Tensor] = (), last: Tensor | None = None) -> Iterator[Iteration]:
    """All iterations, from the Gram matrices of what they begin with.  (m i i)

    later: those that follow, if they are known; last: what is handed on as the factor after all iterations
    """
    constant = COEFFICIENTS[0] * eye_like(gram)
    step = factor = polynomial(gram, constant)
    yield Iteration(gram, step, factor)
    for number in range(NUM_ITERATIONS - 1):
        gram = later[number] if later else torch.bmm(torch.bmm(gram, step), step)
        step = polynomial(gram, constant)
        is_last = number == NUM_ITERATIONS - 2
        factor = torch.bmm(step, factor) if last is None or not is_last else last
        yield Iteration(gram, step, factor)


def factor_and_change(done: Iterable[Iteration], half_move: Tensor) -> tuple[Tensor, Tensor]:
    """F and F' after all iterations, where the first Gram matrix A moves by A' = H + H^T.  half_move: H, (m i i)

    Products are added to what has just been made, in place, which reads and writes less.
    """
    _, b, c = COEFFICIENTS
    rest = iter(done)
    last = next(rest)
    moves = doubled(half_move)
    change = step_moves = doubled(half_move.baddbmm_(last.gram, moves, beta=b, alpha=c))  # P' = b A' + c (A A)'
    for iteration in rest:
        half_move = torch.bmm(step_moves, last.gram).baddbmm_(last.step, moves, alpha=0.5)
        half_move = torch.bmm(half_move, last.step)  # of (P A P)'
        moves = doubled(half_move)
        step_moves = doubled(half_move.baddbmm_(iteration.gram, moves, beta=b, alpha=c))
        change = torch.bmm(step_moves, last.factor).baddbmm_(iteration.step, change)  # (P F)' = P' F + P F'
        last = iteration
    return last.factor, change


def polynomial(gram: Tensor, constant: Tensor) -> Tensor:
    """P = a + b A + c A A.  constant: a, (i i) -> (m i i)"""
    _, b, c = COEFFICIENTS
    return plus_product(torch.add(constant, gram, alpha=b), gram, gram, alpha=c)


def scaled_gram(t: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrices of matrices of norm 1, and the norms that these have had.  (m i j) -> (m i i), (m 1 1)"""
    gram = small_side(t, t)
    square = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    norm = safe_norm(square).clamp(min=SMALLEST_NORM)[:, None, None]
    return gram / norm.square(), norm


def doubled(x: Tensor) -> Tensor:
    """A matrix and its transpose: twice the symmetric part.  (m i i) -> same"""
    return x + x.mT


def eye_like(gram: Tensor) -> Tensor:
    """(m i i) -> (i i)"""
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def small_side(x: Tensor, y: Tensor) -> Tensor:
    """Products of the rows of two matrices, of their columns if these are fewer.  (m i j) each -> (m i i), (m j j)"""
    return torch.bmm(x.mT, y) if x.shape[-2] > x.shape[-1] else torch.bmm(x, y.mT)


def on_small_side(factor: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What to multiply: a symmetric factor (m i i) before t (m i j), or one (m j j) behind it."""
    return (t, factor.mT) if t.shape[-2] > t.shape[-1] else (factor, t)


def applied(factors: Iterable[Tensor], t: Tensor) -> Tensor:
    """The factor of every part, on its small side; without a graph.  (m i j) -> same"""
    parts = slices(t)
    if len(parts) == 1:
        (factor,) = factors
        return torch.bmm(*on_small_side(factor, t))
    out = torch.empty_like(t)
    for factor, part, to in zip(factors, parts, slices(out), strict=True):
        torch.bmm(*on_small_side(factor, part), out=to)
    return out


def slices(matrices: Tensor) -> Sequence[Tensor]:
    """All of the matrices (m i j), on a CPU in parts that stay in its cache."""
    if matrices.device.type != "cpu" or torch.compiler.is_compiling():
        return [matrices]
    _, *shape = matrices.shape
    return matrices.split(max(1, CACHED_BYTES // (min(shape) ** 2 * matrices.element_size())))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one again."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
