"""What restarting with every shard saves: a model of TNT beside one with the Titans rule and as short chunks.

    python -m benchmarks.speed.tnt

One training step of an `lmm` of dim 256, 4 blocks and 4 heads on 2 x 4,096 bytes: with a memory that stores chunks of 8
tokens and is renewed after each, and with a global memory of chunks of 512 beside a local one of chunks of 8 that
restarts every 512. From seed 0, float32, one thread; both take turns, least CPU time of the process. Operations are
counted by the plan of this machine and by that of an accelerator, which waits for each of them; views do not count.
The table goes to docs/rules.md and its numbers to benchmarks/results/tnt.json; with `--count` only operations are
counted, with `--quick` one turn of a small model is taken, and both go nowhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.machine import DOCS, RESULTS, describe_machine
from benchmarks.operations import Counting
from benchmarks.pages import markdown, put
from titans_pytorch import TitansConfig, TitansLMM
from titans_pytorch.memory.costs import COSTS

DEPTH, DIM, ROWS, TOKENS, TURNS, SHARD, CHUNK = 4, 256, 2, 4096, 2, 512, 8
HEADER = ["", "Titans", "TNT", "ratio"]


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


def step_of(model: TitansLMM, ids: Tensor) -> Callable[[], float]:
    """A training step; it says how many seconds of the CPU it took."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        model.loss(ids).backward()
        return time.process_time() - start

    return step


def counted(step: Callable[[], float], device: str) -> int:
    """Operations of a step, as planned for a kind of device."""
    with planned_for(device), Counting() as counting:
        step()
    return counting.count


def row(what: str, of_each: list[float], form: str) -> list[str]:
    return [what, *(format(x, form) for x in of_each), f"{of_each[0] / of_each[1]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="only count operations")
    parser.add_argument("--quick", action="store_true", help="one turn of a small model, to see that everything works")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dim, depth, tokens, shard = (32, 1, 128, 32) if given.quick else (DIM, DEPTH, TOKENS, SHARD)
    ids = torch.randint(0, 256, (ROWS, tokens + 1), generator=torch.Generator().manual_seed(0))
    steps = [step_of(model, ids) for model in models(dim, depth, shard).values()]
    rows, record = [HEADER], {}
    for device, what in (("cpu", "operations, planned for a CPU"), ("cuda", "operations, planned for an accelerator")):
        record[f"operations {device}"] = [float(counted(step, device)) for step in steps]
        rows.append(row(what, record[f"operations {device}"], ",.0f"))
        print(" | ".join(rows[-1]), flush=True)
    if given.count:
        return
    turns = [[step() for step in steps] for _ in range(1 if given.quick else TURNS)]
    record["seconds"] = [min(each) for each in zip(*turns, strict=True)]
    rows.append(row("seconds of a CPU, one thread", record["seconds"], ".2f"))
    print(" | ".join(rows[-1]), flush=True)
    if given.quick:
        return
    where = describe_machine()
    (RESULTS / "tnt.json").write_text(json.dumps({"machine": where} | record, indent=2) + "\n")
    about = f"{where['cpu']}, 1 thread of a machine that others used too, {where['date']}, commit {where['commit']}"
    put(DOCS / "rules.md", "tnt", f"{about}, least of {TURNS} turns, seed 0.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
