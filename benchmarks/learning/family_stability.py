"""Does the family train stably when inner steps are four times as large as by default?  By its own script and preset.

    python -m benchmarks.learning.family_stability --data FILE                          # all, one after the other
    python -m benchmarks.learning.family_stability --data FILE --variants mac --precisions bf16
    python -m benchmarks.learning.family_stability_report

Each run is `train_titans.py --preset cpu --steps 1000 --max-step 1.2` in a process of its own; what it measured
goes to results/family_stability.jsonl, a line per run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import train_titans
from benchmarks import machine
from benchmarks.learning.scripts import train
from benchmarks.machine import describe_machine
from benchmarks.records import Record, add, load
from titans_pytorch import TitansConfig

RESULTS = machine.RESULTS / "family_stability.jsonl"
VARIANTS, PRECISIONS = ("mac", "mag", "mal", "lmm"), ("float32", "bf16")
TIMES = 4.0


def measured(variant: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    options = dict(variant=variant, precision=precision, preset=args.preset, steps=args.steps, seed=args.seed)
    options |= dict(max_step=TIMES * TitansConfig.max_step, validate_every=max(args.steps // 10, 1))
    options |= dict(sample_every=0, checkpoint_every=args.steps, data=args.data.resolve(), device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name) / "run", Path(name) / "data"
        records = train("train_titans.py", folder, "--no-pictures", may_fail=True, data_dir=data, **options)
    return dict(variant=variant, precision=precision, **summary(records, args.steps))


def runs(path: Path) -> list[Record]:
    """The recorded runs, in the order of VARIANTS and PRECISIONS."""
    return load(path, lambda r: (VARIANTS.index(r["run"]["variant"]), PRECISIONS.index(r["run"]["precision"])))


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
    parser.add_argument("--out", type=Path, default=RESULTS, help="a table, one line a run")
    args = parser.parse_args()
    settings = dict(data=args.data.name, preset=args.preset, steps=args.steps, seed=args.seed)
    settings |= dict(max_step=TIMES * TitansConfig.max_step)
    for variant in args.variants:
        for precision in args.precisions:
            run = measured(variant, precision, args)
            print({name: value for name, value in run.items() if name != "losses"}, flush=True)
            add(args.out, dict(machine=describe_machine(), settings=settings, run=run))


if __name__ == "__main__":
    main()
