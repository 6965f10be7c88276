"""The backward pass of the whole loop over renewals, in one kernel: as `loop`, from the last renewal to the first.

x' is the gradient with respect to x. That of the state after a renewal becomes that of the state before it:

    U = S' + W',  S' = eta U,  W' = keep W',  keep' = <W', W>,  eta' = <U, S>                (both layers)
    D1' = K U_W,  A' = D2 U_V,  B' = D1' gelu'(Z1),  q = A U_V^T + B' V^T,  P' = N(q)
    Z2' = N(t g^2 P' - rstd m(P X) q) - rstd m(q X) D2 - rstd m(q D2) X
    A' += Z2' V,  Z1' = A' gelu'(Z1) + D1' B gelu''(Z1)
    W' += K^T Z1',  V' += Z2'^T A + D2^T B',  K' = D1 U_W^T + Z1' W^T + t g P'

What the forward pass computed on the way is computed again, from the state before every renewal. The hidden units are
taken a tile at a time, as in `loop_tiled`: once for what is summed over them (Z2 and q), once for what follows from it.
A state's gradient lies in memory, in `of_state`.
"""

from __future__ import annotations

from titans_pytorch.kernels.carried_gradient import before_shrinking, measured, within
from titans_pytorch.kernels.formulas import (
    gelu,
    gelu_curvature,
    gelu_slope,
    mean,
    normalised,
    through_norm,
    through_norm_twice,
)
from titans_pytorch.kernels.language import tl, triton
from titans_pytorch.kernels.loop import added, in_tokens
from titans_pytorch.kernels.loop_tiled import through_tile, tile_of


@triton.jit
def steps_of_tile(
    of_state: tl.tensor,
    states: tl.tensor,
    after: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    at_after: tl.tensor,
    tile: int,
    shorts: tl.tensor,
    limit: tl.tensor,
    shrink: tl.tensor,
    kept: tl.tensor,
    share: tl.tensor,
    bound: float,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PART: tl.constexpr,  # 0: W and S_W, 1: V and S_V
) -> tl.tensor:
    """A tile of U, the weight before the renewal, and what is due to keep and eta.

    keep W' and U take the places of W' and S' in `of_state`
    """
    to_weight = tile_of(of_state, row, PART, tile, D, H, T)
    to_momentum = tile_of(of_state, row, PART + 2, tile, D, H, T)
    of_weight = within(tl.load(to_weight), bound) * shorts[PART]
    if limit is not None:
        newer = tl.load(tile_of(after, at_after, PART, tile, D, H, T))
        of_weight = before_shrinking(of_weight, newer, shorts[4], limit, shrink)
    u = within(tl.load(to_momentum), bound) * shorts[PART + 2] + share * of_weight
    weight = tl.load(tile_of(states, at, PART, tile, D, H, T))
    momentum = tl.load(tile_of(states, at, PART + 2, tile, D, H, T))
    tl.debug_barrier()
    tl.store(to_weight, kept * of_weight)
    tl.store(to_momentum, u)
    return u, weight, tl.sum(of_weight * weight), tl.sum(u * momentum)


@triton.jit
def middle(
    k: tl.tensor,
    values: tl.tensor,
    descent: tl.tensor,
    g: tl.tensor,
    z2: tl.tensor,
    of_d2: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """What follows from Z2 and q: D2, the gradients of Z2, of K - v (c d), of descents (c) and of the gain (d)."""
    normed, rstd = normalised(z2, D)
    e = g * normed + k - values
    p = descent * g * e
    d2 = through_norm(p, normed, rstd, D)
    of_p = through_norm(of_d2, normed, rstd, D)
    of_e = descent * g * of_p
    of_z2 = through_norm_twice(of_d2, g * of_e, normed, rstd, d2, mean(p * normed, D), D)
    of_descent = tl.sum(of_p * g * e, 1)
    return d2, of_z2, of_e, of_descent, tl.sum(descent * of_p * e + of_e * normed, 0)


@triton.jit
def storing_tile(
    k: tl.tensor,
    d2: tl.tensor,
    of_z2: tl.tensor,
    w: tl.tensor,
    v: tl.tensor,
    u_w: tl.tensor,
    u_v: tl.tensor,
    of_k: tl.tensor,
    of_w: tl.tensor,
    of_v: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """A tile's part in the gradients of keys (c d), and its own of W and V (d T), each added to what there was."""
    z1 = tl.dot(k, w, input_precision=PRECISION)
    slope = gelu_slope(z1)
    b = tl.dot(d2, v, input_precision=PRECISION)
    of_d1 = tl.dot(k, u_w, input_precision=PRECISION)
    of_act = tl.dot(d2, u_v, input_precision=PRECISION)
    of_act = tl.dot(of_z2, v, acc=of_act, input_precision=PRECISION)
    of_z1 = of_act * slope + of_d1 * b * gelu_curvature(z1)
    of_w = tl.dot(tl.trans(k), of_z1, acc=of_w, input_precision=PRECISION)
    of_v = tl.dot(tl.trans(d2), of_d1 * slope, acc=of_v, input_precision=PRECISION)
    of_v = tl.dot(tl.trans(of_z2), gelu(z1), acc=of_v, input_precision=PRECISION)
    of_k = tl.dot(of_z1, tl.trans(w), acc=of_k, input_precision=PRECISION)
    of_k = tl.dot(b * slope, tl.trans(u_w), acc=of_k, input_precision=PRECISION)
    return of_k, of_w, of_v


@triton.jit
def reading_tile(
    q: tl.tensor,
    of_z2: tl.tensor,
    w: tl.tensor,
    v: tl.tensor,
    of_q: tl.tensor,
    of_w: tl.tensor,
    of_v: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """A tile's part in the gradients of queries (c d), and its own of W and V (d T), each added to what there was."""
    z1 = tl.dot(q, w, input_precision=PRECISION)
    of_z1 = tl.dot(of_z2, v, input_precision=PRECISION) * gelu_slope(z1)
    of_w = tl.dot(tl.trans(q), of_z1, acc=of_w, input_precision=PRECISION)
    of_v = tl.dot(tl.trans(of_z2), gelu(z1), acc=of_v, input_precision=PRECISION)
    of_q = tl.dot(of_z1, tl.trans(w), acc=of_q, input_precision=PRECISION)
    return of_q, of_w, of_v


@triton.jit
def sums_over_tiles(
    k: tl.tensor,
    q: tl.tensor,
    of_state: tl.tensor,
    states: tl.tensor,
    after: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    at_after: tl.tensor,
    shorts: tl.tensor,
    limit: tl.tensor,
    shrink: tl.tensor,
    kept: tl.tensor,
    share: tl.tensor,
    BOUND: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """What is summed over hidden units: Z2 of keys, the gradient of D2, Z2 of queries (c d), keep' and eta'.

    at, at_after: where the states before and after the renewal lie, in `states` and in `after`
    """
    due_keep, due_eta = 0.0, 0.0
    z2, of_d2, z2_read = tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32)
    for tile in range(H // T):
        u_w, w, keep_w, eta_w = steps_of_tile(
            of_state, states, after, row, at, at_after, tile, shorts, limit, shrink, kept, share, BOUND, D, H, T, 0
        )
        u_v, v, keep_v, eta_v = steps_of_tile(
            of_state, states, after, row, at, at_after, tile, shorts, limit, shrink, kept, share, BOUND, D, H, T, 1
        )
        due_keep += keep_w + keep_v
        due_eta += eta_w + eta_v
        z1 = tl.dot(k, w, input_precision=PRECISION)
        act, of_b = gelu(z1), tl.dot(k, u_w, input_precision=PRECISION) * gelu_slope(z1)
        z2 = tl.dot(act, tl.trans(v), acc=z2, input_precision=PRECISION)
        of_d2 = tl.dot(act, tl.trans(u_v), acc=of_d2, input_precision=PRECISION)
        of_d2 = tl.dot(of_b, tl.trans(v), acc=of_d2, input_precision=PRECISION)
        z2_read = through_tile(q, w, v, z2_read, PRECISION)
    return z2, of_d2, z2_read, due_keep, due_eta


@triton.jit
def through_tiles(
    k: tl.tensor,
    q: tl.tensor,
    d2: tl.tensor,
    of_z2: tl.tensor,
    of_z2_read: tl.tensor,
    of_k: tl.tensor,
    of_q: tl.tensor,
    of_state: tl.tensor,
    states: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    eta: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Gradients of keys and queries (c d), with what they had before; `of_state` becomes that of the state before."""
    tl.debug_barrier()  # a tile may be loaded by other threads than those that have stored it
    for tile in range(H // T):
        to_w, to_v = tile_of(of_state, row, 0, tile, D, H, T), tile_of(of_state, row, 1, tile, D, H, T)
        to_sw, to_sv = tile_of(of_state, row, 2, tile, D, H, T), tile_of(of_state, row, 3, tile, D, H, T)
        w, v = tl.load(tile_of(states, at, 0, tile, D, H, T)), tl.load(tile_of(states, at, 1, tile, D, H, T))
        u_w, u_v, of_w, of_v = tl.load(to_sw), tl.load(to_sv), tl.load(to_w), tl.load(to_v)
        of_k, of_w, of_v = storing_tile(k, d2, of_z2, w, v, u_w, u_v, of_k, of_w, of_v, PRECISION)
        of_q, of_w, of_v = reading_tile(q, of_z2_read, w, v, of_q, of_w, of_v, PRECISION)
        tl.debug_barrier()
        tl.store(to_w, of_w)
        tl.store(to_v, of_v)
        tl.store(to_sw, eta * u_w)
        tl.store(to_sv, eta * u_v)
    tl.debug_barrier()
    return of_k, of_q


@triton.jit
def loop_backward_kernel(
    keys: tl.tensor,  # (n r c d), like values, queries, of_reads and the gradients of the first three
    values: tl.tensor,
    descents: tl.tensor,  # (n r c)
    queries: tl.tensor,
    keep: tl.tensor,  # (n r), like eta, shrinks
    eta: tl.tensor,
    gain: tl.tensor,  # (r d)
    limit: tl.tensor,  # (r) or None
    stores: tl.tensor,  # (n r), 1 where a chunk stores anything, else 0; or None
    states: tl.tensor,  # (n r 4 d h), before each renewal
    last: tl.tensor,  # (r 4 d h)
    shrinks: tl.tensor,  # None without a limit
    of_reads: tl.tensor,
    of_state: tl.tensor,  # (r 4 d h), goes in as the gradient of the last state and comes out as that of the first
    of_keys: tl.tensor,
    of_values: tl.tensor,
    of_descents: tl.tensor,
    of_queries: tl.tensor,
    of_keep: tl.tensor,
    of_eta: tl.tensor,
    of_gain: tl.tensor,
    of_limit: tl.tensor,
    count: int,
    rows: int,
    BOUND: tl.constexpr,  # of the norm of a gradient that passes from one renewal to the one before
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """All renewals of one row, backward."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(gain + row * D + tl.arange(0, D))[None, :]
    sum_gain, sum_limit = tl.zeros([D], tl.float32), 0.0
    after, at_after = last, row
    for back in range(count):
        chunk = (count - 1 - back) * rows + row
        here, is_there = in_tokens(chunk, LENGTH, C, D)
        token = chunk * LENGTH + tl.arange(0, C)
        k = tl.load(keys + here, mask=is_there, other=0.0)
        q = tl.load(queries + here, mask=is_there, other=0.0)

        shorts = measured(of_state, after, row, at_after, BOUND, D, H, T)
        most, shrink = None, None
        if limit is not None:
            most, shrink = tl.load(limit + row), tl.load(shrinks + chunk)
            sum_limit += tl.where(shrink < 1, shorts[4] / most, 0.0)
        kept, share, e = tl.load(keep + chunk), added(stores, chunk), tl.load(eta + chunk)
        z2, of_d2, z2_read, due_keep, due_eta = sums_over_tiles(
            k, q, of_state, states, after, row, chunk, at_after, shorts, most, shrink, kept, share,
            BOUND, C, D, H, T, PRECISION,
        )  # fmt: skip
        tl.store(of_keep + chunk, due_keep)
        tl.store(of_eta + chunk, due_eta)

        value = tl.load(values + here, mask=is_there, other=0.0)
        descent = tl.load(descents + token[:, None], mask=is_there, other=0.0)
        d2, of_z2, of_k, of_descent, part = middle(k, value, descent, g, z2, of_d2, D)
        sum_gain += part
        tl.store(of_values + here, -of_k, mask=is_there)
        tl.store(of_descents + token, of_descent, mask=tl.arange(0, C) < LENGTH)
        of_q = tl.load(of_reads + here, mask=is_there, other=0.0)
        normed, rstd = normalised(z2_read, D)
        sum_gain += tl.sum(of_q * normed, 0)
        of_z2_read = through_norm(of_q * g, normed, rstd, D)

        of_k, of_q = through_tiles(
            k, q, d2, of_z2, of_z2_read, of_k, of_q, of_state, states, row, chunk, e, D, H, T, PRECISION
        )
        tl.store(of_keys + here, of_k, mask=is_there)
        tl.store(of_queries + here, of_q, mask=is_there)
        after, at_after = states, chunk
    tl.store(of_gain + row * D + tl.arange(0, D), sum_gain)
    if limit is not None:
        tl.store(of_limit + row, sum_limit)
