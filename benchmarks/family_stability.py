"""Does the family train stably when inner steps are four times as large as by default?  On the bytes of a file.

    python -m benchmarks.family_stability --data FILE --out benchmarks/results/family_stability.json
    python -m benchmarks.family_report

Trains each variant for 1,000 steps in float32 and in bfloat16 (autocast), and says whether every loss and gradient was
finite and how the loss fell.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from titans_pytorch import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL

MODELS = {model.variant: model for model in (TitansMAC, TitansMAG, TitansMAL, TitansLMM)}
TIMES = 4.0


def text(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def train(variant: str, dtype: torch.dtype, data: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    config = TitansConfig(dim=128, depth=4, heads=4, window=32, memory_chunk=16, memory_refresh=32)
    config = config.with_options(max_step=TIMES * config.max_step)
    model = MODELS[variant](256, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    generator, losses, norms = torch.Generator().manual_seed(args.seed), [], []
    began = time.perf_counter()
    for number in range(1, args.steps + 1):
        starts = torch.randint(0, len(data) - args.tokens - 1, (args.rows,), generator=generator)
        ids = torch.stack([data[start : start + args.tokens + 1] for start in starts.tolist()]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, number / 40)
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            break
        optimizer.step()
        if number % 50 == 0:
            print(f"{variant} {dtype} step {number} loss {losses[-1]:.3f} norm {norms[-1]:.2f}", flush=True)
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    is_finite = len(losses) == args.steps and math.isfinite(losses[-1]) and math.isfinite(norms[-1])
    report = dict(variant=variant, dtype=str(dtype), steps=len(losses), is_finite=is_finite)
    report |= dict(first_tenth=first, last_tenth=last, is_falling=last < first, largest_norm=max(norms))
    return report | dict(seconds=round(time.perf_counter() - began, 1), losses=losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    for name, value in dict(steps=1000, rows=8, tokens=256, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--variants", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data, reports = text(args.data), []
    for variant in args.variants:
        for name in args.dtypes:
            reports.append(train(variant, getattr(torch, name), data, args))
            print({key: value for key, value in reports[-1].items() if key != "losses"}, flush=True)
            if args.out is not None:
                settings = dict(steps=args.steps, rows=args.rows, tokens=args.tokens, data=args.data.name)
                settings |= dict(seed=args.seed, lr=args.lr, max_step=TIMES * TitansConfig.max_step)
                record = dict(machine=describe_machine(), settings=settings, runs=reports)
                args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
