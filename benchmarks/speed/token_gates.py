"""What momentum and forgetting of every token cost, beside those of chunks: the base is renewed equally often.

    python -m benchmarks.speed.token_gates

A training step, forward and backward, of a memory of dim 256, 4 heads of 64 x 256, default rule, learned norm gain,
on 2 x 1,024 normally distributed tokens, from seed 0, float32, one thread, CPU time of the process. All take turns; the
table, which goes to docs/rules.md, has the least of each. With `--quick` it goes nowhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.machine import DOCS
from benchmarks.pages import markdown, put
from benchmarks.speed.turns import least, told, training_step
from titans_pytorch import NeuralMemory

DIM, HEADS, ROWS, TOKENS, TURNS = 256, 4, 2, 1024, 6
REFRESH = (16, 32, 64)
HEADER = ["renewed every", "gates of chunks, ms", "gates of tokens, ms", "ratio"]


def memory(chunk: int, refresh: int) -> NeuralMemory:
    torch.manual_seed(0)
    width = dict(heads=HEADS, dim_head=DIM // HEADS)
    return NeuralMemory(
        DIM, chunk, refresh, **width, default_step_transform_max_lr=0.1, qk_l2norm=True, learned_norm_gain=True
    )


def steps() -> dict[tuple[int, int], Callable[[], None]]:
    """A training step by (chunk, refresh)."""
    memories = {(chunk, refresh): memory(chunk, refresh) for refresh in REFRESH for chunk in (refresh, 1)}
    seq = torch.randn(ROWS, TOKENS, DIM)
    return {key: training_step(each, lambda x, each=each: each(x)[0], seq) for key, each in memories.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, to see that everything works")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found = least(steps(), 1 if quick else TURNS)
    rows = [HEADER]
    for refresh in REFRESH:
        chunks, tokens = found[refresh, refresh], found[1, refresh]
        rows.append([f"{refresh} tokens", f"{1e3 * chunks:.0f}", f"{1e3 * tokens:.0f}", f"{tokens / chunks:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    if not quick:
        put(DOCS / "rules.md", "token gates", f"{told(TURNS)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
