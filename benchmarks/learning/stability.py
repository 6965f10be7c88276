"""python -m benchmarks.learning.stability: which settings keep the inner loop well behaved over a long random sequence.

Writes benchmarks/results/stability.json and the table of docs/stability.md.
"""

from __future__ import annotations

import json
import statistics
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.pages import put
from titans_pytorch import NeuralMemory

DIM, CHUNK, TOKENS, PIECE, GRADIENT_TOKENS, SEEDS = 64, 16, 65_536, 4096, 4096, (0, 1, 2)
RESULTS, PAGE = machine.RESULTS / "stability.json", machine.DOCS / "stability.md"

SETTINGS: dict[str, dict[str, Any]] = {
    "default, base never renewed": {},
    "step 0.1, base never renewed": {"default_step_transform_max_lr": 0.1},
    **{
        f"batch {batch}, step {step}, growth {'unlimited' if growth is None else growth}": {
            "batch_size": batch,
            "default_step_transform_max_lr": step,
            "max_weight_growth": growth,
        }
        for batch in (64, 16)
        for step in (1.0, 0.3, 0.1, 0.03)
        for growth in (None, 10.0)
    },
    "batch 64, step 1.0, max_grad_norm 1": {"batch_size": 64, "max_grad_norm": 1.0, "max_weight_growth": None},
    "batch 64, step 1.0, max_grad_norm 0.1": {"batch_size": 64, "max_grad_norm": 0.1, "max_weight_growth": None},
    "batch 64, step 1.0, gated transition": {"batch_size": 64, "gated_transition": True, "max_weight_growth": None},
    "batch 64, step 1.0, spectral norm": {
        "batch_size": 64,
        "spectral_norm_surprises": True,
        "max_weight_growth": None,
    },
    "batch 64, step 1.0, q/k norm": {"batch_size": 64, "qk_rmsnorm": True, "max_weight_growth": None},
    "batch 64, step 1.0, decay bias 2": {"batch_size": 64, "init_decay_bias": 2.0, "max_weight_growth": None},
    "batch 64, step 1.0, decay bias -4": {"batch_size": 64, "init_decay_bias": -4.0, "max_weight_growth": None},
    "batch 64, step 0.1, decay bias -4": {
        "batch_size": 64,
        "default_step_transform_max_lr": 0.1,
        "init_decay_bias": -4.0,
        "max_weight_growth": None,
    },
}


def norm(weights: dict[str, Tensor]) -> float:
    return sum(weight.double().square().sum().item() for weight in weights.values()) ** 0.5


def measure(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """One memory over one sequence: where it stops being finite, how far it grows, whether it still learns."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        memory = NeuralMemory(DIM, CHUNK, **options)
    state, losses, growth, broken = None, [], 0.0, None
    with torch.no_grad():
        for start in range(0, TOKENS, PIECE):
            out, state, (loss, _) = memory(torch.randn(1, PIECE, DIM), state=state, return_surprises=True)
            growth = max(growth, norm(state.states[0]) / norm(memory.init_weights(1)))
            losses.append(loss.mean().item())
            if not out.isfinite().all():
                broken = start + int((~out.isfinite()).any(-1)[0].nonzero()[0])
                break
    seq = torch.randn(1, GRADIENT_TOKENS, DIM)
    memory(seq)[0].square().mean().backward()
    square = sum(p.grad.double().square().sum().item() for p in memory.parameters() if p.grad is not None)
    return {
        "broken": broken,
        "growth": growth,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "gradient": square**0.5,
    }


def middle(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def row(name: str, runs: list[dict[str, Any]]) -> str:
    broken = sorted(run["broken"] for run in runs if run["broken"] is not None)
    finite = "yes" if not broken else f"{len(broken)} of {len(runs)} break, first at token {broken[0]:,}"
    numbers = (f"{middle(runs, key):.3g}" for key in ("growth", "first_loss", "last_loss", "gradient"))
    return f"| {name} | {finite} | " + " | ".join(numbers) + " |"


def write(results: dict[str, list[dict[str, Any]]]) -> None:
    head = "| setting | finite | largest growth | loss, first tokens | loss, last tokens | gradient norm |"
    table = "\n".join([head, "|---|---|---|---|---|---|", *(row(name, runs) for name, runs in results.items())])
    put(PAGE, "table", table)


if __name__ == "__main__":
    ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    found = {}
    for name, options in SETTINGS.items():
        found[name] = [measure(options, seed) for seed in SEEDS]
        print(row(name, found[name]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "results": found}, indent=1) + "\n")
    write(found)
