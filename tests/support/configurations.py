"""Memories, options, masks and splits to try, as data; the whole matrix of tests draws from here."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.capacity_by_the_book import CapacityUnderTest
from tests.support.oracle import Layer, OracleOutput, oracle
from tests.support.shards_by_the_book import ShardsUnderTest
from tests.support.streams import disturbed
from titans_pytorch import NeuralMemory, memory_models
from titans_pytorch.fast_weights.rules.registry import RuleOptions
from titans_pytorch.fast_weights.rules.rule import Rule

DIM_HEAD = 4


class LinearNet(nn.Module):
    """What a user would bring: linear layers with biases and a norm with gain and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(dim, 6), nn.LayerNorm(6), nn.Linear(6, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)).tanh())


class OpaqueNet(nn.Module):
    """Uses its matrix beyond products, so only the general engine can run it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(dim, dim) / dim**0.5), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.weight) * self.scale


class TiedNet(nn.Module):
    """One matrix used twice, from both sides, in an einsum and a linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...j,ji->...i", nn.functional.linear(x, self.weight).sigmoid(), self.weight)


MODELS = {
    "default": lambda: None,
    "linear": lambda: memory_models.MemoryMLP(DIM_HEAD, depth=1),
    "deep": lambda: memory_models.MemoryMLP(DIM_HEAD, depth=3),
    "gated": lambda: memory_models.GatedResidualMemoryMLP(DIM_HEAD, depth=1, expansion_factor=1.5),
    "factorized": lambda: memory_models.FactorizedMemoryMLP(DIM_HEAD, depth=2, k=2),
    "swiglu": lambda: memory_models.MemorySwiGluMLP(DIM_HEAD, depth=1, expansion_factor=3.0),
    "glu": lambda: memory_models.MemoryGLU(DIM_HEAD, expansion_factor=1.5),
    "attention": lambda: memory_models.MemoryAttention(DIM_HEAD, expansion_factor=1.0),
    "layerwise": lambda: memory_models.LayerwiseMemory(DIM_HEAD),
    "nn.Linear": lambda: LinearNet(DIM_HEAD),
    "tied": lambda: TiedNet(DIM_HEAD),
    "opaque": lambda: OpaqueNet(DIM_HEAD),
}

OPTIONS: dict[str, list[Any]] = {
    "model": list(MODELS),
    "heads": [1, 2],
    "chunk_size": [1, 2, 3, 4, (1, 4), (2, 4), (4, 2), (3, 2)],
    "batches": [None, 1, 2],  # chunks in a batch
    "momentum": [True, True, True, False],
    "momentum_order": [1, 1, 2, 3],
    "learned_momentum_combine": [False, True],
    "learned_combine_include_zeroth": [False, True],
    "per_parameter_lr_modulation": [False, True],
    "per_head_learned_parameters": [True, False],
    "attn_pool_chunks": [False, True],
    "num_kv_per_token": [1, 1, 2],
    "qkv_receives_diff_views": [False, False, True],
    "pre_rmsnorm": [True, False],
    "post_rmsnorm": [False, True],
    "qk_rmsnorm": [False, True],
    "max_grad_norm": [None, 0.5],
    "activation": [None, "SiLU"],
    "accept_weight_residual": [False, False, True],
    "spectral_norm_surprises": [False, False, False, True],
    "gated_transition": [False, True],
    "mem_model_norm_add_residual": [True, False],
    "store_with_lookahead_value": [False, False, True],
    "max_weight_growth": [10.0, 1.02],
    "qk_l2norm": [False, True],
    "conv_size": [None, None, 1, 2, 4],
    "summed_loss": [False, True],
    "loss": [None, None, None, "sse", "huber:0.5", "yaad", "lp:3", "dot", "cosine"],
    "per_parameter_gates": [False, True],
    "channelwise_decay": [False, True],
    "learned_norm_gain": [False, True],
    "gated_output": [False, True],
    "window": [1, 1, 2, 3],
    "key_powers": [1, 1, 2, 3],
    "keep_lengths": [False, False, True],
    "apply_then_update": [False, False, True],
    "mask": [False, True],
    "store_seq": [False, False, True],
}


@dataclass(frozen=True)
class RuleUnderTest:
    """A rule of somebody's own, and the oracle's way to say the same."""

    make: Callable[[], Rule]
    layer: type[Layer]
    orders: int = 0  # of momentum, in the final state
    window: int = 1


@dataclass(frozen=True)
class Case:
    """One drawn configuration with everything that is fed."""

    options: dict[str, Any]
    batch: int
    num_tokens: int
    split: tuple[int, ...]
    seed: int
    has_mask: bool
    has_store_seq: bool
    engine: str | None = field(default=None)
    rule: RuleUnderTest | None = field(default=None)
    borders: ShardsUnderTest | CapacityUnderTest = field(default=ShardsUnderTest(None))


STEPS = (None, "sparse", None, None)
"""Step sizes, chosen by a case's seed: one more draw would be other draws of everything after it"""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chosen = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    options = legal(chosen)
    num_tokens = draw(st.integers(1, 14))
    cuts = draw(st.sets(st.integers(1, num_tokens - 1), max_size=6)) if num_tokens > 1 else set()
    edges = [0, *sorted(cuts), num_tokens]
    split = tuple(b - a for a, b in itertools.pairwise(edges))
    engines = ["dense", "general"] if options.get("spectral_norm_surprises") else ["factored", "dense", "general"]
    engine = draw(st.sampled_from(engines)) if chosen["model"] != "opaque" else "general"
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 10_000))
    return Case(
        options | {"adaptive_step_transform": STEPS[seed % len(STEPS)]},
        batch,
        num_tokens,
        split,
        seed,
        chosen["mask"],
        chosen["store_seq"],
        engine,
    )


def legal(chosen: dict[str, Any]) -> dict[str, Any]:
    """Options without contradictions: what needs another option is only kept with it."""
    options = {name: value for name, value in chosen.items() if name not in ("mask", "store_seq", "batches")}
    chunk = options["chunk_size"][1] if isinstance(options["chunk_size"], tuple) else options["chunk_size"]
    options |= {"dim": 4 if options["heads"] == 1 else 6, "dim_head": DIM_HEAD}
    options["batch_size"] = None if chosen["batches"] is None else chosen["batches"] * chunk
    if chunk == 1:
        options |= {"attn_pool_chunks": False}
    if not options["momentum"]:
        options |= {"momentum_order": 1}
    if options["momentum_order"] == 1:
        options |= {"learned_momentum_combine": False}
    if not options["learned_momentum_combine"]:
        options |= {"learned_combine_include_zeroth": False}
    if options["accept_weight_residual"]:
        options |= {"window": 1}
    if options["loss"] is not None:
        options |= {"summed_loss": False}
    if options["qk_l2norm"]:
        options |= {"qk_rmsnorm": False}
    if options["model"] == "layerwise":
        options |= {"mem_model_norm_add_residual": False}
    if not options["mem_model_norm_add_residual"]:
        options |= {"learned_norm_gain": False}
    # Newton-Schulz blows what rounding leaves of a singular value up 485 times: large steps would feed it back
    is_summed = options["summed_loss"] or options["loss"] in ("sse", "dot", "cosine")
    largest_step = 0.1 if is_summed else 0.4
    options["default_step_transform_max_lr"] = 0.05 if options["spectral_norm_surprises"] else largest_step
    options["default_model_kwargs"] = dict(depth=2, expansion_factor=1.5)
    return options


OF_TITANS = RuleOptions.__dataclass_fields__
"""Options that configure the rule of Titans"""


def with_rule(case: Case, rule: RuleUnderTest) -> Case:
    """A drawn configuration with another rule, and so without the options of that of Titans."""
    options = {name: value for name, value in case.options.items() if name not in OF_TITANS}
    return replace(case, options=options, rule=rule)


def build(case: Case, **changes: Any) -> NeuralMemory:
    """The memory of a case in float64, every parameter moved away from where it starts."""
    torch.manual_seed(case.seed)
    options = case.options | changes
    activation = None if options["activation"] is None else nn.SiLU()
    if case.rule is not None:
        options["rule"] = case.rule.make()
    options |= case.borders._asdict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        memory = NeuralMemory(
            **options | {"model": MODELS[options["model"]](), "activation": activation}, engine=case.engine
        ).double()
    memory = disturbed(memory)
    if options.get("adaptive_step_transform") == "sparse":
        with torch.no_grad():  # to where some steps are 0 and some are not
            memory.to_adaptive_step[0].bias.sub_(2.2)
    return memory


@dataclass(frozen=True)
class Fed:
    seq: Tensor
    store_seq: Tensor | None
    mask: Tensor | None

    def piece(self, stretch: slice) -> dict[str, Any]:
        store_seq = None if self.store_seq is None else self.store_seq[..., stretch, :]
        mask = None if self.mask is None else self.mask[:, stretch]
        return {"seq": self.seq[..., stretch, :], "store_seq": store_seq, "store_mask": mask}


def inputs(case: Case) -> Fed:
    generator = torch.Generator().manual_seed(case.seed + 1)
    views = case.options["qkv_receives_diff_views"]
    shape = (case.batch, case.num_tokens, case.options["dim"])
    seq = torch.randn(3, *shape, generator=generator).double() if views else torch.randn(shape, generator=generator)
    seq = seq.double().requires_grad_()
    store_seq = None
    if case.has_store_seq:
        store_seq = torch.randn(*((2,) if views else ()), *shape, generator=generator).double().requires_grad_()
    mask = torch.rand(shape[:2], generator=generator) > 0.4 if case.has_mask else None
    return Fed(seq, store_seq, mask)


def by_oracle(
    case: Case, memory: NeuralMemory, fed: Fed, prev_updates: dict[str, Tensor] | None, **changes: Any
) -> OracleOutput:
    """The same by the oracle, on the same parameters."""
    options = {name: value for name, value in case.options.items() if name not in ("model", "activation")} | changes
    options["activation"] = None if case.options["activation"] is None else nn.SiLU()
    if case.rule is not None:
        options |= {"momentum": case.rule.orders > 0, "momentum_order": max(case.rule.orders, 1)}
        options |= {"window": case.rule.window}
    layer = None if case.borders == ShardsUnderTest(None) else case.borders.layer
    parameters = dict(memory.named_parameters())
    return oracle(
        parameters,
        memory.memory_model,
        fed.seq,
        store_seq=fed.store_seq,
        store_mask=fed.mask,
        prev_updates=prev_updates,
        layer_kind=layer if case.rule is None else case.rule.layer,
        **options,
    )


__all__ = ["MODELS", "OPTIONS", "Case", "Fed", "RuleUnderTest", "build", "by_oracle", "cases", "inputs", "with_rule"]
