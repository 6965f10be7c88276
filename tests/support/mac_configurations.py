"""Transformers to try, as data; small ones, every parameter moved away from where it starts."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st

from tests.support.streams import disturbed
from titans_pytorch import MemoryAttention, MemoryMLP
from titans_pytorch.mac_transformer import MemoryAsContextTransformer

NUM_TOKENS, SEGMENT = 11, 3

OPTIONS: dict[str, list[Any]] = {
    "sliding_window_attn": [False, True],
    "num_longterm_mem_tokens": [0, 1, 4],
    "num_persist_mem_tokens": [0, 2],
    "neural_memory_layers": [None, (2,), (1, 3), ()],
    "neural_memory_segment_len": [None, 2, 5, 9],
    "batches": [None, 1, 2],  # chunks in a batch of the memory
    "neural_mem_gate_attn_output": [False, True],
    "neural_memory_qkv_receives_diff_views": [False, True],
    "neural_mem_weight_residual": [False, True],
    "num_residual_streams": [1, 2],
    "memory": ["default", "two heads", "gated transition", "attention", "lookahead", "two updates"],
}

MEMORIES: dict[str, dict[str, Any]] = {
    "default": {},
    "two heads": dict(neural_memory_kwargs=dict(heads=2, dim_head=4), neural_memory_model=MemoryMLP(4, depth=1)),
    "gated transition": dict(neural_memory_kwargs=dict(gated_transition=True, attn_pool_chunks=True)),
    "attention": dict(neural_memory_model=MemoryAttention(8, expansion_factor=1.0)),
    "lookahead": dict(neural_memory_kwargs=dict(store_with_lookahead_value=True, momentum=False)),
    "two updates": dict(neural_memory_kwargs=dict(num_kv_per_token=2, qk_rmsnorm=True, momentum_order=2)),
}


def build(*, seed: int = 0, **chosen: Any) -> MemoryAsContextTransformer:
    """The transformer of some of the OPTIONS, in float64."""
    options = {name: value for name, value in chosen.items() if name not in ("memory", "batches")}
    window = SEGMENT + options.get("num_longterm_mem_tokens", 0)
    chunk = options.get("neural_memory_segment_len") or window
    if (batches := chosen.get("batches")) is not None:
        options["neural_memory_batch_size"] = batches * chunk
    options |= MEMORIES[chosen.get("memory", "default")]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = MemoryAsContextTransformer(
            num_tokens=NUM_TOKENS, dim=8, depth=3, segment_len=SEGMENT, dim_head=4, heads=2, ff_mult=2, **options
        ).double()
    return disturbed(model)


def window_of(chosen: dict[str, Any]) -> int:
    return SEGMENT + chosen.get("num_longterm_mem_tokens", 0)


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    return {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items()}


@st.composite
def splits(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    """Lengths of pieces that sum to count."""
    cuts = draw(st.sets(st.integers(1, count - 1), max_size=count)) if count > 1 else set()
    edges = [0, *sorted(cuts), count]
    return tuple(b - a for a, b in pairwise(edges))
