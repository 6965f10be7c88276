"""The whole loop over renewals as one function of tensors, with a gradient: `renewal_loop`.

A memory M(x) = x + g norm(gelu(x W_1) W_2) with a learned gain, one chunk for each renewal. One launch is all rows and
all renewals of a span, forward or backward; `loop` and `loop_backward` have the equations. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pytorch.fast_weights.renewal import MAX_CARRIED_GRADIENT
from titans_pytorch.kernels import compilation
from titans_pytorch.kernels.compilation import Precision
from titans_pytorch.kernels.language import on_device_of
from titans_pytorch.kernels.loop import loop_kernel
from titans_pytorch.kernels.loop_backward import loop_backward_kernel
from titans_pytorch.kernels.loop_tiled import tiled_loop_kernel


class Renewals(NamedTuple):
    """What a span of renewals is given."""

    keys: Tensor  # (n r c d)
    values: Tensor  # (n r c d)
    descents: Tensor  # (n r c)  minus twice the rate, over d for the mean loss; 0 for what is not stored
    queries: Tensor  # (n r c d)  that read the weights before their renewal
    keep: Tensor  # (n r)    share of the weights that is not forgotten
    eta: Tensor  # (n r)    share of the momentum that goes on
    gain: Tensor  # (r d)    g, the one of `1 + gamma` included
    state: Tensor  # (r 4 d h)  W_1, W_2^T and their momenta
    limit: Tensor | None = None  # (r)      the largest norm of a row's weights; None: any
    stores: Tensor | None = None  # (n r)    1 where a chunk stores anything, else 0, with keep and eta 1; None: all do


class LoopResult(NamedTuple):
    """What the loop gives."""

    reads: Tensor  # (n r c d)
    last: Tensor  # (r 4 d h)
    states: Tensor | None  # (n r 4 d h)  before every renewal
    shrinks: Tensor | None  # (n r)      what the weights were scaled by at the end of each, if there is a limit


def renewal_loop(
    keys: Tensor,
    values: Tensor,
    descents: Tensor,
    queries: Tensor,
    keep: Tensor,
    eta: Tensor,
    gain: Tensor,
    state: Tensor,
    limit: Tensor | None = None,
    stores: Tensor | None = None,
    *,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and store a span of renewals.  -> reads (n r c d), the state after the last (r 4 d h); see `Renewals`

    Args:
        precision: of products; None: as torch multiplies matrices (`torch.set_float32_matmul_precision`)
    """
    given = Renewals(keys, values, descents, queries, keep, eta, gain, state, limit, stores)
    precision = torchs_own() if precision is None else precision
    check_renewals(given, precision)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        reads, last = RenewalLoop.apply(precision, *given)
        return reads, last
    result = run_loop(given, precision, keeps_states=False)
    return result.reads, result.last


def torchs_own() -> Precision:
    """The precision in which torch multiplies matrices."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def check_renewals(given: Renewals, precision: Precision) -> None:
    """Raises where shapes do not belong together, or are not for these kernels."""
    if given.keys.ndim != 4 or given.state.ndim != 4:
        raise ValueError(
            "keys must have the shape (renewals, rows, tokens, dim) and state (rows, 4, dim, hidden), "
            f"got {tuple(given.keys.shape)} and {tuple(given.state.shape)}"
        )
    n, r, c, d = given.keys.shape
    h = given.state.shape[-1]
    tokens, gate = (n, r, c, d), (n, r)
    shapes = (tokens, tokens, (n, r, c), tokens, gate, gate, (r, d), (r, 4, d, h), (r,), gate)
    for name, tensor, shape in zip(Renewals._fields, given, shapes, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape} beside keys and state, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be of dtype float32, got {tensor.dtype}")
    if not compilation.fits(d, h, c, precision):
        raise ValueError(
            f"dim must be one of {compilation.DIMS}, hidden a multiple of {compilation.HIDDEN_UNIT}, "
            f"and chunks, filled up to 16 or 32 tokens, at most {compilation.MOST_FEATURES[precision]} features "
            f"in {precision}; got dim {d}, hidden {h}, {c} tokens"
        )


def each(fn: Callable[[Tensor], Tensor], given: Renewals) -> Renewals:
    """fn of every tensor."""
    return given._replace(**{name: fn(tensor) for name, tensor in given._asdict().items() if tensor is not None})


def run_loop(given: Renewals, precision: Precision, keeps_states: bool) -> LoopResult:
    """The loop forward, without autograd.  keeps_states: whether states and shrinks are asked for"""
    given = each(Tensor.contiguous, given)
    n, r, c, d = given.keys.shape
    sizes = (d, given.state.shape[-1], c, precision)
    reads, last = torch.empty_like(given.queries), torch.empty_like(given.state)
    states = last.new_empty(n, *last.shape) if keeps_states else None
    shrinks = last.new_empty(n, r) if keeps_states and given.limit is not None else None
    front = (*given[:7], given.limit, given.stores)
    back = (reads, last, states, shrinks, n, r)
    with on_device_of(last):
        if compilation.stays_in_registers(*sizes):
            loop_kernel[(r,)](*front, given.state, *back, **compilation.of_loop(*sizes), **compilation.LAUNCH)
        else:
            last.copy_(given.state)
            tiled_loop_kernel[(r,)](*front, *back, **compilation.of_tiled_loop(*sizes), **compilation.LAUNCH)
    return LoopResult(reads, last, states, shrinks)


def run_loop_backward(
    given: Renewals, result: LoopResult, of_reads: Tensor, of_last: Tensor, precision: Precision
) -> Renewals:
    """Gradients of what the loop was given."""
    given = each(Tensor.contiguous, given)
    n, r, c, d = given.keys.shape
    of = each(torch.empty_like, given)._replace(stores=None)
    of.state.copy_(of_last)
    with on_device_of(given.state):
        loop_backward_kernel[(r,)](
            *(*given[:7], given.limit, given.stores),
            *(result.states, result.last, result.shrinks, of_reads.contiguous(), of.state),
            *(of.keys, of.values, of.descents, of.queries, of.keep, of.eta, of.gain, of.limit, n, r),
            BOUND=MAX_CARRIED_GRADIENT,
            **compilation.of_backward(d, given.state.shape[-1], c, precision),
            **compilation.LAUNCH,
        )
    return of


class RenewalLoop(torch.autograd.Function):
    """The loop, whose backward pass is a kernel as well; the state before every renewal is kept for it."""

    @staticmethod
    def forward(ctx: Any, precision: Precision, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = Renewals(*given)  # type: ignore[arg-type]
        result = run_loop(inputs, precision, keeps_states=True)
        ctx.precision = precision
        ctx.save_for_backward(*inputs, *result[1:])
        return result.reads, result.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_reads: Tensor, of_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, (last, states, shrinks) = Renewals(*saved[:10]), saved[10:]
        result = LoopResult(of_reads, last, states, shrinks)
        return (None, *run_loop_backward(given, result, of_reads, of_last, ctx.precision))
