"""What the kernels of the loop are compiled for: which sizes they take, tiles, warps.

All constants are those with no or the fewest spills that were found by compiling (docs/kernels.md); none was timed.
"""

from __future__ import annotations

from typing import Any, Literal

from titans_pytorch.kernels.language import triton

Precision = Literal["tf32", "tf32x3", "ieee"]
"""In which products are taken"""

DIMS = (16, 32, 64, 128)
"""Widths of a head"""

MIN_TOKENS, MAX_TOKENS = 16, 32
"""How many tokens a block has: shorter chunks are filled up with zeros, their descent too; longer ones are not taken"""

HIDDEN_UNIT = 16
"""Hidden units come in multiples of this, the smallest tile"""

WEIGHT_ELEMENTS = 64 * 128
"""Elements of one matrix, up to which both stay in registers"""

STATE_ELEMENTS = 32 * 128
"""Elements of one matrix, up to which both and their momenta stay in registers"""

MOST_FEATURES: dict[Precision, int] = {"tf32": 64 * 32, "ieee": 64 * 32, "tf32x3": 64 * 16}
"""Features of a block's tokens together, up to which every kernel fits the 163 kB that an A100 shares among threads"""

LAUNCH = dict(num_stages=1, enable_fp_fusion=True)
"""Options that do not depend on sizes.  One stage: loads of a state must not run ahead of what stores it"""


def fits(dim: int, hidden: int, tokens: int, precision: Precision) -> bool:
    """Whether the kernels take a memory of this size, and chunks of this length."""
    is_known = dim in DIMS and hidden > 0 and hidden % HIDDEN_UNIT == 0 and 1 <= tokens <= MAX_TOKENS
    return is_known and dim * padded(tokens) <= MOST_FEATURES[precision]


def padded(tokens: int) -> int:
    """How many tokens a block has for a chunk of so many."""
    return max(MIN_TOKENS, int(triton.next_power_of_2(tokens)))


def stays_in_registers(dim: int, hidden: int, tokens: int, precision: Precision) -> bool:
    """Whether the forward pass keeps both weights in registers; else it goes through memory a tile at a time."""
    is_small = dim * hidden <= WEIGHT_ELEMENTS and dim <= 64 and tokens <= MIN_TOKENS
    return is_small and precision == "tf32" and hidden == triton.next_power_of_2(hidden)


def sizes(dim: int, hidden: int, tokens: int, precision: Precision) -> dict[str, Any]:
    """What every kernel of the loop has to know."""
    return dict(LENGTH=tokens, C=padded(tokens), D=dim, H=hidden, PRECISION=precision)


def of_loop(dim: int, hidden: int, tokens: int, precision: Precision) -> dict[str, Any]:
    """Constants of the forward kernel that keeps weights in registers, and its number of warps."""
    stay = dim * hidden <= STATE_ELEMENTS
    return dict(sizes(dim, hidden, tokens, precision), MOMENTA_STAY=stay, num_warps=8)


def of_tiled_loop(dim: int, hidden: int, tokens: int, precision: Precision) -> dict[str, Any]:
    """Constants of the forward kernel that goes through memory, and its number of warps."""
    tile = tile_size(hidden, 16 if precision == "ieee" else 32)
    return dict(sizes(dim, hidden, tokens, precision), T=tile, num_warps=4 if dim == 16 else 8)


def of_backward(dim: int, hidden: int, tokens: int, precision: Precision) -> dict[str, Any]:
    """Constants of the backward kernel, and its number of warps."""
    is_small = precision == "tf32" and dim in (32, 64) and tokens <= MIN_TOKENS
    tile = tile_size(hidden, 32 if is_small else 16)
    return dict(sizes(dim, hidden, tokens, precision), T=tile, num_warps=4 if dim == 16 else 8)


def tile_size(hidden: int, wanted: int) -> int:
    """The hidden units of a tile: as many as wanted, if all units make whole tiles of them."""
    return wanted if hidden % wanted == 0 else HIDDEN_UNIT
