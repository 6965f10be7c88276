"""Learning in equal time: this library, the same without memory, and the published package, in one loop.

    python -m benchmarks.learning.side_by_side --data enwik8_prefix.gz --peer PYTHON

PYTHON is the interpreter of an environment with the package. The architecture is train_mac.py's cpu preset. Every
training runs in a process of its own, one after the other, and the loop (loop.py) is the same file for all. Results go
to results/side_by_side.json, after each training; `python -m benchmarks.learning.side_by_side_report` makes
docs/results.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import CHECKOUT, describe_machine

WORKER = Path(__file__).with_name("side_by_side_worker.py")
RESULTS = machine.RESULTS / "side_by_side.json"
MODELS = ("ours", "ours without memory", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file; .gz and .xz too")
    parser.add_argument("--peer", help="interpreter of an environment with titans-pytorch 0.5.5; without: only ours")
    parser.add_argument("--seconds", type=float, default=600.0, help="of training, for each model and seed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        settings = common(given, Path(folder))
        for seed in map(int, given.seeds.split(",")):
            for name in MODELS:
                if (given.only or name) != name or (name == "published" and not given.peer):
                    continue
                result = measured(name, settings | {"seed": seed}, given.peer, Path(folder))
                runs.append({"model": name, "seed": seed, **result})
                show(runs[-1])
                write(given, settings, runs)


def common(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is the same for all."""
    from titans_pytorch.training import data

    path = data.plain(data.existing(Path(given.data)), folder)
    size = path.stat().st_size
    return {
        **dict(text=str(path), train_bytes=int(size * data.TRAIN), valid_bytes=int(size * data.VALID)),
        **dict(budget=given.seconds, threads=given.threads, validations=10, validate_sequences=64),
        **dict(batch=8, sequence=256, lr=3e-3, warmup=20, weight_decay=0.01, clip=0.5),
    }


def architecture(name: str) -> dict[str, Any]:
    import train_mac
    from titans_pytorch.training.models import MACModel
    from titans_pytorch.training.plan import merged
    from titans_pytorch.training.text import ByteText

    settings = merged(MACModel(), train_mac.PRESETS["cpu"])
    memory = {"neural_memory_kwargs": settings.memory_arguments()["neural_memory_kwargs"]}
    around = settings.arguments(settings.memory_layers, ByteText.num_tokens)
    if name == "ours without memory":
        around = settings.arguments((), ByteText.num_tokens) | {"ff_hidden": settings.matched_ff_hidden()}
    return {
        "kwargs": around | memory,
        "memory_model": dict(dim=settings.memory_dim_head, depth=settings.memory_depth),
    }


def measured(name: str, settings: dict[str, Any], peer: str | None, folder: Path) -> dict[str, Any]:
    job, out = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(settings | architecture(name) | {"out": str(out)}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(settings["threads"])
    if name != "published":
        environment["PYTHONPATH"] = str(CHECKOUT)
    python = peer if name == "published" else sys.executable
    subprocess.run([str(python), str(WORKER), str(job)], check=True, cwd=folder, env=environment)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def show(run: dict[str, Any]) -> None:
    speed = run["steps"] / run["seconds"]
    print(
        f"{run['model']:>20}, seed {run['seed']}: {run['bits']:.3f} bits per byte, {run['steps']} steps, {speed:.2f}/s"
    )


def write(given: argparse.Namespace, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    shown = {name: value for name, value in settings.items() if name != "text"} | {"data": Path(given.data).name}
    record = {"machine": describe_machine(), "settings": shown, "architecture": architecture("ours"), "runs": runs}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
