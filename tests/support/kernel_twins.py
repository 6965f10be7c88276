"""What the kernels compute, in plain torch and float64: the loop by the library's engine, epilogues by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch.fast_weights.engine import Engine
from titans_pytorch.fast_weights.interface import Carry, PerParameter, Writes
from titans_pytorch.fast_weights.norms import total_norm
from titans_pytorch.fast_weights.probe import inspect_model
from titans_pytorch.fast_weights.renewal import renewed
from titans_pytorch.fast_weights.rules.gates import Gates
from titans_pytorch.fast_weights.rules.titans import Titans
from titans_pytorch.losses import summed_squared_error
from titans_pytorch.memory_models import NORM_EPS, NORM_GAIN, MemoryMLP, ResidualNorm

FIRST, SECOND = "model.weights.0", "model.weights.1"


def engine_of(dim: int, hidden: int) -> Engine:
    model = ResidualNorm(dim, MemoryMLP(dim, 2, hidden / dim)).double()
    return Engine("factored", model, inspect_model(model, dim, summed_squared_error), summed_squared_error, Titans())


def loop_by_library(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The library's own blocks, one renewal after the other.  Arguments as of `Renewals`, in float64

    -> reads (n r c d), last state (r 4 d h), states (n r 4 d h), norms of weights at the end of every renewal (n r)
    """
    engine = engine_of(*state.shape[2:])
    first, second, of_first, of_second = state.unbind(1)
    weights, slow = {FIRST: first, SECOND: second.mT}, {NORM_GAIN: gain - 1}
    carry = Carry(weights, weights, {FIRST: (of_first,), SECOND: (of_second.mT,)}, {})
    reads, states, norms = [], [], []
    is_stored = [None] * len(keys) if stores is None else stores.bool().unsqueeze(2)
    for k, v, descent, q, kept, moved, stored in zip(
        keys, values, descents, queries, keep, eta, is_stored, strict=True
    ):
        states.append(state_of(carry))
        gates = Gates({"keep": kept.log()[None, :, None], "momentum": moved.log()[None, :, None]}, {}, stored)
        rates = PerParameter.shared(weights, -descent.unsqueeze(1) / 2)
        shared = PerParameter.shared(weights, gates)
        writes = Writes(k.unsqueeze(1), v.unsqueeze(1), rates, shared, {}, None, slow)
        block, _ = engine.store(carry, writes)
        reads.append(engine.read(block, q.unsqueeze(1), slice(0, 1), slow).squeeze(1))
        carry = block.finish()
        norms.append(total_norm(carry.weights))
        carry = renewed(carry, None, limit)
    return torch.stack(reads), state_of(carry), torch.stack(states), torch.stack(norms)


def state_of(carry: Carry) -> Tensor:
    """-> (r 4 d h)"""
    (of_first,), (of_second,) = carry.momenta[FIRST], carry.momenta[SECOND]
    return torch.stack((carry.weights[FIRST], carry.weights[SECOND].mT, of_first, of_second.mT), dim=1)


def norm_error(z2: Tensor, keys: Tensor, values: Tensor, descents: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """-> normed, rstd, error; the error by autograd, from the loss itself"""
    z2 = z2 if z2.requires_grad else z2.detach().requires_grad_()
    with torch.enable_grad():
        normed = F.layer_norm(z2, z2.shape[-1:], eps=NORM_EPS)
        prediction = normed * gain.unsqueeze(1) + keys
        gained = (descents.unsqueeze(-1) / 2 * (prediction - values).square()).sum()  # minus the weighted loss
        (error,) = torch.autograd.grad(gained, z2, create_graph=True)
    return normed, (z2.var(dim=-1, correction=0) + NORM_EPS).rsqrt(), error


def gelu_error(of_act: Tensor, z1: Tensor) -> Tensor:
    """By autograd, through gelu."""
    z1 = z1 if z1.requires_grad else z1.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(F.gelu(z1), z1, of_act, create_graph=True)[0]


def step(state: Tensor, surprise: Tensor, keep: Tensor, eta: Tensor) -> Tensor:
    """Momentum, then forgetting.  state: (r 4 d h), surprise: (r 2 d h)"""
    weights, momenta = state.chunk(2, dim=1)
    momenta = eta[:, None, None, None] * momenta + surprise
    return torch.cat((keep[:, None, None, None] * weights + momenta, momenta), dim=1)
