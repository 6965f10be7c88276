"""Does the family train stably when inner steps are four times as large as by default?  By its own script and preset.

    python -m benchmarks.family_stability --data FILE                          # all, one after the other
    python -m benchmarks.family_stability --data FILE --variants mac --precisions bf16
    python -m benchmarks.family_report

Each run is `train_titans.py --preset cpu --steps 1000 --memory-max-lr 1.2` in a process of its own; what it measured
goes to results/family_stability/, a file per run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import train_titans
from benchmarks.machine import CHECKOUT, describe_machine
from titans_pytorch import TitansConfig

RESULTS = Path(__file__).with_name("results") / "family_stability"
VARIANTS, PRECISIONS = ("mac", "mag", "mal", "lmm"), ("float32", "bf16")
TIMES = 4.0


def train(variant: str, precision: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What the run logged, step by step and validation by validation."""
    options = dict(variant=variant, precision=precision, preset=args.preset, steps=args.steps, seed=args.seed)
    options |= dict(memory_max_lr=TIMES * TitansConfig.max_step, validate_every=max(args.steps // 10, 1))
    options |= dict(data=args.data.resolve(), data_dir=folder / "data", folder=folder / "run", device="cpu")
    options |= dict(sample_every=0, checkpoint_every=args.steps)
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(CHECKOUT / "train_titans.py"), *arguments, "--no-pictures"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}).returncode
    if ended:
        print(f"{variant} {precision} ended with {ended}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def summary(records: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    training = [record for record in records if "loss" in record]
    losses = [record["bits_per_byte"] for record in training]
    norms = [record["grad_norm"] for record in training]
    is_finite = len(losses) == steps and all(map(math.isfinite, losses + norms))
    valid = {record["step"]: record["valid_bits_per_byte"] for record in records if "valid_bits_per_byte" in record}
    found = dict(steps=len(losses), is_finite=is_finite, valid_bits=valid, largest_norm=max(norms))
    return found | dict(setback=setback(losses), seconds=training[-1]["seconds"], losses=losses)


def setback(losses: list[float], over: int = 50) -> float:
    """How far a mean over some steps lies above the best one before it, at most."""
    means = [sum(losses[i : i + over]) / over for i in range(0, len(losses) - over + 1, over)]
    rises = [later - min(means[:i]) for i, later in enumerate(means) if i]
    return max([0.0, *rises])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file; .gz and .xz too")
    parser.add_argument("--preset", choices=train_titans.PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    args = parser.parse_args()
    settings = dict(data=args.data.name, preset=args.preset, steps=args.steps, seed=args.seed)
    settings |= dict(max_step=TIMES * TitansConfig.max_step)
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        for precision in args.precisions:
            with tempfile.TemporaryDirectory() as folder:
                found = summary(train(variant, precision, args, Path(folder)), args.steps)
            run = dict(variant=variant, precision=precision, **found)
            print({name: value for name, value in run.items() if name != "losses"}, flush=True)
            record = dict(machine=describe_machine(), settings=settings, run=run)
            (args.out / f"{variant}_{precision}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
