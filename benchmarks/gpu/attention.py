"""SegmentedAttention by FlexAttention and by dense masks of its windows, in bfloat16 autocast."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Item, Record
from titans_pytorch import SegmentedAttention


def measure(segment: int, sliding: bool, bench: Bench) -> Record:
    """Forward and forward + backward of both.  -> mode -> flex or dense -> seconds and bytes"""
    bench.need_cuda("FlexAttention here")
    torch.manual_seed(0)
    dim, tokens = (64, 256) if bench.is_quick else (512, 8192)
    with bench.device:
        attention = SegmentedAttention(
            dim, segment, num_persist_mem_tokens=4, heads=dim // 64, sliding=sliding, use_flex_attn=True
        )
        seq = torch.randn(2, tokens, dim, requires_grad=True)

    def forward(is_dense: bool) -> torch.Tensor:
        with bench.autocast(torch.bfloat16):
            return attention(seq, disable_flex_attn=is_dense)[0]

    def training(is_dense: bool) -> None:
        attention.zero_grad()
        forward(is_dense).float().square().mean().backward()

    found: Record = {"forward": {}, "training": {}}
    for name, is_dense in (("flex", False), ("dense", True)):
        with torch.no_grad():
            found["forward"][name] = bench.timed(partial(forward, is_dense))
        found["training"][name] = bench.timed(partial(training, is_dense))
    return found


ITEMS = [
    Item(
        "attention",
        f"{'sliding' if sliding else 'aligned'} windows of {segment}",
        25,
        partial(measure, segment, sliding),
    )
    for segment, sliding in ((128, True), (1024, False))
]
