"""A linear memory that is surprised at every token: renewals solved for, in a loop, and beside attention.

    python -m benchmarks.speed.linear

One training step, forward and backward, of a block of a Titans model without and with its feed-forward network: `lmm`
with a linear memory, or with two layers that are taught one by one (momentum, forgetting, chunks of one token, renewed
at every token), and sliding attention over 128 tokens with as many heads. Normally distributed input from seed 0, in
float32, one thread, CPU time of the process. All take turns, and the table, which goes to docs/benchmarks.md, has the
least of each (what has no loop has one turn); with `--quick` it goes nowhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.machine import DOCS
from benchmarks.pages import markdown, put
from benchmarks.speed.turns import told
from titans_pytorch import TitansConfig
from titans_pytorch.memory.costs import COSTS, Costs
from titans_pytorch.titans.backbone import TitansBlock

SIZES = {"dim 256, 4 heads, 2 × 4,096 tokens": (256, 2), "dim 64, 4 heads, 1 × 4,096 tokens": (64, 1)}
TOKENS, TURNS = 4096, 4
CPU = COSTS["cpu"]
ONE_BY_ONE = CPU._replace(solved_writes=(0, 0))
ATTENTION = "sliding attention over 128 tokens"


class Way(NamedTuple):
    """A kind of memory, None: attention, and the costs by which its calls are planned."""

    model: str | None
    costs: Costs = CPU
    turns: int = TURNS


WAYS = {
    "linear memory, renewals solved for": Way("linear"),
    "linear memory, renewals in a loop": Way("linear", ONE_BY_ONE),
    "layerwise memory, renewals solved for": Way("layerwise"),
    "layerwise memory, renewals one by one": Way("layerwise", ONE_BY_ONE, turns=1),
    ATTENTION: Way(None),
}
HEADER = ["", "", "mixer, s", "of attention", "block, s", "of attention"]


def block(dim: int, model: str | None) -> TitansBlock:
    """A block with such a memory, or with attention."""
    torch.manual_seed(0)
    config = TitansConfig(dim=dim, depth=1, heads=4, window=128, memory_chunk=1, memory_refresh=1)
    if model is None:
        return TitansBlock("mag", replace(config, memory=False))
    return TitansBlock("lmm", replace(config, memory_model=model))


def step(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """CPU seconds of forward and backward."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    start = time.process_time()
    run(x).square().mean().backward()
    return time.process_time() - start


def least(dim: int, rows: int, turns: int) -> dict[str, list[float]]:
    """Seconds of each way: of the mixer, and of the whole block."""
    found = {name: [float("inf")] * 2 for name in WAYS}
    of_ways, x = {name: block(dim, way.model) for name, way in WAYS.items()}, torch.randn(rows, TOKENS, dim)
    for turn in range(1 + turns):  # the first warms up
        for name, each in of_ways.items():
            COSTS["cpu"] = WAYS[name].costs
            for part, module in enumerate((each.mixer, each) if turn <= WAYS[name].turns else ()):
                seconds = step(module, lambda x, module=module: module(x, 0, None)[0], x)
                if turn:
                    found[name][part] = min(found[name][part], seconds)
    COSTS["cpu"] = CPU
    return found


def table(turns: int) -> list[list[str]]:
    rows = [HEADER]
    for size, (dim, batch) in SIZES.items():
        found = least(dim, batch, turns)
        of_attention = found[ATTENTION]
        for name, seconds in found.items():
            cells = [f"{x:.3g}" for pair in zip(seconds, relative(seconds, of_attention), strict=True) for x in pair]
            rows.append([size, name, *cells])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def relative(seconds: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, others, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, to see that everything works")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = table(1 if quick else TURNS)
    if not quick:
        put(DOCS / "benchmarks.md", "linear", f"{told(TURNS)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
