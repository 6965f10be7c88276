"""Several residual streams instead of one: how a branch reads from them and writes back.

The package hyper-connections makes the parameters (manifold-constrained hyper-connections, arXiv 2512.24880); here is
what is computed with them, in the dtype of the streams (at least float32), with one product for all coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hyper_connections import ManifoldConstrainedHyperConnections, mc_get_init_and_expand_reduce_stream_functions
from hyper_connections.manifold_constrained_hyper_connections import StreamEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention.kept import by_itself
from titans_pytorch.fast_weights.precision import at_least_float32
from titans_pytorch.initialization import write
from titans_pytorch.mac.gradients import added, coefficients

SINKHORN_ITERATIONS = 20
SMALL = 0.01  # what scales of learned coefficients begin with
SMALLEST_LOG = math.log(1e-30)  # relative to the sum of a column, so that no sum of a row is zero


def make_connection(num_streams: int, dim: int, number: int, *, writes: bool = True) -> nn.Module:
    """The parameters with which the branch with this number reads from the streams and, if it does, writes back."""
    if num_streams > 1:
        return Connection(num_streams, dim, number, writes)
    connect, _, _ = mc_get_init_and_expand_reduce_stream_functions(num_streams, dim=dim, disable=True)
    return connect(layer_index=number, add_branch_out_to_residual=writes)


def make_expansion(num_streams: int, dim: int) -> nn.Module:
    """The parameters with which one sequence of tokens becomes several streams, see `expand`."""
    return Expansion(num_streams, dim) if num_streams > 1 else nn.Identity()


class Connection(ManifoldConstrainedHyperConnections):  # type: ignore[misc]
    """The package's parameters of a connection, which can be set once more."""

    def __init__(self, num_streams: int, dim: int, number: int, writes: bool) -> None:
        super().__init__(
            num_streams,
            dim=dim,
            layer_index=number,
            add_branch_out_to_residual=writes,
            sinkhorn_iters=SINKHORN_ITERATIONS,
        )
        self.reads_first = number % num_streams
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The branch begins with one stream alone, the streams go on unmixed, and every one receives the answer."""
        alpha = torch.zeros(self.static_alpha.shape, dtype=self.static_alpha.dtype, device=self.static_alpha.device)
        alpha[self.reads_first, 0] = 1.0
        alpha[:, 1:].fill_diagonal_(1.0)
        write(self.static_alpha, alpha)
        small, zeros = [self.pre_branch_scale, self.residual_scale], [self.dynamic_alpha_fn, self.norm.gamma]
        if self.add_branch_out_to_residual:
            nn.init.ones_(self.static_beta)
            small.append(self.h_post_scale)
            zeros.append(self.dynamic_beta_fn)
        for parameter in small:
            nn.init.constant_(parameter, SMALL)
        for parameter in zeros:
            nn.init.zeros_(parameter)


class Expansion(StreamEmbed):  # type: ignore[misc]
    """The package's embeddings of streams, which can be set once more."""

    def __init__(self, num_streams: int, dim: int) -> None:
        super().__init__(num_streams, dim, expand_to_streams=True)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.stream_embed)


class Combined(NamedTuple):
    """The parameters of a connection as they are used: one map of all coefficients of a stream, and their constants.

    Coefficients are in this order: the share of the answer that the stream receives (unless the branch does not write
    back), the share of it that the branch reads, and its shares in the streams that go on.
    """

    weight: Tensor  # (coefficients d)
    bias: Tensor  # (s coefficients)


class Branch(NamedTuple):
    """What a layer reads, and where its answer goes."""

    input: Tensor  # (b n d)
    streams: Tensor  # (b n s d)  that go on beside the branch
    shares: Tensor | None  # (b n s 1)  half of what each stream receives of the answer; None: all of it

    def add(self, answer: Tensor) -> Tensor:
        """answer: (b n d) -> streams (b n s d)"""
        answer = answer.unsqueeze(2)
        return self.streams + answer if self.shares is None else added(self.streams, answer, self.shares)


def combined(connection: nn.Module) -> Combined | None:
    """What is the same for all tokens; None for a single stream, as in any transformer."""
    if not isinstance(connection, ManifoldConstrainedHyperConnections):
        return None
    rows, constants = [connection.dynamic_alpha_fn[0].mT], [connection.static_alpha]
    scales = [connection.pre_branch_scale, connection.residual_scale.expand(connection.num_residual_streams)]
    if connection.add_branch_out_to_residual:
        rows.insert(0, connection.dynamic_beta_fn[None])
        constants.insert(0, connection.static_beta[:, None])
        scales.insert(0, connection.h_post_scale[None])
    weight = torch.cat(rows) * (connection.norm.gamma + 1) * torch.cat(scales)[:, None]
    return Combined(weight, torch.cat(constants, dim=1))


def open_branch(connection: nn.Module, streams: Tensor, known: Combined | None = None) -> Branch:
    """A learned mix of the streams for the branch, and others that go on.  streams: (b n s d)

    A connection that is built not to write back lets the streams pass unchanged.
    known: its parameters as they are used, if they have been combined before
    """
    known = combined(connection) if known is None else known
    if known is None:
        return Branch(streams.squeeze(2), streams, None)
    dtype, count = streams.dtype, streams.shape[2]
    x = streams.to(at_least_float32(dtype))
    found = coefficients(x, known.weight.to(x.dtype), known.bias.to(x.dtype))
    if not connection.add_branch_out_to_residual:
        return Branch((found[..., :1].sigmoid() * x).sum(dim=2).to(dtype), streams, None)
    gates, mixing = found.split((2, count), dim=-1)
    shares, read = gates.sigmoid().split(1, dim=-1)
    mixed = torch.cat((read, doubly_stochastic(mixing)), dim=-1).mT @ x
    read_streams, others = mixed.split((1, count), dim=2)
    return Branch(by_itself(read_streams.squeeze(2).to(dtype)), others.to(dtype), shares.to(dtype))


def doubly_stochastic(logits: Tensor) -> Tensor:
    """Sinkhorn-Knopp: exponentials scaled until rows and columns sum to one.  (... s s) -> same

    Dividing by a sum is a softmax of logarithms: one operation each way, with all tokens along the last axis.
    """
    logs = logits.reshape(-1, *logits.shape[-2:]).permute(1, 2, 0).log_softmax(dim=0)  # (s s tokens)
    logs = F.threshold(logs, SMALLEST_LOG, SMALLEST_LOG)
    for _ in range(SINKHORN_ITERATIONS - 1):
        logs = logs.log_softmax(dim=1).log_softmax(dim=0)
    return logs.softmax(dim=1).permute(2, 0, 1).reshape(logits.shape)


def expand(expand_streams: nn.Module, x: Tensor) -> Tensor:
    """Every stream begins as the tokens and an embedding of its own.  (b n d) -> (b n s d)"""
    embed = getattr(expand_streams, "stream_embed", None)
    return x.unsqueeze(2) if embed is None else x.unsqueeze(2) + embed
