"""Every public module that reads sequences, small, as data: what it is given, and how it goes on from a state.

A new public module is one line here and enters the tests of all devices; `test_meta.py` finds one that is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import titans_pytorch
from tests.support.streams import with_state
from tests.support.titans_configurations import PAPER, SMALL
from tests.test_ecosystem import CONFIGURATIONS
from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    ImplicitMLPAttention,
    LayerwiseMemory,
    MemoryAsContextTransformer,
    MemoryAttention,
    MemoryGLU,
    MemoryMLP,
    MemorySwiGluMLP,
    NestedAttention,
    NeuralMemory,
    ResidualNorm,
    SegmentedAttention,
    TitansBackbone,
    TitansConfig,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TNTMemory,
)
from titans_pytorch.attention_transformer import AttentionTransformer

NUM_TOKENS, DIM = 11, 8

Stream = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]


class Reader(NamedTuple):
    """A module that reads sequences, how it is made, what it is given and how it reads a piece."""

    kind: type[nn.Module]
    build: Callable[[], nn.Module]
    reads: Literal["ids", "features"]
    stream: Stream | None  # (module, piece, state) -> (outputs, the next state); None: it has no state

    def given(self, batch: int, count: int, seed: int = 0) -> Tensor:
        """Random tokens, never zeros, on the CPU.  (b n) ids or (b n dim)"""
        return self.drawn(batch, count, torch.Generator().manual_seed(seed))

    def drawn(self, batch: int, count: int, generator: torch.Generator | None) -> Tensor:
        """Random tokens where tensors are made.  generator: None for the global one"""
        if self.reads == "ids":
            return torch.randint(0, NUM_TOKENS, (batch, count), generator=generator)
        return torch.randn(batch, count, DIM, generator=generator)

    def made(self, seed: int = 0) -> nn.Module:
        """The module, from a seed of its own."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # options without an effect are tried, too
            return self.build()

    def outputs(self, module: nn.Module, given: Tensor) -> Tensor:
        """What the module says of a whole sequence.  -> (b n ...)"""
        return module(given) if self.stream is None else self.stream(module, given, None)[0]


def with_cache(module: Callable[..., Any], piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """One call of a transformer that takes `cache` and returns it when asked."""
    return module(piece, cache=cache, return_cache=True)


def with_kv_cache(module: Callable[..., Any], piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """One call of an attention that takes `cache` and returns it when asked."""
    return module(piece, cache=cache, return_kv_cache=True)


def with_intermediates(module: Callable[..., Any], piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """One call of `SegmentedAttention`."""
    out, intermediates = module(piece, cache=cache)
    return out, intermediates.cached_key_values


LINEAR: dict[str, Any] = dict(
    dim=DIM, chunk_size=1, batch_size=1, mem_model_norm_add_residual=False, max_weight_growth=None, qk_l2norm=True
)
"""Renewals of such memories are solved for"""

MEMORY_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: options | dict(dim=DIM) for name, options in CONFIGURATIONS.items() if name != "attention"},
    "base renewed every chunk": dict(dim=DIM, chunk_size=4, batch_size=4, default_step_transform_max_lr=0.1),
    "never renewed": dict(dim=DIM, chunk_size=4),
    "4 heads": dict(dim=DIM, dim_head=4, heads=4, chunk_size=4, batch_size=8, default_step_transform_max_lr=0.1),
    "spectral norm": dict(dim=DIM, chunk_size=4, spectral_norm_surprises=True, default_step_transform_max_lr=0.05),
    "dense": dict(dim=DIM, chunk_size=4, engine="dense"),
    "chunks of reading of their own": dict(dim=DIM, chunk_size=(3, 2)),
    "linear, at every token": LINEAR | dict(model="linear"),
    "layer by layer": LINEAR | dict(model="layerwise", rule="gated_delta"),
    "towards the start": dict(dim=DIM, chunk_size=4, rule="decay_to_start"),
    "a window, powers of keys": dict(
        dim=DIM, chunk_size=1, batch_size=5, window=3, key_powers=2, default_step_transform_max_lr=0.1
    ),
    "atlas": dict(dim=DIM, chunk_size=2, batch_size=4, rule="atlas", window=3, default_step_transform_max_lr=0.1),
    "yaad": dict(dim=DIM, chunk_size=4, batch_size=4, loss="yaad"),
    "moneta": dict(dim=DIM, chunk_size=4, batch_size=4, loss="lp:3", rule="lq:4", momentum=False),
    "memora": dict(dim=DIM, chunk_size=4, batch_size=4, rule="kl", momentum=False),
    "norms that stay": dict(
        dim=DIM, chunk_size=4, batch_size=4, rule="lact", loss="dot", model="glu", mem_model_norm_add_residual=False
    ),
    "in shards": dict(dim=DIM, chunk_size=2, batch_size=2, shard=4, qk_projection="shard", conv_size=3),
    "growing": dict(dim=DIM, chunk_size=2, batch_size=2, capacity=(2, 4), conv_size=3),
    "applied, then updated": dict(dim=DIM, chunk_size=4, batch_size=4, apply_then_update=True),
    "a chunk is a token": dict(dim=DIM, chunk_size=1, batch_size=5, default_step_transform_max_lr=0.1),
}
MEMORY_MODELS = {
    MemoryMLP: lambda: MemoryMLP(DIM, depth=2),
    GatedResidualMemoryMLP: lambda: GatedResidualMemoryMLP(DIM, depth=1),
    FactorizedMemoryMLP: lambda: FactorizedMemoryMLP(DIM, depth=2, k=2),
    MemoryGLU: lambda: MemoryGLU(DIM),
    MemorySwiGluMLP: lambda: MemorySwiGluMLP(DIM, depth=1),
    LayerwiseMemory: lambda: LayerwiseMemory(DIM),
    MemoryAttention: lambda: MemoryAttention(DIM),
    ResidualNorm: lambda: ResidualNorm(DIM, MemoryMLP(DIM, depth=2)),
}
MAC_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(num_longterm_mem_tokens=1, num_persist_mem_tokens=2),
    "everything": dict(
        num_longterm_mem_tokens=1,
        num_persist_mem_tokens=2,
        sliding_window_attn=True,
        neural_memory_segment_len=2,
        neural_memory_batch_size=4,
        neural_mem_gate_attn_output=True,
        neural_memory_qkv_receives_diff_views=True,
        neural_mem_weight_residual=True,
        neural_memory_kwargs=dict(heads=2, dim_head=4),
    ),
    "one stream, one memory": dict(num_residual_streams=1, neural_memory_layers=(2,)),
}
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {
    "aligned": dict(num_persist_mem_tokens=2),
    "sliding": dict(sliding=True, num_longterm_mem_tokens=1),
}
TITANS_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "never refreshed": dict(memory_refresh=None),
    "the paper's memory": dict(memory_options=PAPER),
    "memory in one block": dict(memory_layers=(2,)),
}
TITANS = {"mac": TitansMAC, "mag": TitansMAG, "mal": TitansMAL, "lmm": TitansLMM}


def config(**options: Any) -> TitansConfig:
    return TitansConfig(**SMALL | dict(dim=DIM) | options)


def small_mac(**options: Any) -> MemoryAsContextTransformer:
    return MemoryAsContextTransformer(
        num_tokens=NUM_TOKENS, dim=DIM, depth=3, segment_len=3, dim_head=4, heads=2, ff_mult=2, **options
    )


def small_transformer(kind: Any) -> AttentionTransformer:
    return AttentionTransformer(
        num_tokens=NUM_TOKENS, dim=DIM, depth=2, attention=kind, heads=2, dim_head=4, mlp_hiddens=(4, 6, 4)
    )


def readers() -> dict[str, Reader]:
    """All of them by name."""
    found: dict[str, Reader] = {}
    for name, options in MEMORY_OPTIONS.items():
        found[f"NeuralMemory, {name}"] = Reader(
            NeuralMemory, lambda o=options: NeuralMemory(**o), "features", with_state
        )
    found["NeuralMemory, the paper's"] = Reader(
        NeuralMemory, lambda: NeuralMemory.paper(DIM, heads=2, chunk_size=4), "features", with_state
    )
    found["TNTMemory"] = Reader(
        TNTMemory,
        lambda: TNTMemory(DIM, heads=2, global_chunk=4, local_chunks=(2, 1), shard=4),
        "features",
        with_state,
    )
    for kind, build in MEMORY_MODELS.items():
        found[kind.__name__] = Reader(kind, build, "features", None)
        has_norm = kind is not LayerwiseMemory  # whose layers are taught by themselves
        found[f"NeuralMemory of {kind.__name__}"] = Reader(
            NeuralMemory,
            lambda b=build, n=has_norm: NeuralMemory(DIM, 4, batch_size=8, model=b(), mem_model_norm_add_residual=n),
            "features",
            with_state,
        )
    for name, options in ATTENTION_OPTIONS.items():
        found[f"SegmentedAttention, {name}"] = Reader(
            SegmentedAttention,
            lambda o=options: SegmentedAttention(DIM, 3, dim_head=4, heads=2, **o),
            "features",
            with_intermediates,
        )
    found["NestedAttention"] = Reader(
        NestedAttention, lambda: NestedAttention(DIM, dim_head=4, heads=2), "features", with_kv_cache
    )
    found["ImplicitMLPAttention"] = Reader(
        ImplicitMLPAttention, lambda: ImplicitMLPAttention(DIM, (4, 6, 4), heads=2), "features", with_kv_cache
    )
    for attention in ("implicit-mlp", "nested", "full"):
        found[f"AttentionTransformer, {attention}"] = Reader(
            AttentionTransformer, lambda a=attention: small_transformer(a), "ids", with_cache
        )
    for name, options in MAC_OPTIONS.items():
        found[f"MemoryAsContextTransformer, {name}"] = Reader(
            MemoryAsContextTransformer, lambda o=options: small_mac(**o), "ids", with_cache
        )
    for variant, model in TITANS.items():
        for name, options in TITANS_OPTIONS.items():
            found[f"{model.__name__}, {name}"] = Reader(
                model, lambda m=model, o=options: m(NUM_TOKENS, config(**o)), "ids", with_state
            )
        found[f"TitansBackbone, {variant}"] = Reader(
            TitansBackbone, lambda v=variant: TitansBackbone(v, config()), "features", with_state
        )
    return found


READERS = readers()


def public_modules() -> set[type[nn.Module]]:
    """Every module that users import from the package."""
    named = (getattr(titans_pytorch, name) for name in titans_pytorch.__all__)
    return {each for each in named if isinstance(each, type) and issubclass(each, nn.Module)}
