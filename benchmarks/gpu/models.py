"""A training step of models of 170M parameters at 4,096 tokens, in bfloat16 autocast: tokens a second, peak memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Item, Record
from benchmarks.speed.family import size
from titans_pytorch import TitansConfig, TitansLMM, TitansMAG
from titans_pytorch.cuda_graphs import captured
from titans_pytorch.titans.config import PAPER_TOKENS
from titans_pytorch.titans.language_model import TitansLanguageModel

TOKENS = 4096
KINDS: dict[str, type[TitansLanguageModel]] = {"LMM": TitansLMM, "MAG": TitansMAG}


def config_of(kind: type[TitansLanguageModel], refresh: int, is_quick: bool) -> TitansConfig:
    """12 blocks of 768 features, 16 memories d 48, h 192 in each, chunks of 16, one gate for all parameters.

    refresh: tokens after which surprises are taken at the current memory
    """
    if is_quick:
        return TitansConfig(dim=32, depth=2, window=32, memory_chunk=16, memory_refresh=min(refresh, 64))
    return replace(TitansConfig.preset("170M", kind.variant), memory_refresh=refresh, memory_options={})


def training_step(bench: Bench, model: TitansLanguageModel) -> Callable[[Tensor], Tensor]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=bench.is_cuda)

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad()
        with bench.autocast(torch.bfloat16):
            loss = model.loss(ids)
        loss.backward()
        optimizer.step()
        return loss

    return step


def measure(kind: type[TitansLanguageModel], refresh: int, is_captured: bool, bench: Bench) -> Record:
    if is_captured:
        bench.need_cuda("a CUDA graph")
    torch.manual_seed(0)
    vocabulary, tokens = (256, 128) if bench.is_quick else (PAPER_TOKENS, TOKENS)
    with bench.device:
        model = kind(vocabulary, config_of(kind, refresh, bench.is_quick))
        ids = torch.randint(0, vocabulary, (1, tokens + 1))
    step, losses = training_step(bench, model), deque[Tensor](maxlen=1)
    if is_captured:
        step = captured(step, ids)
    found = bench.timed(lambda: losses.append(step(ids)), warm_ups=1)
    loss = losses[-1].item()
    return found | {"tokens_per_second": tokens / found["seconds"], "parameters": size(model), "loss": loss}


def item(kind: str, refresh: int, is_captured: bool, seconds: float) -> Item:
    name = f"{kind}, renewed every {refresh:,} tokens" + (", as a CUDA graph" if is_captured else "")
    return Item("models", name, seconds, partial(measure, KINDS[kind], refresh, is_captured))


ITEMS = [
    item("LMM", 4096, False, 15),
    item("LMM", 16, False, 45),
    item("MAG", 4096, False, 15),
    item("LMM", 4096, True, 25),
]
LONG_ITEMS = [item("MAG", 16, False, 45), item("LMM", 16, True, 80)]
"""What comes last: graphs of hundreds of thousands of operations"""
