"""A memory that grows (Proteus, arXiv 2608.16844), as equations for the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.oracle import Layer, Row, Weights, Written


class CapacityUnderTest(NamedTuple):
    """Blocks of hidden units, and tokens after which another one is opened."""

    capacity: tuple[int, int]

    @property
    def layer(self) -> type[Layer]:
        return type("GrowingLayer", (Growing,), {"blocks": self.capacity[0], "tokens": self.capacity[1], "now": [0]})


class Growing(Layer):
    """A layer that keeps all of its memory, and only ever uses what is open: M is asked and taught as g * M."""

    blocks: int
    tokens: int
    now: list[int]  # how many blocks are open

    def num_open(self, token: int) -> int:
        """k(t); the first token is number 0 here."""
        return min(self.blocks, 1 + token // self.tokens)

    def mask(self, num_open: int) -> Weights:
        """g, of a memory whose hidden units are as many as no feature is."""
        model = getattr(self.model, "model", self.model)
        hidden = model.weights[0].shape[1]
        is_open = (torch.arange(hidden) < num_open * hidden // self.blocks).double()
        masks = {}
        for name, weight in self.fast().items():
            masks[name] = torch.ones_like(weight)
            for axis, size in enumerate(weight.shape):
                if size == hidden and weight.ndim == 2:
                    masks[name] = masks[name] * (is_open[:, None] if axis == 0 else is_open)
        return masks

    def masked(self, weights: Weights, num_open: int) -> Weights:
        return {name: g * weights[name] for name, g in self.mask(num_open).items()}

    def surprise(self, at: Weights, of: Written, head: int) -> tuple[Weights, Tensor]:
        """g * grad, at weights that are masked already."""
        u, losses = super().surprise(at, of, head)
        return self.masked(u, self.now[0]), losses

    def store(
        self, head: int, keys: Tensor, values: Tensor, mask: Tensor, prev: Weights | None, batch_size: int | None
    ) -> Row:
        w = start = self.initial(head)
        zeros = {name: torch.zeros_like(weight) for name, weight in w.items()}
        row = Row(current=w, base=w, momenta=[dict(zeros) for _ in range(self.options.orders)], trajectory=[w])
        _, c = self.options.chunks
        s_k, s_v = (self.pre_norm("store_norm", torch.where(mask[:, None], x, 0.0)) for x in (keys, values))
        keys = self.qk_norm("k_norm", self.project("to_keys", s_k, head), head)
        values = self.project("to_values", s_v, head)
        for stop in range(c, len(keys) + 1, c):
            chunk, self.now[0] = slice(stop - c, stop), self.num_open(stop - 1)
            row.base, row.current = (self.masked(each, self.now[0]) for each in (row.base, row.current))
            self.store_chunk(row, head, s_k[chunk], keys[chunk], values[chunk], mask[chunk].tolist(), None)
            if batch_size is not None and stop % batch_size == 0:
                row.base = row.current = self.transition(row, head)
            g = self.mask(self.now[0])
            row.base, row.current = (  # what is closed is as it began
                {name: each[name] + (1 - g[name]) * start[name] for name in g} for each in (row.base, row.current)
            )
            row.trajectory.append(row.current)
        last = self.num_open(len(keys))
        row.base, row.current = (self.masked(each, last) for each in (row.base, row.current))
        return row

    def read_head(self, row: Row, queries: Tensor, head: int) -> Tensor:
        c_r, c_s = self.options.chunks
        answers = []
        for token, query in enumerate(queries):
            position = token if self.options.apply_then_update else token + 1
            weights = row.trajectory[position // c_r * c_r // c_s]
            answers.append(self.apply(self.masked(weights, self.num_open(token)), query[None], head))
        return torch.cat(answers)
