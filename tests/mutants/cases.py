"""A few configurations that together use every rule of a memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from tests.support.capacity_by_the_book import CapacityUnderTest
from tests.support.configurations import DIM_HEAD, OPTIONS, Case, with_rule
from tests.support.rules_by_the_book import (
    ATLAS,
    DECAY_TO_START,
    GATED_DELTA,
    GATED_DELTA_WINDOW,
    LACT,
    LACT_ORTHOGONAL,
    MEMORA,
    MONETA,
)
from tests.support.shards_by_the_book import ShardsUnderTest

PLAIN = {name: values[0] for name, values in OPTIONS.items() if name not in ("mask", "store_seq", "batches")} | {
    "dim": 4,
    "dim_head": DIM_HEAD,
    "chunk_size": 2,
    "batch_size": None,
    "default_step_transform_max_lr": 0.4,
    "default_model_kwargs": dict(depth=2, expansion_factor=1.5),
}
RICH = PLAIN | {
    "dim": 6,
    "heads": 2,
    "chunk_size": 3,
    "batch_size": 6,
    "momentum_order": 2,
    "learned_momentum_combine": True,
    "learned_combine_include_zeroth": True,
    "per_parameter_lr_modulation": True,
    "attn_pool_chunks": True,
    "num_kv_per_token": 2,
    "post_rmsnorm": True,
    "qk_rmsnorm": True,
    "max_grad_norm": 0.5,
    "accept_weight_residual": True,
    "gated_transition": True,
    "max_weight_growth": 1.02,
}

LOOP = PLAIN | {"batch_size": 4, "summed_loss": False}

PAPER = PLAIN | {
    "dim": 6,
    "heads": 2,
    "chunk_size": 3,
    "batch_size": 6,
    "activation": "SiLU",
    "qk_l2norm": True,
    "conv_size": 4,
    "summed_loss": True,
    "per_parameter_gates": True,
    "channelwise_decay": True,
    "learned_norm_gain": True,
    "gated_output": True,
    "default_step_transform_max_lr": 0.1,
}

LINEAR = PLAIN | {
    "model": "linear",
    "heads": 2,
    "dim": 6,
    "chunk_size": 1,
    "batch_size": 1,
    "mem_model_norm_add_residual": False,
    "max_weight_growth": None,
}

WINDOW = PLAIN | {"batch_size": 4, "window": 4, "key_powers": 3, "per_parameter_lr_modulation": True}


IN_SHARDS = PLAIN | {"dim": 6, "heads": 2, "batch_size": 2, "conv_size": 3}


LACT_OPTIONS = PLAIN | {"model": "glu", "mem_model_norm_add_residual": False, "loss": "dot", "batch_size": 2}


def in_shards(qk_projection: Literal["chunk", "shard"]) -> Case:
    """Parts of a shard, whole ones side by side, and a border between calls."""
    drawn = case(IN_SHARDS, split=(5, 3, 16, 1, 9), mask=True)
    return replace(drawn, borders=ShardsUnderTest(8, qk_projection))


def case(
    chosen: dict[str, Any],
    split: tuple[int, ...] = (5, 1, 7),
    engine: str = "factored",
    mask: bool = False,
    store: bool = False,
    seed: int = 3,
) -> Case:
    return Case(chosen, 2, sum(split), split, seed, mask, store, engine)


CASES = {
    "plain": case(PLAIN | {"batch_size": 4}),
    "rich": case(RICH, mask=True, seed=4),
    "rich, one chunk a batch": case(RICH | {"batch_size": 3}, mask=True, seed=4),
    "lookahead and views": case(
        PLAIN | {"store_with_lookahead_value": True, "qkv_receives_diff_views": True, "chunk_size": 4}, store=True
    ),
    "grown": case(PLAIN | {"batch_size": 4, "max_weight_growth": 1.02, "default_step_transform_max_lr": 4.0}),
    "sparse": case(PLAIN | {"batch_size": 4, "adaptive_step_transform": "sparse"}),
    "read apart": case(PLAIN | {"chunk_size": (3, 2), "momentum": False}),
    "attention": case(PLAIN | {"model": "attention", "chunk_size": 4}, mask=True, seed=4),
    "spectral": case(PLAIN | {"spectral_norm_surprises": True, "batch_size": 4}, engine="dense"),
    "spectral, equal blocks": case(
        PLAIN | {"spectral_norm_surprises": True, "batch_size": 4}, split=(13,), engine="dense"
    ),
    "general": case(PLAIN | {"model": "opaque", "accept_weight_residual": True}, engine="general", mask=True, seed=4),
    "paper": case(PAPER, mask=True),
    "paper, in no loop": case(PAPER | {"max_grad_norm": 0.5}, mask=True),
    "paper, one chunk a batch": case(PAPER | {"batch_size": 3}),
    "paper, dense": case(PAPER, engine="dense"),
    "paper, square": case(
        PAPER | {"batch_size": 3, "default_model_kwargs": dict(depth=1), "per_parameter_gates": False}
    ),
    "paper, general": case(PAPER, engine="general"),
    "paper, mixing tokens": case(PAPER | {"model": "attention", "learned_norm_gain": False}),
    "loop": case(LOOP | {"batch_size": 2}, split=(3, 8, 5)),
    "loop of two": case(LOOP, split=(5, 12)),
    "loop of shares": case(LOOP | {"batch_size": 8, "momentum_order": 2}, split=(17, 8)),
    "gated loop": case(LOOP | {"gated_transition": True}, split=(17, 4)),
    "loop cut in a batch": case(LOOP, split=(2, 4, 5)),
    "grown loop": case(LOOP | {"max_weight_growth": 1.02, "default_step_transform_max_lr": 2.0}, split=(17,)),
    "solved": case(LINEAR, split=(40, 1, 9)),
    "solved, two orders": case(LINEAR | {"momentum_order": 2, "num_kv_per_token": 2}, split=(20,), mask=True),
    "layerwise": case(LINEAR | {"model": "layerwise", "per_parameter_gates": True}, split=(20, 1, 3)),
    "layerwise, chunk by chunk": case(PLAIN | {"model": "layerwise", "mem_model_norm_add_residual": False}),
    "towards the start": with_rule(case(PLAIN | {"batch_size": 4}), DECAY_TO_START),
    "towards the start, solved": with_rule(case(LINEAR, split=(40, 3)), DECAY_TO_START),
    "gated delta": with_rule(case(LINEAR, split=(40, 1, 9)), GATED_DELTA),
    "gated delta, chunk by chunk": with_rule(case(PLAIN | {"batch_size": 2}), GATED_DELTA),
    "window": case(WINDOW, split=(5, 1, 8)),
    "window, dense": case(WINDOW | {"chunk_size": 1, "batch_size": 3}, engine="dense", mask=True),
    "window, gates of channels": case(PAPER | {"window": 3}, mask=True),
    "window of a gated delta rule": with_rule(case(PLAIN | {"batch_size": 2}), GATED_DELTA_WINDOW),
    "atlas": with_rule(case(PLAIN | {"batch_size": 4}, engine="dense"), ATLAS),
    "yaad": case(PLAIN | {"loss": "yaad", "num_kv_per_token": 2}, mask=True),
    "yaad, window": case(WINDOW | {"loss": "yaad"}, engine="dense"),
    "moneta": with_rule(case(PLAIN | {"batch_size": 4, "loss": "lp:3"}, engine="dense"), MONETA),
    "memora": with_rule(case(PLAIN | {"batch_size": 2}, engine="dense", mask=True), MEMORA),
    "lengths": case(PLAIN | {"batch_size": 4, "keep_lengths": True, "max_weight_growth": None}),
    "lact": with_rule(case(LACT_OPTIONS, engine="dense"), LACT),
    "lact, orthogonal": with_rule(case(LACT_OPTIONS, engine="dense"), LACT_ORTHOGONAL),
    "capacity": replace(case(PLAIN, split=(5, 1, 9), mask=True), borders=CapacityUnderTest((3, 4))),
    "shards": in_shards("shard"),
    "shards, keys of chunks": in_shards("chunk"),
    "apply then update": case(PLAIN | {"chunk_size": 3, "batch_size": 3, "apply_then_update": True}, mask=True),
    "huber": case(PLAIN | {"loss": "huber:0.3"}),
    "lp": case(PLAIN | {"loss": "lp:3"}),
    "cosine": case(PLAIN | {"loss": "cosine"}),
    "dot": case(PLAIN | {"loss": "dot"}),
    "gates of parameters": case(PAPER | {"channelwise_decay": False, "momentum_order": 2}),
}
