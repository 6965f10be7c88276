"""What a training step takes by each rule, beside that of Titans and attention, at one configuration.

    python -m benchmarks.speed.rules

Forward and backward of the mixer of a block `lmm` with each kind of memory (4 heads of 32, two layers, 4 times as wide
inside, if nothing else is said; the base is renewed every 16 tokens, a chunk where gates are those of chunks), and of
sliding attention over 128 tokens. Normally distributed input, 1 x 1,024 tokens of dim 128, from seed 0, float32,
one thread, CPU time of the process. All take turns; the table, which goes to docs/rules.md, has the least of each. With
`--quick` it goes nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from benchmarks.machine import DOCS
from benchmarks.pages import markdown, put
from benchmarks.speed.turns import least, told, training_step
from titans_pytorch import TitansConfig
from titans_pytorch.titans.backbone import TitansBlock

DIM, TOKENS, TURNS = 128, 1024, 3
CHUNKS = dict(heads=4, memory_chunk=16, memory_refresh=16)
TITANS, ATTENTION = "Titans", "sliding attention over 128 tokens"

RULES = {
    TITANS: TitansConfig(DIM, 1, **CHUNKS),
    "Titans, gates of every token": TitansConfig(DIM, 1, token_gates=True, **CHUNKS),
    "gated delta, one matrix, every token": TitansConfig.delta(DIM, 1),
    "layer by layer, every token": TitansConfig.delta(DIM, 1, memory_model="layerwise"),
    "towards the start": TitansConfig(DIM, 1, memory_rule="decay_to_start", **CHUNKS),
    "lengths kept": TitansConfig(DIM, 1, memory_options=dict(keep_lengths=True), **CHUNKS),
    "Omega, window of 4 tokens": TitansConfig.omeganet(DIM, 1, **CHUNKS),
    "Atlas, window of 4 chunks": TitansConfig.atlas(DIM, 1, token_gates=False, **CHUNKS),
    "Atlas, window of 4 tokens": TitansConfig.atlas(DIM, 1, **CHUNKS),
    "Yaad": TitansConfig.miras("yaad", DIM, 1, **CHUNKS),
    "Moneta": TitansConfig.miras("moneta", DIM, 1, **CHUNKS),
    "Memora": TitansConfig.miras("memora", DIM, 1, **CHUNKS),
    ATTENTION: replace(TitansConfig(DIM, 1, window=128), memory=False),
}
HEADER = ["memory", "a step, ms", "of Titans", "of attention"]


def mixer(config: TitansConfig) -> nn.Module:
    """A memory, or attention."""
    torch.manual_seed(0)
    return TitansBlock("lmm" if config.memory else "mag", config).mixer


def steps() -> dict[str, Callable[[], None]]:
    """A training step by each rule."""
    mixers, x = {name: mixer(config) for name, config in RULES.items()}, torch.randn(1, TOKENS, DIM)
    return {
        name: training_step(module, lambda x, module=module: module(x, 0, None)[0], x)
        for name, module in mixers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, to see that everything works")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found = least(steps(), 1 if quick else TURNS)
    rows = [HEADER]
    for name, seconds in found.items():
        others = (f"{float(f'{seconds / found[other]:.2g}'):g}" for other in (TITANS, ATTENTION))
        rows.append([name, f"{1e3 * seconds:.0f}", *others])
        print(" | ".join(rows[-1]), flush=True)
    if not quick:
        put(DOCS / "rules.md", "steps of rules", f"{told(TURNS)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
