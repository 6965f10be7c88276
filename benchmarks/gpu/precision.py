"""What TF32 is worth: float32 matrix products at full precision and at that of TF32."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Item, Record
from titans_pytorch import NeuralMemory, TitansBackbone, TitansConfig

PRECISIONS = {"float32": "highest", "TF32": "high"}


def memory(is_quick: bool) -> tuple[nn.Module, int, int]:
    return (NeuralMemory(32, 16), 32, 64) if is_quick else (NeuralMemory(384, 64), 384, 1024)


def model(is_quick: bool) -> tuple[nn.Module, int, int]:
    dim, tokens = (32, 64) if is_quick else (768, 4096)
    config = TitansConfig(dim=dim, depth=2, heads=4, window=32, memory_chunk=16, memory_refresh=None)
    return TitansBackbone("mag", config), dim, tokens


MODULES = {"NeuralMemory, dim 384, chunk 64": memory, "MAG, dim 768, depth 2, never renewed": model}


def measure(name: str, bench: Bench) -> Record:
    """Forward and backward.  -> precision -> seconds, and how far outputs are from those at full precision"""
    torch.manual_seed(0)
    with bench.device:
        module, dim, tokens = MODULES[name](bench.is_quick)
        seq = torch.randn(2, tokens, dim)

    def training() -> Tensor:
        module.zero_grad()
        outputs = module(seq)[0]
        outputs.square().mean().backward()
        return outputs.detach()

    found: Record = {}
    exact: Tensor | None = None
    before = torch.get_float32_matmul_precision()
    try:
        for precision, setting in PRECISIONS.items():
            torch.set_float32_matmul_precision(setting)
            outputs = training()
            exact = outputs if exact is None else exact
            difference = ((outputs - exact).norm() / exact.norm()).item()
            found[precision] = bench.timed(training) | {"difference": difference}
    finally:
        torch.set_float32_matmul_precision(before)
    return found


ITEMS = [Item("precision", name, 8, partial(measure, name)) for name in MODULES]
