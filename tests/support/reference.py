"""The Titans models as their equations read (arXiv 2501.00663): one sequence, one token, one key after the other.

Slow on purpose. Nothing is shared with the library but the memory's own network; the memory's steps are those of the
oracle beside this file. Give it float64. Positions inside MAC are counted along [persistent | h | segment], as eq. 22
joins them; in MAG and MAL the persistent tokens, which every token sees, have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracle import Layer, Options, Row, memory_model
from tests.support.rules_by_the_book import GatedDeltaByTheBook
from titans_pytorch.titans import TitansConfig


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight


def rotated(x: Tensor, position: int) -> Tensor:
    """Neighbouring features turn by position / 10000^(2i/d).  x: (h d)"""
    width = x.shape[-1]
    turned = x.clone()
    for i in range(width // 2):
        frequency = 10_000.0 ** -(2 * i / width)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned[:, 2 * i] = x[:, 2 * i] * cos - x[:, 2 * i + 1] * sin
        turned[:, 2 * i + 1] = x[:, 2 * i + 1] * cos + x[:, 2 * i] * sin
    return turned


@dataclass
class Memory:
    """The memory of one block, for one sequence, from its beginning."""

    layer: Layer
    batch_size: int | None

    def rows(self, written: Tensor) -> list[Row]:
        """Every head after these tokens have been written.  written: (t m)"""
        mask = torch.ones(len(written), dtype=torch.bool)
        heads = range(self.layer.options.heads)
        return [self.layer.store(head, written, written, mask, None, self.batch_size) for head in heads]

    def read_and_written(self, x: Tensor) -> Tensor:
        """M*_t(x_t) for every token: what is read after it has been written.  (t m) -> (t m)"""
        return self.layer.read(self.rows(x), x)

    def still(self, written: Tensor, asked: Tensor) -> Tensor:
        """M*(q_t) for all tokens asked, by the memory as it stands once `written` has been written."""
        if len(written):
            weights = [row.current for row in self.rows(written)]
        else:
            weights = [self.layer.initial(head) for head in range(self.layer.options.heads)]
        return self.layer.read([Row(w, w, [], [w] * (len(asked) + 2)) for w in weights], asked)


class Reference:
    """parameters: of a `TitansBackbone`, by name"""

    def __init__(self, variant: str, config: TitansConfig, parameters: Mapping[str, Tensor]) -> None:
        self.variant, self.config, self.p = variant, config, parameters

    def __call__(self, x: Tensor) -> Tensor:
        """(b n dim) -> (b n dim)"""
        return torch.stack([self.sequence(row) for row in x])

    def sequence(self, x: Tensor) -> Tensor:
        for number in range(self.config.depth):
            block = f"blocks.{number}."
            mix = getattr(self, self.variant)
            normed = rms_norm(x, self.p[f"{block}mixer_norm.weight"]) if self.has_mixer else x
            x = x + (mix(f"{block}mixer.", normed) if self.has_mixer else 0)
            x = x + self.feed_forward(block, rms_norm(x, self.p[f"{block}ff_norm.weight"]))
        return rms_norm(x, self.p["norm.weight"])

    @property
    def has_mixer(self) -> bool:
        return self.variant != "lmm" or self.config.memory

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.weight"].T

    def feed_forward(self, block: str, x: Tensor) -> Tensor:
        value, gate = self.linear(f"{block}ff.to_hidden", x).chunk(2, dim=-1)
        return self.linear(f"{block}ff.to_out", gate * gate.sigmoid() * value)

    # ---- attention

    def heads(self, x: Tensor) -> Tensor:
        """(dim) -> (h d)"""
        return x.reshape(self.config.heads, -1)

    def key_value(self, mixer: str, x: Tensor, position: int | None) -> tuple[Tensor, Tensor]:
        key, value = self.linear(f"{mixer}attention.to_keys_values", x).chunk(2)
        key, value = self.heads(key), self.heads(value)
        return (key if position is None else rotated(key, position)), value

    def attend(
        self,
        mixer: str,
        x: Tensor,
        position: int,
        placeless: list[tuple[Tensor, Tensor]],
        placed: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One token over the keys and values that it sees, with and without a position.  (dim) -> (dim)"""
        query, heads, seen = self.heads(self.linear(f"{mixer}attention.to_queries", x)), [], placeless + placed
        turned = rotated(query, position)
        for h in range(self.config.heads):
            products = [query[h] @ key[h] for key, _ in placeless] + [turned[h] @ key[h] for key, _ in placed]
            scores = torch.stack(products) / math.sqrt(query.shape[-1])
            shares = scores.exp() / scores.exp().sum()
            heads.append(sum(share * value[h] for share, (_, value) in zip(shares, seen, strict=True)))
        return self.linear(f"{mixer}attention.to_out", torch.cat(heads))

    def slide(self, mixer: str, x: Tensor, prefix: Tensor) -> Tensor:
        """SW-Attn*: the prefix and the last tokens of the window (eqs. 27, 31)."""
        first = [self.key_value(mixer, p, None) for p in prefix]
        y = []
        for i in range(len(x)):
            near = range(max(0, i - self.config.window + 1), i + 1)
            y.append(self.attend(mixer, x[i], i, first, [self.key_value(mixer, x[j], j) for j in near]))
        return torch.stack(y)

    # ---- what mixers share

    def persistent(self, mixer: str) -> Tensor:
        return self.p[f"{mixer}persistent"] if self.config.num_persistent else torch.zeros(0, self.config.dim).double()

    def memory(self, mixer: str) -> Memory:
        options = oracle_options(self.config)
        prefix = f"{mixer}memory."
        parameters = {name.removeprefix(prefix): p for name, p in self.p.items() if name.startswith(prefix)}
        kind = GatedDeltaByTheBook if self.config.memory_rule == "gated_delta" else Layer
        return Memory(kind(parameters, memory_model(**options), Options(**options)), self.config.memory_refresh)

    def gate(self, mixer: str, y: Tensor, m: Tensor) -> Tensor:
        """The readings of ⊗ in eqs. 25 and 28."""
        y, m = (
            rms_norm(y, self.p[f"{mixer}gate.attention_norm.weight"]),
            rms_norm(m, self.p[f"{mixer}gate.memory_norm.weight"]),
        )
        match self.config.gate:
            case "attention":
                return torch.sigmoid(y) * m
            case "memory":
                return y * torch.sigmoid(m)
            case "product":
                return F.silu(y * m)
        share = torch.sigmoid(self.p[f"{mixer}gate.shares"][0] * y + self.p[f"{mixer}gate.shares"][1] * m)
        return share * y + (1 - share) * m

    # ---- the four

    def mac(self, mixer: str, x: Tensor) -> Tensor:
        config, size, num = self.config, self.config.window, self.config.num_persistent
        first = [self.key_value(mixer, p, place) for place, p in enumerate(self.persistent(mixer))]
        memory = self.memory(mixer) if config.memory else None
        y: list[Tensor] = []
        h: list[Tensor] = []
        for i in range(len(x)):
            start = i // size * size
            if memory is not None and i == start:  # h_t = M*_{t-1}(q_t), eq. 21, the memory before the segment
                written = torch.stack(y) if y else x[:0]
                written = x[:start] + written if config.layer_residual else written
                asked = memory.still(written, x[: start + size])[start:]
                h += [rms_norm(each, self.p[f"{mixer}context_norm.weight"]) for each in asked]
            seen = list(first)
            if memory is not None:
                seen += [self.key_value(mixer, h[j], num + j - start) for j in range(start, i + 1)]
            seen += [self.key_value(mixer, x[j], num + size + j - start) for j in range(start, i + 1)]
            y.append(self.attend(mixer, x[i], num + size + i - start, [], seen))  # eqs. 22, 23
        attended = torch.stack(y)
        if memory is None:
            return attended
        attended = x + attended if config.layer_residual else attended
        return self.gate(mixer, attended, memory.read_and_written(attended))  # eqs. 24, 25

    def mag(self, mixer: str, x: Tensor) -> Tensor:
        prefix = self.persistent(mixer)
        y = self.slide(mixer, x, prefix)  # eq. 27
        if not self.config.memory:
            return y
        read = self.memory(mixer).read_and_written(torch.cat((prefix, x)))[len(prefix) :]  # of eq. 26
        return self.gate(mixer, y, read)  # eq. 28

    def mal(self, mixer: str, x: Tensor) -> Tensor:
        prefix = self.persistent(mixer)
        if not self.config.memory:
            return self.slide(mixer, x, prefix)
        joined = torch.cat((prefix, x))  # eq. 29
        y = self.memory(mixer).read_and_written(joined)  # eq. 30
        seen = rms_norm(y + joined if self.config.layer_residual else y, self.p[f"{mixer}norm.weight"])
        o = self.slide(mixer, seen[len(prefix) :], seen[: len(prefix)])  # eq. 31
        return y[len(prefix) :] + o if self.config.layer_residual else o

    def lmm(self, mixer: str, x: Tensor) -> Tensor:
        prefix = self.persistent(mixer)
        return self.memory(mixer).read_and_written(torch.cat((prefix, x)))[len(prefix) :]


LINEAR = dict(
    default_model_kwargs=dict(depth=1),
    mem_model_norm_add_residual=False,
    learned_norm_gain=False,
    max_weight_growth=None,
)
"""One matrix, and nothing around it"""


def oracle_options(config: TitansConfig) -> dict[str, Any]:
    """The arguments of the oracle for the memory of a config."""
    heads = config.memory_heads or config.heads
    return (
        dict(
            dim=config.dim,
            dim_head=config.dim // heads,
            heads=heads,
            chunk_size=1 if config.token_gates else config.memory_chunk,
            batch_size=config.memory_refresh,
            conv_size=config.conv_size,
            qk_l2norm=config.qk_l2norm,
            momentum=config.momentum,
            default_step_transform_max_lr=config.max_step,
            default_model_kwargs=dict(depth=config.memory_depth, expansion_factor=config.memory_expansion),
            activation=nn.SiLU(),
            gated_output=True,
            learned_norm_gain=True,
            max_weight_growth=10.0,
            loss=config.memory_loss,
        )
        | (LINEAR if config.memory_model == "linear" else {})
        | dict(config.memory_options)
    )
