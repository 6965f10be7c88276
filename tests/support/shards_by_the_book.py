"""Memories that restart, and queries projected on keys (TNT, arXiv 2511.07343), as equations for the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tests.support.oracle import Layer, Row, Weights


class ShardsUnderTest(NamedTuple):
    """Tokens of a shard, and the keys that queries are projected on."""

    shard: int | None
    qk_projection: Literal["chunk", "shard"] | None = None

    @property
    def layer(self) -> type[Layer]:
        return type("LayerInShards", (InShards,), {"shard": self.shard, "span": self.qk_projection})


class InShards(Layer):
    """A layer whose memory is W_init again after every `shard` tokens."""

    shard: int | None
    span: str | None

    def fresh(self, head: int) -> Row:
        w = self.initial(head)
        zeros = {name: torch.zeros_like(weight) for name, weight in w.items()}
        return Row(w, w, [dict(zeros) for _ in range(self.options.orders)], [w])

    def store(
        self, head: int, keys: Tensor, values: Tensor, mask: Tensor, prev: Weights | None, batch_size: int | None
    ) -> Row:
        row, shards = self.fresh(head), []
        _, c = self.options.chunks
        s_k, s_v = (self.pre_norm("store_norm", torch.where(mask[:, None], x, 0.0)) for x in (keys, values))
        keys = self.qk_norm("k_norm", self.project("to_keys", s_k, head), head)
        values = self.project("to_values", s_v, head)
        for stop in range(c, len(keys) + 1, c):
            chunk = slice(stop - c, stop)
            self.store_chunk(row, head, s_k[chunk], keys[chunk], values[chunk], mask[chunk].tolist(), None)
            in_shard = stop if self.shard is None else (stop - 1) % self.shard + 1
            if batch_size is not None and in_shard % batch_size == 0:
                row.base = row.current = self.transition(row, head)
            row.trajectory.append(row.current)
            if in_shard == self.shard:  # eq. 6
                shards.append(row)
                row = replace(self.fresh(head), loss=row.loss, rates=row.rates)
        row.shards = [*shards, row]  # type: ignore[attr-defined]
        row.keys = [k if is_stored else k * 0 for k, is_stored in zip(keys, mask.tolist(), strict=True)]  # type: ignore[attr-defined]
        return row

    def read_head(self, row: Row, queries: Tensor, head: int) -> Tensor:
        queries = torch.stack([self.on_keys(row.keys, t, q) for t, q in enumerate(queries)])  # type: ignore[attr-defined]
        parts = [queries] if self.shard is None else queries.split(self.shard)
        shards = row.shards[: len(parts)]  # type: ignore[attr-defined]
        answers = [super(InShards, self).read_head(each, part, head) for each, part in zip(shards, parts, strict=True)]
        return torch.cat(answers)

    def on_keys(self, keys: list[Tensor], t: int, q: Tensor) -> Tensor:
        """Eq. (7): the sum of k k^T / |k|^2 over the keys of the span up to t's own.  keys: (u d) of each token"""
        if self.span is None:
            return q
        size = self.shard if self.span == "shard" else self.options.chunks[1]
        assert size is not None
        found = torch.zeros_like(q)
        for of_token in keys[t - t % size : t + 1]:
            for k in of_token:
                if k.any():
                    found = found + k * (k @ q) / (k @ k)
        return found
