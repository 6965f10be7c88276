"""Tokens a second, one at a time: step by step, compiled, and as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Item, Record, Unavailable
from titans_pytorch import NeuralMemory, TitansBackbone, TitansConfig
from titans_pytorch.cuda_graphs import CapturedStream

CHUNK = 16
RECOMPILE_LIMIT = 64
"""Enough for every place in a chunk to be a program of its own"""

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def memory(is_quick: bool) -> tuple[nn.Module, int]:
    dim = 32 if is_quick else 384
    return NeuralMemory(dim, CHUNK), dim


def backbone(variant: str, is_quick: bool) -> tuple[nn.Module, int]:
    dim = 32 if is_quick else 384
    config = TitansConfig(dim=dim, depth=2 if is_quick else 4, window=32, memory_chunk=CHUNK, memory_refresh=CHUNK)
    return TitansBackbone(variant, config), dim


MODULES: dict[str, tuple[Callable[[bool], tuple[nn.Module, int]], int]] = {
    "NeuralMemory, dim 384, chunk 16": (memory, CHUNK),
    "LMM, dim 384, depth 4": (partial(backbone, "lmm"), CHUNK),
    "MAC, dim 384, depth 4, window 32": (partial(backbone, "mac"), 2 * CHUNK),
    "MAG, dim 384, depth 4, window 32": (partial(backbone, "mag"), 2 * CHUNK),
}
"""By name: how it is made, and after how many tokens everything begins alike"""


def eager(step: Step, state: Any, token: Tensor, period: int) -> Callable[[], object]:
    return going_on(step, state, token)


def compiled(step: Step, state: Any, token: Tensor, period: int) -> Callable[[], object]:
    torch._dynamo.reset()
    run = going_on(torch.compile(step), state, token)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        for _ in range(2 * period):
            run()
    return run


def as_graphs(step: Step, state: Any, token: Tensor, period: int) -> Callable[[], object]:
    try:
        decode = CapturedStream(step, state, token, period=period)
        for _ in range(2 * period):
            decode(token)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return lambda: decode(token)


def going_on(step: Step, state: Any, token: Tensor) -> Callable[[], object]:
    """Each call reads the token once more, after all those before."""

    def run() -> Tensor:
        nonlocal state
        outputs, state = step(token, state)
        return outputs

    return run


WAYS = {"eager": eager, "compiled": compiled, "as CUDA graphs": as_graphs}


@torch.no_grad()
def measure(module_name: str, way: str, bench: Bench) -> Record:
    if way != "eager":
        bench.need_cuda("a CUDA graph" if way == "as CUDA graphs" else "compiling for a GPU")
    torch.manual_seed(0)
    make, period = MODULES[module_name]
    with bench.device:
        module, dim = make(bench.is_quick)
        token, prompt = torch.randn(1, 1, dim), torch.randn(1, 4 * period, dim)

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return module(x, state=state)

    state = module(prompt)[1]
    run = WAYS[way](step, state, token, period)
    found = bench.timed(lambda: [run() for _ in range(period)])  # whole periods, with their share of chunk ends
    return found | {"tokens_per_second": period / found["seconds"]}


def items(way: str, seconds: float, names: list[str]) -> list[Item]:
    return [Item("decoding", f"{name}: {way}", seconds, partial(measure, name, way)) for name in names]


ITEMS = [*items("eager", 6, list(MODULES)), *items("as CUDA graphs", 10, list(MODULES))]
LONG_ITEMS = items("compiled", 75, list(MODULES)[:1])
"""What comes last: every place in a chunk may be compiled by itself, which takes minutes for a whole model"""
