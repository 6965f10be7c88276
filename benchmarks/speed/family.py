"""Training speed of the family beside MemoryAsContextTransformer and a plain attention transformer of equal size.

    python -m benchmarks.speed.family --out benchmarks/results/family.json
    python -m benchmarks.speed.family_report

One step is forward and backward of 4 x 1024 tokens at dim 384, depth 4; models take turns, medians are reported. The
plain transformer is made as large as TitansMAG by its feed-forward networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from titans_pytorch import MemoryAsContextTransformer, TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_pytorch.attention_transformer import AttentionTransformer

NUM_TOKENS, HEADS = 256, 6
Loss = Callable[[Tensor], Tensor]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def models(dim: int, depth: int, window: int) -> dict[str, tuple[nn.Module, Loss]]:
    config = TitansConfig(dim=dim, depth=depth, heads=HEADS, window=window, memory_chunk=16, memory_refresh=64)
    found: dict[str, tuple[nn.Module, Loss]] = {}
    for kind in (TitansMAC, TitansMAG, TitansMAL, TitansLMM):
        model = kind(NUM_TOKENS, config)
        found[kind.__name__] = (model, model.loss)
    mac = MemoryAsContextTransformer(
        num_tokens=NUM_TOKENS,
        dim=dim,
        depth=depth,
        segment_len=window,
        num_persist_mem_tokens=4,
        heads=HEADS,
        dim_head=dim // HEADS,
        neural_memory_segment_len=16,
        neural_memory_batch_size=64,
        neural_memory_kwargs=dict(dim_head=dim // HEADS, heads=HEADS),
    )
    found["MemoryAsContextTransformer"] = (mac, lambda ids: mac(ids, return_loss=True))
    plain = attention_transformer(dim, depth, size(found["TitansMAG"][0]))
    found["attention"] = (plain, lambda ids: plain(ids, return_loss=True))
    return found


def attention_transformer(dim: int, depth: int, parameters: int) -> AttentionTransformer:
    """Of so many parameters, by the width of its feed-forward networks."""

    def build(ff_mult: float) -> AttentionTransformer:
        return AttentionTransformer(
            num_tokens=NUM_TOKENS,
            dim=dim,
            depth=depth,
            attention="full",
            heads=HEADS,
            dim_head=dim // HEADS,
            mlp_hiddens=(dim // HEADS, dim // HEADS),
            ff_mult=ff_mult,
        )

    narrow, wide = size(build(2.0)), size(build(4.0))
    return build(2.0 + 2.0 * (parameters - narrow) / (wide - narrow))


def step(model: nn.Module, loss: Loss, ids: Tensor) -> float:
    began = time.perf_counter()
    model.zero_grad(set_to_none=True)
    loss(ids).backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(dim=384, depth=4, rows=4, tokens=1024, window=128, repeats=5)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = models(args.dim, args.depth, args.window)
    ids = torch.randint(0, NUM_TOKENS, (args.rows, args.tokens + 1))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(args.repeats + 1):
        for name, (model, loss) in found.items():
            taken = step(model, loss, ids)
            if repeat:  # the first warms up
                seconds[name].append(taken)
    rows = []
    for name, (model, _) in found.items():
        median = statistics.median(seconds[name])
        speed = args.rows * args.tokens / median
        row = dict(model=name, parameters=size(model), seconds=median, tokens_per_second=speed)
        rows.append(row | dict(fastest=min(seconds[name]), slowest=max(seconds[name])))
        print(f"{name:28s} {size(model) / 1e6:6.2f}M parameters  {median:7.3f} s  {speed:9,.0f} tokens/s")
    if args.out is not None:
        settings = {name: getattr(args, name) for name in sizes} | dict(threads=torch.get_num_threads())
        record = dict(machine=describe_machine(), settings=settings, rows=rows)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
