"""The layers that gates are made of: step sizes of tokens, and whatever the rule asks for of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.fast_weights.interface import PerParameter
from titans_pytorch.fast_weights.rules.gates import KEEP, Gates
from titans_pytorch.fast_weights.rules.rule import GateSpec, Rule
from titans_pytorch.memory.gate_layers import ChannelGateLayer, GateLayer, threshold_layer
from titans_pytorch.memory.options import GateOptions, ProjectionOptions
from titans_pytorch.memory.pooling import AttentionPool, AveragePool

T = TypeVar("T")

PUBLISHED = {"to_decay_factor", "to_momentum", "to_learned_momentum_combine"}
"""Layers of gates that a memory of the published package may have; None where the rule does not ask for them"""


class GateLayers(nn.Module):
    """The gates of a memory: those of its rule, and its shares in other things.

    They are added by a method, not by a constructor, and stand directly in the memory: so parameters keep the names and
    the order of published checkpoints.
    """

    def add_gates(self, options: GateOptions, sizes: ProjectionOptions, rule: Rule, fast: Mapping[str, Tensor]) -> None:
        """fast: the parameters of the memory, as they are shaped"""
        dim, heads = sizes.dim, sizes.heads
        self.rule, self.parameter_names, self.gate_heads = rule, tuple(fast), heads
        self.max_modulation = options.max_mem_layer_modulation
        self.channels = [w.shape[-1] if w.ndim else 1 for w in fast.values()]
        self.adaptive_step_transform = options.step
        self.reduce_to_chunk_rep = AttentionPool(dim) if options.attn_pool_chunks else AveragePool()
        for gate in rule.gates:
            self.add_module(gate.layer, self.layer_of(gate, sizes))
        for layer in PUBLISHED - {gate.layer for gate in rule.gates}:
            self.register_module(layer, None)
        of_chunk = partial(GateLayer, dim, pattern="b n (h o) -> o (b h) n", h=heads)
        self.to_threshold = threshold_layer(dim, heads, sizes.num_kv_per_token) if options.has_thresholds else None
        modulates, mixes = options.per_parameter_lr_modulation, options.accept_weight_residual
        self.to_layer_modulation = of_chunk(heads * len(fast)) if modulates else None
        self.to_learned_weight_residual_mix = of_chunk(heads) if mixes else None

    def layer_of(self, gate: GateSpec, sizes: ProjectionOptions) -> nn.Module:
        """(b n dim) -> (p o r n), or of channels (o r j n); of tokens (b n c dim) -> (p r n c u)"""
        dim, heads, bias = sizes.dim, sizes.heads, gate.bias
        p = len(self.parameter_names) if gate.varies == "parameter" else 1
        if gate.per == "token":
            u = sizes.num_kv_per_token
            return GateLayer(dim, heads * p * u, "b n c (h p u) -> p (b h) n c u", bias=bias, h=heads, p=p)
        if gate.varies == "channel":
            num_out, pattern = heads * gate.number * sum(self.channels), "b n (h o j) -> o (b h) j n"
            return ChannelGateLayer(dim, num_out, pattern, bias=bias, h=heads, o=gate.number)
        num_out, pattern = heads * p * gate.number, "b n (h p o) -> p o (b h) n"
        return GateLayer(dim, num_out, pattern, bias=bias, h=heads, p=p)

    def rates(self, chunks: Tensor, dtype: torch.dtype) -> PerParameter[Tensor]:
        """The step size theta of every write.  chunks: (b n c dim) -> (r n c u)"""
        (gate,) = (gate for gate in self.rule.gates if gate.kind == "rate")
        raw = self.get_submodule(gate.layer)(chunks)
        return self.by_name(self.adaptive_step_transform(raw.to(dtype)).unbind(0))

    def gates(
        self, pooled: Tensor, poison: Tensor, is_stored: Tensor | None, dtype: torch.dtype
    ) -> PerParameter[Gates]:
        """The gates that the rule has asked for.

        pooled: (b n dim), one vector for each chunk; poison: (b n dim), not finite where a chunk is not;
        is_stored: (b n c)
        """
        stored = None if is_stored is None else self.each_head(is_stored.any(dim=-1))
        of_chunks = [gate for gate in self.rule.gates if gate.per == "chunk"]
        values = {gate.name: (gate, self.gate_values(gate, pooled, stored, dtype)) for gate in of_chunks}
        nan = self.each_head((poison.detach() * 0).sum(dim=-1).to(dtype))  # 0, or NaN
        if KEEP not in values:
            values[KEEP] = (GateSpec(KEEP, "", "decay"), (torch.zeros_like(nan).unsqueeze(0),))
        keep, logs = values[KEEP]
        values[KEEP] = (keep, tuple(log + (nan if log.ndim == 3 else nan.unsqueeze(1)) for log in logs))

        def of_parameter(index: int) -> Gates:
            def each(*kinds: str) -> dict[str, Tensor]:
                chosen = {name: found for name, (gate, found) in values.items() if gate.kind in kinds}
                return {name: found[index if len(found) > 1 else 0] for name, found in chosen.items()}

            return Gates(each("factor", "decay"), each("share", "scale"), stored)

        num = max(len(found) for _, found in values.values())
        return self.by_name([of_parameter(index) for index in range(num)])

    def gate_values(
        self, gate: GateSpec, pooled: Tensor, stored: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """A gate of every chunk, for all parameters or for each.  -> (o r n), or of channels (o r j n)"""
        raw = finite(self.get_submodule(gate.layer)(pooled), dtype)
        if gate.kind == "share":
            return raw.softmax(dim=1).unbind(0)
        if gate.kind == "scale":
            return raw.sigmoid().unbind(0)
        logs = F.logsigmoid(-raw if gate.kind == "decay" else raw)
        if stored is not None:  # a chunk without anything to store changes nothing
            logs = logs * (stored.unsqueeze(1) if gate.varies == "channel" else stored)
        return logs.split(self.channels, dim=2) if gate.varies == "channel" else logs.unbind(0)

    def thresholds(self, chunks: Tensor, dtype: torch.dtype) -> Tensor | None:
        """How far off an answer may be before its loss is no square any more.  (b n c dim) -> (r n c u)"""
        return None if self.to_threshold is None else F.softplus(self.to_threshold(chunks).to(dtype))

    def by_name(self, found: tuple[T, ...] | list[T]) -> PerParameter[T]:
        """One thing for all parameters, or one for each, by name."""
        if len(found) == 1 and len(self.parameter_names) > 1:
            return PerParameter.shared(self.parameter_names, found[0])
        return PerParameter(dict(zip(self.parameter_names, found, strict=True)), len(found) == 1)

    def each_head(self, x: Tensor) -> Tensor:
        """(b n) -> (r n)"""
        return repeat(x, "b n -> (b h) n", h=self.gate_heads)

    def shares(self, pooled: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        """The share lambda of every parameter in surprises, and that of the previous layer's weights.  (r n) each"""
        modulation, mix = self.to_layer_modulation, self.to_learned_weight_residual_mix
        by_name = {}
        if modulation is not None:
            shares = finite(modulation(pooled), dtype).sigmoid() * self.max_modulation
            by_name = dict(zip(self.parameter_names, shares, strict=True))
        return by_name, None if mix is None else finite(mix(pooled), dtype).sigmoid()[0]


def finite(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """What is not finite is kept apart, so that it never reaches what came before."""
    return raw.to(dtype).nan_to_num(0.0, 0.0, 0.0)
