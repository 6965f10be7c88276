"""Several residual streams instead of one: how a branch reads from them and writes back.

The package hyper-connections makes the parameters (manifold-constrained hyper-connections, arXiv 2512.24880); here is
what is computed with them, in the dtype of the streams (at least float32), with one product for all coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hyper_connections import ManifoldConstrainedHyperConnections, mc_get_init_and_expand_reduce_stream_functions
from torch import Tensor, nn

SINKHORN_ITERATIONS = 20
SMALLEST_LOG = math.log(1e-30)  # relative to the largest, so that no sum is zero


def make_connection(num_streams: int, dim: int, number: int, *, writes: bool = True) -> nn.Module:
    """The parameters with which the branch with this number reads from the streams and, if it does, writes back."""
    connect, _, _ = mc_get_init_and_expand_reduce_stream_functions(
        num_streams, dim=dim, disable=num_streams == 1, sinkhorn_iters=SINKHORN_ITERATIONS
    )
    return connect(layer_index=number, add_branch_out_to_residual=writes)


def make_expansion(num_streams: int, dim: int) -> nn.Module:
    """The parameters with which one sequence of tokens becomes several streams, see `expand`."""
    _, expansion, _ = mc_get_init_and_expand_reduce_stream_functions(
        num_streams, dim=dim, add_stream_embed=True, disable=num_streams == 1
    )
    return expansion


class Branch(NamedTuple):
    """What a layer reads, and where its answer goes."""

    input: Tensor  # (b n d)
    streams: Tensor  # (b n s d)  that go on beside the branch
    shares: Tensor | None  # (b n s)  of the answer that each stream receives; None: all of it

    def add(self, answer: Tensor) -> Tensor:
        """answer: (b n d) -> streams (b n s d)"""
        answer = answer.unsqueeze(2)
        return self.streams + (answer if self.shares is None else answer * self.shares.unsqueeze(-1))


def open_branch(connection: nn.Module, streams: Tensor) -> Branch:
    """A learned mix of the streams for the branch, and others that go on.  streams: (b n s d)

    A connection that is built not to write back lets the streams pass unchanged.
    """
    if not isinstance(connection, ManifoldConstrainedHyperConnections):  # a single stream, as in any transformer
        return Branch(streams.squeeze(2), streams, None)
    dtype, count = streams.dtype, streams.shape[2]
    x = streams.to(torch.promote_types(dtype, torch.float32))
    writes = connection.add_branch_out_to_residual
    alpha_fn, scale = connection.dynamic_alpha_fn[0], x.shape[-1] ** 0.5
    columns = torch.cat((alpha_fn, connection.dynamic_beta_fn[:, None]), dim=1) if writes else alpha_fn
    gain = (connection.norm.gamma + 1) * scale
    raw = (x @ (columns * gain[:, None]).to(x.dtype)) / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    scales = torch.cat((connection.pre_branch_scale, connection.residual_scale.expand(count)))
    alpha = raw[..., : count + 1] * scales + connection.static_alpha
    read = alpha[..., :1].sigmoid()
    if not writes:
        return Branch((read * x).sum(dim=2).to(dtype), streams, None)
    mixed = torch.cat((read, doubly_stochastic(alpha[..., 1:])), dim=-1).mT @ x
    shares = 2 * (raw[..., -1] * connection.h_post_scale + connection.static_beta).sigmoid()
    return Branch(mixed[:, :, 0].to(dtype), mixed[:, :, 1:].to(dtype), shares.to(dtype))


def doubly_stochastic(logits: Tensor) -> Tensor:
    """Sinkhorn-Knopp: exponentials scaled until rows and columns sum to one.  (... s s) -> same

    Dividing by a sum is a softmax of logarithms: one operation each way, with all tokens along the last axis.
    """
    logs = logits.reshape(-1, *logits.shape[-2:]).permute(1, 2, 0)  # (s s tokens)
    logs = (logs - logs.amax(dim=0).detach()).clamp(min=SMALLEST_LOG)
    for _ in range(SINKHORN_ITERATIONS):
        logs = logs.log_softmax(dim=0).log_softmax(dim=1)
    return logs.exp().permute(2, 0, 1).reshape(logits.shape)


def expand(expand_streams: nn.Module, x: Tensor) -> Tensor:
    """Every stream begins as the tokens and an embedding of its own.  (b n d) -> (b n s d)"""
    embed = getattr(expand_streams, "stream_embed", None)
    return x.unsqueeze(2) if embed is None else x.unsqueeze(2) + embed
