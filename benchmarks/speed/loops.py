"""What each way to store many blocks takes, of one commit: block by block, in loops, by a compiled step, at once.

    python -m benchmarks.speed.loops

Memories from seed 0 in float32 on normally distributed input, one thread, CPU time of the process. The ways take turns,
and the table has the least of each; it goes to docs/performance.md, with `--quick` nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.machine import DOCS, describe_machine
from benchmarks.pages import markdown, put
from benchmarks.speed.turns import least
from titans_pytorch import NeuralMemory
from titans_pytorch.memory.costs import COSTS, Costs

RENEWED = dict(default_step_transform_max_lr=0.1, batch_size=16)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "16 rows of 32 × 128, chunk 8, renewed every 16": (RENEWED | dict(dim=128, heads=4, dim_head=32, chunk_size=8), 4),
    "8 rows of 64 × 256, chunk 16, renewed every 16": (RENEWED | dict(dim=256, heads=4, dim_head=64, chunk_size=16), 2),
    "2 rows of 384 × 1536, chunk 64, never renewed": (dict(dim=384, chunk_size=64), 2),
}
TOKENS, TURNS = 1024, 8


class Way(NamedTuple):
    """How blocks are stored: by which costs, and whether a step is compiled."""

    costs: Costs
    is_compiled: bool = False


CPU = COSTS["cpu"]
WAYS = {
    "block by block": Way(CPU._replace(series_elements=0)),
    "in loops": Way(CPU),
    "in loops, by shares": Way(CPU._replace(loop_chunks=0)),
    "in loops, compiled step": Way(CPU, is_compiled=True),
    "at once": Way(CPU._replace(at_once=True, carry_cost=COSTS["cuda"].carry_cost, series_elements=2**28)),
}
HEADER = ["memory, 1,024 tokens", "way", "forward, ms", "forward + backward, ms"]


def calls(memory: NeuralMemory, seq: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            memory(seq)

    def training() -> None:
        memory.zero_grad()
        memory(seq)[0].square().mean().backward()

    return forward, training


def steps(case: str) -> dict[tuple[str, int], Callable[[], None]]:
    """Each way, forward (0) and in training (1)."""
    options, batch = CASES[case]
    found = {}
    for name, way in WAYS.items():
        torch.manual_seed(0)
        memory, seq = NeuralMemory(**options), torch.randn(batch, TOKENS, options["dim"])
        if way.is_compiled:
            memory.compile_loop()
        for mode, call in enumerate(calls(memory, seq)):
            found[name, mode] = planned(call, way.costs)
    return found


def planned(call: Callable[[], None], costs: Costs) -> Callable[[], None]:
    """A call with other costs to plan by."""

    def run() -> None:
        COSTS["cpu"] = costs
        call()
        COSTS["cpu"] = CPU

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, to see that everything works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [HEADER]
    for case in CASES:
        found = least(steps(case), 1 if arguments.quick else TURNS)
        for name in WAYS:
            rows.append([case, name, *(f"{1e3 * found[name, mode]:.0f}" for mode in (0, 1))])
            print(" | ".join(rows[-1]), flush=True)
    if not arguments.quick:
        where = describe_machine()
        about = f"{where['cpu']}, 1 thread, {where['date']}, commit {where['commit']}, least of {TURNS} turns, seed 0."
        put(DOCS / "performance.md", "loops", f"{about}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
