"""The whole loop over renewals in one kernel: a program is a row, and its weights never leave the processor.

One renewal is a chunk, read before it is stored, at the weights W = W_1 and V = W_2^T (d h each):

    reads = Q + g X(gelu(Q W) V^T)
    Z1 = K W,  A = gelu(Z1),  Z2 = A V^T,  X = norm(Z2),  E = g X + K - v,  P = t g E
    D2 = N(P),  B = D2 V,  D1 = B gelu'(Z1)                      minus the gradients; t: descent, 0 or less
    S_W = eta S_W + K^T D1,  W = keep W + S_W                    (10, 14), (13)
    S_V = eta S_V + D2^T A,  V = keep V + S_V

(where a chunk stores nothing, eta and keep are 1 and no momentum is added)
and then, where W and V together have outgrown the limit, both are scaled back to it.
The letters in shapes: `n` renewals, `r` rows, `c` tokens of a chunk; a state (r 4 d h) is W, V, S_W, S_V.
"""

from __future__ import annotations

from titans_pytorch.kernels.formulas import gelu, gelu_slope, normalised, through_norm
from titans_pytorch.kernels.language import tl, triton


@triton.jit
def in_state(row: tl.tensor, part: tl.constexpr, D: tl.constexpr, H: tl.constexpr) -> tl.tensor:
    """Where a part of a row's state lies: 0 W, 1 V, 2 S_W, 3 S_V.  -> (d h)"""
    return (row * 4 + part) * D * H + tl.arange(0, D)[:, None] * H + tl.arange(0, H)[None, :]


@triton.jit
def in_tokens(chunk: tl.tensor, LENGTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Where a chunk's features lie, and which of its C tokens are there; the others count as 0.  -> (c d), (c 1)"""
    token = tl.arange(0, C)[:, None]
    return (chunk * LENGTH + token) * D + tl.arange(0, D)[None, :], token < LENGTH


@triton.jit
def stored(
    k: tl.tensor,
    values: tl.tensor,
    descent: tl.tensor,
    g: tl.tensor,
    w: tl.tensor,
    v: tl.tensor,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Minus the gradients at both layers, and what W_2 was given: D1, D2, A.  k: (c d) -> (c h), (c d), (c h)"""
    z1 = tl.dot(k, w, input_precision=PRECISION)
    act = gelu(z1)
    normed, rstd = normalised(tl.dot(act, tl.trans(v), input_precision=PRECISION), D)
    p = descent * g * (g * normed + k - values)
    d2 = through_norm(p, normed, rstd, D)
    return tl.dot(d2, v, input_precision=PRECISION) * gelu_slope(z1), d2, act


@triton.jit
def read(q: tl.tensor, g: tl.tensor, w: tl.tensor, v: tl.tensor, D: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """The memory's answers.  q: (c d) -> (c d)"""
    act = gelu(tl.dot(q, w, input_precision=PRECISION))
    normed, _ = normalised(tl.dot(act, tl.trans(v), input_precision=PRECISION), D)
    return q + g * normed


@triton.jit
def added(stores: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """The share of the momentum that is added to the weights: none where a chunk stores nothing."""
    share = 1.0
    if stores is not None:
        share = tl.load(stores + chunk)
    return share


@triton.jit
def shrinking(w: tl.tensor, v: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """The factor that brings W and V back to their limit; 1 where they have not outgrown it, or are not finite."""
    norm = tl.sqrt_rn(tl.sum(w * w) + tl.sum(v * v))
    return tl.where(norm > limit, limit / norm, 1.0)


@triton.jit
def moved(old: tl.tensor, left: tl.tensor, right: tl.tensor, eta: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Momentum after a chunk.  left: (c d), right: (c h), old: (d h) -> (d h)"""
    return tl.dot(tl.trans(left), right, acc=eta * old, input_precision=PRECISION)  # eqs. 10, 14


@triton.jit
def moved_in_memory(
    home: tl.tensor,
    copy: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    eta: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """`moved`, of a momentum that lies in memory and goes back there.

    home: pointers (d h); copy: pointers to where the old one is kept, or None
    """
    tl.debug_barrier()  # what was stored in the renewal before may have been stored by other threads
    old = tl.load(home)
    if copy is not None:
        tl.store(copy, old)
    new = moved(old, left, right, eta, PRECISION)
    tl.debug_barrier()
    tl.store(home, new)
    return new


@triton.jit
def loop_kernel(
    keys: tl.tensor,  # (n r c d), like values, queries, reads
    values: tl.tensor,
    descents: tl.tensor,  # (n r c)
    queries: tl.tensor,
    keep: tl.tensor,  # (n r), like eta, shrinks
    eta: tl.tensor,
    gain: tl.tensor,  # (r d)
    limit: tl.tensor,  # (r) or None
    stores: tl.tensor,  # (n r), 1 where a chunk stores anything, else 0; or None
    state: tl.tensor,  # (r 4 d h), like last
    reads: tl.tensor,
    last: tl.tensor,
    states: tl.tensor,  # (n r 4 d h), before each renewal, or None
    shrinks: tl.tensor,  # what each renewal's weights were scaled by at its end, or None
    count: int,
    rows: int,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    MOMENTA_STAY: tl.constexpr,  # in registers; else they are fetched for every renewal, and leave room
) -> None:
    """All renewals of one row, forward."""
    row = tl.program_id(0).to(tl.int64)
    w, v = tl.load(state + in_state(row, 0, D, H)), tl.load(state + in_state(row, 1, D, H))
    sw, sv = tl.load(state + in_state(row, 2, D, H)), tl.load(state + in_state(row, 3, D, H))
    home_w, home_v = last + in_state(row, 2, D, H), last + in_state(row, 3, D, H)
    if not MOMENTA_STAY:
        tl.store(home_w, sw)
        tl.store(home_v, sv)
    g = tl.load(gain + row * D + tl.arange(0, D))[None, :]
    for n in range(count):
        chunk = n * rows + row
        here, is_there = in_tokens(chunk, LENGTH, C, D)
        token = chunk * LENGTH + tl.arange(0, C)[:, None]
        if states is not None:
            tl.store(states + in_state(chunk, 0, D, H), w)
            tl.store(states + in_state(chunk, 1, D, H), v)
        q = tl.load(queries + here, mask=is_there, other=0.0)
        tl.store(reads + here, read(q, g, w, v, D, PRECISION), mask=is_there)
        k = tl.load(keys + here, mask=is_there, other=0.0)
        value = tl.load(values + here, mask=is_there, other=0.0)
        descent = tl.load(descents + token, mask=is_there, other=0.0)
        d1, d2, act = stored(k, value, descent, g, w, v, D, PRECISION)
        e = tl.load(eta + chunk)
        copy_w, copy_v = None, None
        if states is not None:
            copy_w, copy_v = states + in_state(chunk, 2, D, H), states + in_state(chunk, 3, D, H)
        if MOMENTA_STAY:
            if states is not None:
                tl.store(copy_w, sw)
                tl.store(copy_v, sv)
            sw, sv = moved(sw, k, d1, e, PRECISION), moved(sv, d2, act, e, PRECISION)
            step_w, step_v = sw, sv
        else:
            step_w = moved_in_memory(home_w, copy_w, k, d1, e, PRECISION)
            step_v = moved_in_memory(home_v, copy_v, d2, act, e, PRECISION)
        kept, share = tl.load(keep + chunk), added(stores, chunk)
        w, v = kept * w + share * step_w, kept * v + share * step_v  # eq. 13
        if limit is not None:
            shrink = shrinking(w, v, tl.load(limit + row))
            w, v = w * shrink, v * shrink
            if shrinks is not None:
                tl.store(shrinks + chunk, shrink)
    tl.store(last + in_state(row, 0, D, H), w)
    tl.store(last + in_state(row, 1, D, H), v)
    if MOMENTA_STAY:
        tl.store(home_w, sw)
        tl.store(home_v, sv)
