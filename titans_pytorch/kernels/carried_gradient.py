"""What becomes of a state's gradient on its way from one renewal to the one before, as in `fast_weights/renewal.py`.

It is brought under a huge bound (`LimitGradient`), and passes what scaled the weights to their limit (`limit_growth`).
"""

from __future__ import annotations

from titans_pytorch.kernels.language import tl, triton
from titans_pytorch.kernels.loop_tiled import tile_of


@triton.jit
def within(gradient: tl.tensor, bound: float) -> tl.tensor:
    """Every entry of a gradient from -bound to bound; NaN stays NaN."""
    return tl.clamp(gradient, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def square(gradient: tl.tensor, bound: float) -> tl.tensor:
    """The squared norm of a gradient whose entries are within a huge bound, in terms of it."""
    return tl.sum(gradient / bound * (gradient / bound))


@triton.jit
def shortening(squared: tl.tensor) -> tl.tensor:
    """The factor that brings a gradient under the bound, as `LimitGradient` does."""
    return 1 / tl.maximum(tl.sqrt_rn(squared), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def measured(
    of_state: tl.tensor,
    weights: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    bound: float,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
) -> tl.tensor:
    """Factors that bring the gradient of each part of a state under the bound, and <W', W> + <V', V> thereafter.

    weights, at: where W and V lie that the gradient is of; of_state: whose entries are brought within the bound here
    """
    inner_w, inner_v = 0.0, 0.0
    square_w, square_v, square_sw, square_sv = 0.0, 0.0, 0.0, 0.0
    for tile in range(H // T):
        of_w = within(tl.load(tile_of(of_state, row, 0, tile, D, H, T)), bound)
        of_v = within(tl.load(tile_of(of_state, row, 1, tile, D, H, T)), bound)
        inner_w += tl.sum(of_w * tl.load(tile_of(weights, at, 0, tile, D, H, T)))
        inner_v += tl.sum(of_v * tl.load(tile_of(weights, at, 1, tile, D, H, T)))
        square_w += square(of_w, bound)
        square_v += square(of_v, bound)
        square_sw += square(within(tl.load(tile_of(of_state, row, 2, tile, D, H, T)), bound), bound)
        square_sv += square(within(tl.load(tile_of(of_state, row, 3, tile, D, H, T)), bound), bound)
    short_w, short_v = shortening(square_w), shortening(square_v)
    inner = short_w * inner_w + short_v * inner_v
    return short_w, short_v, shortening(square_sw), shortening(square_sv), inner


@triton.jit
def before_shrinking(
    of_weight: tl.tensor, after: tl.tensor, inner: tl.tensor, limit: tl.tensor, shrink: tl.tensor
) -> tl.tensor:
    """The gradient of a weight before it was scaled to the limit.

    after: the weight since; inner: <W', W> of all weights of the row
    """
    return tl.where(shrink < 1, shrink * (of_weight - inner / limit / limit * after), of_weight)
