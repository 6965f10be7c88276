"""What stands between the products of a renewal, one kernel each: for memories too wide for the whole loop in one.

    norm_error            Z2, K, v, t, g -> X, rstd, D2 = N(t g (g X + K - v))
    gelu_error            B, Z1 -> B gelu'(Z1)
    step                  S = eta S + U,  W = keep W + S                         (10, 14), (13); both layers
    norm_error_backward   q = D2' -> Z2', (K - v)', t', g'
    gelu_error_backward   A', D1' -> Z1' = A' gelu'(Z1) + D1' B gelu''(Z1)
    step_backward         after it -> W', S' before it, U', keep', eta'

Products are whoever's calls. The letters are those of `loop`, x' is the gradient with respect to x; the kernels are
compiled anew for other widths only. Tensors are contiguous and float32, on the device where the kernel shall run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.kernels.formulas import (
    gelu_curvature,
    gelu_slope,
    mean,
    normalised,
    through_norm,
    through_norm_twice,
)
from titans_pytorch.kernels.language import on_device_of, tl, triton

BLOCK_ELEMENTS = 4096
"""Elements of a tensor that one program works on"""

OPTIONS = dict(num_warps=4, enable_fp_fusion=True)
"""Options of every launch"""


@triton.jit
def in_rows(
    row: tl.tensor, block: tl.tensor, length: int, D: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Tokens of a row (C 1), where their features lie (C WIDTH), and which tokens and features are there."""
    token = block * C + tl.arange(0, C)[:, None]
    feature = tl.arange(0, WIDTH)[None, :]
    at = row * length + token
    return at, at * D + feature, token < length, (token < length) & (feature < D)


@triton.jit
def norm_error_kernel(
    z2: tl.tensor,  # (r c d), like keys, values, normed, error
    keys: tl.tensor,
    values: tl.tensor,
    descents: tl.tensor,  # (r c), like rstd
    gain: tl.tensor,  # (r d)
    normed: tl.tensor,
    rstd: tl.tensor,
    error: tl.tensor,
    length: int,
    D: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`norm_error` of some tokens of a row."""
    row = tl.program_id(0).to(tl.int64)
    token, at, is_token, is_there = in_rows(row, tl.program_id(1), length, D, C, WIDTH)
    feature = tl.arange(0, WIDTH)[None, :]
    g = tl.load(gain + row * D + feature, mask=feature < D, other=0.0)
    x, scale = normalised(tl.load(z2 + at, mask=is_there, other=0.0), D)
    residual = tl.load(keys + at, mask=is_there, other=0.0) - tl.load(values + at, mask=is_there, other=0.0)
    p = tl.load(descents + token, mask=is_token, other=0.0) * g * (g * x + residual)
    tl.store(normed + at, x, mask=is_there)
    tl.store(rstd + token, scale, mask=is_token)
    tl.store(error + at, through_norm(p, x, scale, D), mask=is_there)


@triton.jit
def norm_error_backward_kernel(
    of_error: tl.tensor,  # (r c d), like normed, error, keys, values, of_z2, of_residual
    normed: tl.tensor,
    rstd: tl.tensor,  # (r c), like descents, of_descents
    error: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    descents: tl.tensor,
    gain: tl.tensor,  # (r d)
    of_z2: tl.tensor,
    of_residual: tl.tensor,
    of_descents: tl.tensor,
    of_gain: tl.tensor,  # (r blocks d)
    length: int,
    D: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """`norm_error_backward` of some tokens of a row; the gain's part of each block by itself."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, at, is_token, is_there = in_rows(row, block, length, D, C, WIDTH)
    feature = tl.arange(0, WIDTH)[None, :]
    g = tl.load(gain + row * D + feature, mask=feature < D, other=0.0)
    x = tl.load(normed + at, mask=is_there, other=0.0)
    scale = tl.load(rstd + token, mask=is_token, other=0.0)
    q = tl.load(of_error + at, mask=is_there, other=0.0)
    t = tl.load(descents + token, mask=is_token, other=0.0)
    residual = tl.load(keys + at, mask=is_there, other=0.0) - tl.load(values + at, mask=is_there, other=0.0)
    e = g * x + residual
    d2 = tl.load(error + at, mask=is_there, other=0.0)
    of_p = tl.where(is_there, through_norm(q, x, scale, D), 0.0)
    of_e = t * g * of_p
    z = through_norm_twice(q, g * of_e, x, scale, d2, mean(t * g * e * x, D), D)
    tl.store(of_z2 + at, z, mask=is_there)
    tl.store(of_residual + at, of_e, mask=is_there)
    tl.store(of_descents + token, tl.sum(of_p * g * e, 1)[:, None], mask=is_token)
    due = tl.sum(t * of_p * e + of_e * x, 0)[None, :]
    tl.store(of_gain + (row * tl.num_programs(1) + block) * D + feature, due, mask=feature < D)


@triton.jit
def gelu_error_kernel(of_act: tl.tensor, z1: tl.tensor, error: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    """`gelu_error` of a block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z1 + at, mask=at < count, other=0.0)
    tl.store(error + at, tl.load(of_act + at, mask=at < count, other=0.0) * gelu_slope(z), mask=at < count)


@triton.jit
def gelu_error_backward_kernel(
    of_act: tl.tensor,
    of_error: tl.tensor,
    before: tl.tensor,
    z1: tl.tensor,
    of_z1: tl.tensor,
    count: int,
    BLOCK: tl.constexpr,
) -> None:
    """`gelu_error_backward` of a block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z1 + at, mask=at < count, other=0.0)
    first = tl.load(of_act + at, mask=at < count, other=0.0) * gelu_slope(z)
    b = tl.load(before + at, mask=at < count, other=0.0)
    second = tl.load(of_error + at, mask=at < count, other=0.0) * b * gelu_curvature(z)
    tl.store(of_z1 + at, first + second, mask=at < count)


@triton.jit
def in_layers(row: tl.tensor, block: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Where elements of both layers of a row lie in a state (r 4 d h), in a surprise (r 2 d h); which are there.

    SIZE: d h
    """
    element = block * BLOCK + tl.arange(0, BLOCK)
    return row * 4 * SIZE + element, row * 2 * SIZE + element, element < 2 * SIZE


@triton.jit
def step_kernel(
    state: tl.tensor,  # (r 4 size), like new: the weights of both layers, then their momenta
    surprise: tl.tensor,  # (r 2 size)
    keep: tl.tensor,  # (r), like eta
    eta: tl.tensor,
    new: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`step` of some elements of a row's weights."""
    row = tl.program_id(0).to(tl.int64)
    at, inside, is_there = in_layers(row, tl.program_id(1), SIZE, BLOCK)
    weight = tl.load(state + at, mask=is_there, other=0.0)
    momentum = tl.load(state + at + 2 * SIZE, mask=is_there, other=0.0)
    momentum = tl.load(eta + row) * momentum + tl.load(surprise + inside, mask=is_there, other=0.0)  # eqs. 10, 14
    weight = tl.load(keep + row) * weight + momentum  # eq. 13
    tl.store(new + at, weight, mask=is_there)
    tl.store(new + at + 2 * SIZE, momentum, mask=is_there)


@triton.jit
def step_backward_kernel(
    of_new: tl.tensor,  # (r 4 size), like state, of_state
    state: tl.tensor,
    keep: tl.tensor,  # (r), like eta
    eta: tl.tensor,
    of_state: tl.tensor,
    of_surprise: tl.tensor,  # (r 2 size)
    of_gates: tl.tensor,  # (r blocks 2): of keep, of eta
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`step_backward` of some elements of a row's weights; the gates' part of each block by itself."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, inside, is_there = in_layers(row, block, SIZE, BLOCK)
    of_weight = tl.load(of_new + at, mask=is_there, other=0.0)
    u = tl.load(of_new + at + 2 * SIZE, mask=is_there, other=0.0) + of_weight
    tl.store(of_surprise + inside, u, mask=is_there)
    tl.store(of_state + at, tl.load(keep + row) * of_weight, mask=is_there)
    tl.store(of_state + at + 2 * SIZE, tl.load(eta + row) * u, mask=is_there)
    due = of_gates + (row * tl.num_programs(1) + block) * 2
    tl.store(due, tl.sum(of_weight * tl.load(state + at, mask=is_there, other=0.0)))
    tl.store(due + 1, tl.sum(u * tl.load(state + at + 2 * SIZE, mask=is_there, other=0.0)))


# ---- the kernels as functions of tensors


def norm_error(z2: Tensor, keys: Tensor, values: Tensor, descents: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """Minus the gradient of each token's loss with respect to what the norm is given, with what its own gradient needs.

    z2, keys, values: (r c d), descents: (r c), gain: (r d) -> normed (r c d), rstd (r c), error (r c d)
    """
    normed, error, rstd = torch.empty_like(z2), torch.empty_like(z2), torch.empty_like(descents)
    grid, sizes = over_tokens(z2)
    with on_device_of(z2):
        norm_error_kernel[grid](z2, keys, values, descents, gain, normed, rstd, error, z2.shape[1], **sizes, **OPTIONS)
    return normed, rstd, error


def norm_error_backward(
    of_error: Tensor,
    normed: Tensor,
    rstd: Tensor,
    error: Tensor,
    keys: Tensor,
    values: Tensor,
    descents: Tensor,
    gain: Tensor,
) -> tuple[Tensor, ...]:
    """The gradient of `norm_error`, where X goes nowhere else.  of_error: (r c d), the rest as it went in and came out

    -> of z2 (r c d), of keys, minus that of values (r c d), of descents (r c), of the gain (r d)
    """
    of_z2, of_residual, of_descents = torch.empty_like(normed), torch.empty_like(normed), torch.empty_like(descents)
    grid, sizes = over_tokens(normed)
    of_gain = gain.new_empty(*grid, gain.shape[1])
    given = (of_error, normed, rstd, error, keys, values, descents, gain)
    with on_device_of(normed):
        norm_error_backward_kernel[grid](
            *given, of_z2, of_residual, of_descents, of_gain, normed.shape[1], **sizes, **OPTIONS
        )
    return of_z2, of_residual, of_descents, of_gain.sum(dim=1)


def gelu_error(of_act: Tensor, z1: Tensor) -> Tensor:
    """What comes in at gelu(z1), at z1.  (...) each"""
    error = torch.empty_like(z1)
    count = z1.numel()
    grid = (triton.cdiv(count, BLOCK_ELEMENTS),)
    with on_device_of(z1):
        gelu_error_kernel[grid](of_act, z1, error, count, BLOCK=BLOCK_ELEMENTS, **OPTIONS)
    return error


def gelu_error_backward(of_act: Tensor, of_error: Tensor, before: Tensor, z1: Tensor) -> Tensor:
    """The gradient of z1, of which gelu(z1) and `gelu_error(before, z1)` have been made.

    of_act, of_error: with respect to these two; (...) each
    """
    of_z1 = torch.empty_like(z1)
    count = z1.numel()
    grid = (triton.cdiv(count, BLOCK_ELEMENTS),)
    with on_device_of(z1):
        gelu_error_backward_kernel[grid](of_act, of_error, before, z1, of_z1, count, BLOCK=BLOCK_ELEMENTS, **OPTIONS)
    return of_z1


def step(state: Tensor, surprise: Tensor, keep: Tensor, eta: Tensor) -> Tensor:
    """Momentum, then forgetting, of both layers.  state: (r 4 d h), surprise: (r 2 d h), keep, eta: (r) -> (r 4 d h)"""
    new = torch.empty_like(state)
    grid, sizes = over_layers(state)
    with on_device_of(state):
        step_kernel[grid](state, surprise, keep, eta, new, **sizes, **OPTIONS)
    return new


def step_backward(of_new: Tensor, state: Tensor, keep: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    """The gradient of `step`.  -> of the state (r 4 d h), of the surprise (r 2 d h), of keep (r), of eta (r)"""
    of_state, of_surprise = torch.empty_like(state), torch.empty_like(state[:, :2])
    grid, sizes = over_layers(state)
    of_gates = keep.new_empty(*grid, 2)
    with on_device_of(state):
        step_backward_kernel[grid](of_new, state, keep, eta, of_state, of_surprise, of_gates, **sizes, **OPTIONS)
    of_keep, of_eta = of_gates.sum(dim=1).unbind(dim=1)
    return of_state, of_surprise, of_keep, of_eta


def over_tokens(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs for rows and their tokens, and the sizes of a program's block.  x: (r c d)"""
    rows, length, dim = x.shape
    width = triton.next_power_of_2(dim)
    tokens = max(1, min(BLOCK_ELEMENTS // width, triton.next_power_of_2(length)))
    return (rows, triton.cdiv(length, tokens)), dict(D=dim, C=tokens, WIDTH=width)


def over_layers(state: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs for rows and elements of their weights, and the sizes of a program's block.  state: (r 4 d h)"""
    size = state[0, 0].numel()
    return (len(state), triton.cdiv(2 * size, BLOCK_ELEMENTS)), dict(SIZE=size, BLOCK=BLOCK_ELEMENTS)
