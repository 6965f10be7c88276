"""The loop over renewals of `loop`, for weights that are too large for registers: the hidden units a tile at a time.

A program is a row again. Its state lies in memory, in `last`, and is gone through twice in a renewal: once for what is
summed over hidden units (Z2 of keys and of queries), once for what follows from it. Where weights have outgrown their
limit they are scaled where they are loaded next.
"""

from __future__ import annotations

from titans_pytorch.kernels.formulas import gelu, gelu_slope, normalised, through_norm
from titans_pytorch.kernels.language import tl, triton
from titans_pytorch.kernels.loop import added, in_tokens, moved


@triton.jit
def tile_of(
    states: tl.tensor, row: tl.tensor, part: tl.constexpr, tile: int, D: tl.constexpr, H: tl.constexpr, T: tl.constexpr
) -> tl.tensor:
    """Pointers to some hidden units of a part of a row's state: 0 W, 1 V, 2 S_W, 3 S_V.  -> (d T)"""
    hidden = tile * T + tl.arange(0, T)[None, :]
    return states + (row * 4 + part) * D * H + tl.arange(0, D)[:, None] * H + hidden


@triton.jit
def through_tile(x: tl.tensor, w: tl.tensor, v: tl.tensor, z2: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """A tile's part in the second product, added to that of the tiles before.  x: (c d), w, v: (d T) -> (c d)"""
    act = gelu(tl.dot(x, w, input_precision=PRECISION))
    return tl.dot(act, tl.trans(v), acc=z2, input_precision=PRECISION)


@triton.jit
def scaled(
    states: tl.tensor,
    row: tl.tensor,
    shrink: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Scale W and V of a row where they lie."""
    for tile in range(H // T):
        to_w, to_v = tile_of(states, row, 0, tile, D, H, T), tile_of(states, row, 1, tile, D, H, T)
        w, v = shrink * tl.load(to_w), shrink * tl.load(to_v)
        tl.debug_barrier()
        tl.store(to_w, w)
        tl.store(to_v, v)


@triton.jit
def tiled_loop_kernel(
    keys: tl.tensor,  # (n r c d), like values, queries, reads
    values: tl.tensor,
    descents: tl.tensor,  # (n r c)
    queries: tl.tensor,
    keep: tl.tensor,  # (n r), like eta, shrinks
    eta: tl.tensor,
    gain: tl.tensor,  # (r d)
    limit: tl.tensor,  # (r) or None
    stores: tl.tensor,  # (n r), 1 where a chunk stores anything, else 0; or None
    reads: tl.tensor,
    last: tl.tensor,  # (r 4 d h), goes in as the first state
    states: tl.tensor,  # (n r 4 d h), before each renewal, or None
    shrinks: tl.tensor,  # what each renewal's weights were scaled by at its end, or None
    count: int,
    rows: int,
    LENGTH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """All renewals of one row, forward."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(gain + row * D + tl.arange(0, D))[None, :]
    shrink = 1.0
    for n in range(count):
        chunk = n * rows + row
        here, is_there = in_tokens(chunk, LENGTH, C, D)
        k = tl.load(keys + here, mask=is_there, other=0.0)
        q = tl.load(queries + here, mask=is_there, other=0.0)
        z2, z2_read = tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32)
        for tile in range(H // T):
            w = shrink * tl.load(tile_of(last, row, 0, tile, D, H, T))
            v = shrink * tl.load(tile_of(last, row, 1, tile, D, H, T))
            if states is not None:
                tl.store(tile_of(states, chunk, 0, tile, D, H, T), w)
                tl.store(tile_of(states, chunk, 1, tile, D, H, T), v)
            z2 = through_tile(k, w, v, z2, PRECISION)
            z2_read = through_tile(q, w, v, z2_read, PRECISION)
        answer, _ = normalised(z2_read, D)
        tl.store(reads + here, q + g * answer, mask=is_there)
        normed, rstd = normalised(z2, D)
        value = tl.load(values + here, mask=is_there, other=0.0)
        token = chunk * LENGTH + tl.arange(0, C)[:, None]
        descent = tl.load(descents + token, mask=is_there, other=0.0)
        d2 = through_norm(descent * g * (g * normed + k - value), normed, rstd, D)

        kept, e, share = tl.load(keep + chunk), tl.load(eta + chunk), added(stores, chunk)
        square = 0.0
        for tile in range(H // T):
            to_w, to_v = tile_of(last, row, 0, tile, D, H, T), tile_of(last, row, 1, tile, D, H, T)
            to_sw, to_sv = tile_of(last, row, 2, tile, D, H, T), tile_of(last, row, 3, tile, D, H, T)
            w, v, sw, sv = shrink * tl.load(to_w), shrink * tl.load(to_v), tl.load(to_sw), tl.load(to_sv)
            if states is not None:
                tl.store(tile_of(states, chunk, 2, tile, D, H, T), sw)
                tl.store(tile_of(states, chunk, 3, tile, D, H, T), sv)
            z1 = tl.dot(k, w, input_precision=PRECISION)
            d1 = tl.dot(d2, v, input_precision=PRECISION) * gelu_slope(z1)
            sw, sv = moved(sw, k, d1, e, PRECISION), moved(sv, d2, gelu(z1), e, PRECISION)
            w, v = kept * w + share * sw, kept * v + share * sv  # eq. 13
            square += tl.sum(w * w) + tl.sum(v * v)
            tl.debug_barrier()  # a tile may have been loaded by other threads than those that store it
            tl.store(to_w, w)
            tl.store(to_v, v)
            tl.store(to_sw, sw)
            tl.store(to_sv, sv)
        tl.debug_barrier()
        if limit is not None:
            norm, most = tl.sqrt_rn(square), tl.load(limit + row)
            shrink = tl.where(norm > most, most / norm, 1.0)
            if shrinks is not None:
                tl.store(shrinks + chunk, shrink)
    if limit is not None:
        scaled(last, row, shrink, D, H, T)
