"""What restarting with every shard saves: a model of TNT beside one with the Titans rule and as short chunks.

    python -m benchmarks.speed.tnt

One training step of an `lmm` of dim 256, 4 blocks and 4 heads on 2 x 4,096 bytes: with a memory that stores chunks of 8
tokens and is renewed after each, and with a global memory of chunks of 512 beside a local one of chunks of 8 that
restarts every 512. From seed 0, float32, one thread; both take turns, least CPU time of the process. Operations are
counted by the plan of this machine and by that of an accelerator, which waits for each of them; views do not count.
Numbers go to benchmarks/results/tnt.json, and a table of all that is there to docs/rules.md; with `--count` only
operations are counted, with `--quick` one turn of a small model is taken, which goes nowhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.machine import DOCS, RESULTS, describe_machine
from benchmarks.operations import Counting
from benchmarks.pages import markdown, put
from benchmarks.speed.turns import least, told
from titans_pytorch import TitansConfig, TitansLMM
from titans_pytorch.memory.costs import COSTS

DEPTH, DIM, ROWS, TOKENS, TURNS, SHARD, CHUNK = 4, 256, 2, 4096, 2, 512, 8
HEADER = ["", "Titans", "TNT", "ratio"]
MEASURED = {
    "operations, cpu": ("operations, planned for a CPU", ",.0f"),
    "operations, cuda": ("operations, planned for an accelerator", ",.0f"),
    "seconds": ("seconds of a CPU, one thread", ".2f"),
}


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Calls are planned as on another kind of device."""
    own = COSTS["cpu"]
    COSTS["cpu"] = COSTS[device]
    try:
        yield
    finally:
        COSTS["cpu"] = own


def models(dim: int, depth: int, shard: int) -> dict[str, TitansLMM]:
    """Both, without persistent tokens."""
    found = {}
    tnt = TitansConfig.tnt(dim, depth, global_chunk=shard, local_chunks=(CHUNK,), shard=shard)
    titans = replace(tnt, memory_local_chunks=(), memory_chunk=CHUNK, memory_refresh=CHUNK)
    for name, config in (("Titans", titans), ("TNT", tnt)):
        torch.manual_seed(0)
        found[name] = TitansLMM(256, config)
    return found


def step_of(model: TitansLMM, ids: Tensor) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(ids).backward()

    return step


def counted(step: Callable[[], None], device: str) -> int:
    """Operations of a step, as planned for a kind of device."""
    with planned_for(device), Counting() as counting:
        step()
    return counting.count


def row(name: str, of_each: list[float]) -> list[str]:
    what, form = MEASURED[name]
    return [what, *(format(x, form) for x in of_each), f"{of_each[0] / of_each[1]:.2f}"]


def keep(found: dict[str, list[float]]) -> None:
    """Write what was measured, beside what had been before, and the table of all."""
    where, path = describe_machine(), RESULTS / "tnt.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    records = known | {name: {"of each": numbers, "machine": where} for name, numbers in found.items()}
    path.write_text(json.dumps(records, indent=2) + "\n")
    rows = [HEADER] + [row(name, records[name]["of each"]) for name in MEASURED if name in records]
    put(DOCS / "rules.md", "tnt", f"{told(TURNS)}\n\n{markdown(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="only count operations")
    parser.add_argument("--quick", action="store_true", help="one turn of a small model, to see that everything works")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dim, depth, tokens, shard = (32, 1, 128, 32) if given.quick else (DIM, DEPTH, TOKENS, SHARD)
    ids = torch.randint(0, 256, (ROWS, tokens + 1), generator=torch.Generator().manual_seed(0))
    steps = [step_of(model, ids) for model in models(dim, depth, shard).values()]
    found: dict[str, list[float]] = {}

    def say(name: str, of_each: list[float]) -> None:
        found[name] = of_each
        print(" | ".join(row(name, of_each)), flush=True)

    for device in ("cpu", "cuda"):
        say(f"operations, {device}", [float(counted(step, device)) for step in steps])
    if not given.count:
        say("seconds", [*least(dict(enumerate(steps)), 1 if given.quick else TURNS).values()])
    if not given.quick:
        keep(found)


if __name__ == "__main__":
    main()
