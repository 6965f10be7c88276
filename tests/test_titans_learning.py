"""What the family's memories know before training, and that they learn to recall beyond the window."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from benchmarks.learning.recall import MODELS, accuracy, train
from titans_pytorch import NeuralMemory
from titans_pytorch.memory.convolution import projected
from titans_pytorch.tasks import MQAR
from titans_pytorch.titans import TitansConfig
from titans_pytorch.titans.memory import make_memory

VARIANTS = tuple(MODELS)


@torch.no_grad()
@pytest.mark.parametrize(
    "memory", [lambda: make_memory(TitansConfig(dim=64, depth=1, heads=2)), lambda: NeuralMemory.paper(64, heads=2)]
)
def test_a_token_finds_what_was_stored_next_to_it_before_any_training(memory: Callable[[], NeuralMemory]) -> None:
    built, x = memory(), torch.randn(1, 200, 64)
    queries, keys = (F.normalize(projected(layer, x, None)[0], dim=-1) for layer in (built.to_queries, built.to_keys))
    similarity = (queries[0] @ keys[0].mT)[:-1]  # a token and the key under which the one after it is stored
    assert (similarity.argmax(dim=1) == torch.arange(1, 200)).float().mean() > 0.95


@pytest.mark.parametrize("conv_size", [None, 1, 2])
def test_memories_with_short_convolutions_or_none_begin_too(conv_size: int | None) -> None:
    memory = make_memory(TitansConfig(dim=16, depth=1, heads=2, conv_size=conv_size))
    retrieved, _ = memory(torch.randn(1, 20, 16))
    assert retrieved.isfinite().all()


@pytest.mark.parametrize("model", ["linear", pytest.param("layerwise", marks=pytest.mark.slow)])
def test_delta_rules_learn_to_recall_in_75_steps(model: str) -> None:
    """Without attention; the step of a linear memory replaces what a key holds, so there is little to learn."""
    task = MQAR(pairs=8, keys=64, tokens=96, gap=16)
    torch.manual_seed(0)
    config = TitansConfig.delta(64, 2, window=8, heads=2, memory_heads=1, memory_model=model)
    lmm = MODELS["lmm"](task.num_tokens, config)
    train(lmm, task, Namespace(seed=0, lr=4e-3, steps=75, rows=16, minutes=10.0))
    assert accuracy(lmm, task, torch.Generator().manual_seed(1)) >= 0.99


RESTARTING = TitansConfig.tnt(64, 2, global_chunk=32, shard=32, window=8, heads=2, memory_heads=1)
LONG_CHUNKS = TitansConfig.lact(64, 2, chunk=16, window=8, heads=2, memory_heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [RESTARTING, LONG_CHUNKS], ids=["tnt", "lact"])
def test_memories_that_restart_or_keep_norms_learn_to_recall(config: TitansConfig) -> None:
    """Without attention, over more tokens than a shard or a chunk has."""
    task = MQAR(pairs=8, keys=64, tokens=96, gap=16)
    torch.manual_seed(0)
    lmm = MODELS["lmm"](task.num_tokens, config)
    train(lmm, task, Namespace(seed=0, lr=4e-3, steps=75, rows=16, minutes=10.0))
    assert accuracy(lmm, task, torch.Generator().manual_seed(1)) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_recall_beyond_the_window_is_learned(variant: str) -> None:
    task = MQAR(pairs=8, keys=64, tokens=96, gap=16)
    found = {}
    for memory in (True, False):
        torch.manual_seed(0)
        config = TitansConfig(dim=64, depth=2, window=8, heads=2, memory_heads=1, memory=memory)
        model = MODELS[variant](task.num_tokens, config)
        train(model, task, Namespace(seed=0, lr=4e-3, steps=150, rows=16, minutes=10.0))
        found[memory] = accuracy(model, task, torch.Generator().manual_seed(1))
    assert found[True] >= 0.99
    assert found[False] <= 0.05
