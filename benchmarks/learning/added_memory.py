"""A memory added to a model that is already trained, asked for what lies beyond the model's window.

    python -m benchmarks.learning.added_memory --out benchmarks/results/added_memory.jsonl --threads 1
    python -m benchmarks.learning.added_memory report benchmarks/results/added_memory.jsonl

A small Mistral-shaped decoder, all of whose layers see a sliding window, learns to recall values from inside its window
(`titans_pytorch.tasks.MQAR`) and is frozen. Then memories beside two of its layers learn the same task across a gap
that the windows of all layers together do not reach over. The model's own weights stay what they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig

from benchmarks import records
from benchmarks.learning.loop import training
from benchmarks.machine import DOCS, describe_machine, place
from benchmarks.pages import markdown, put
from titans_pytorch import NeuralMemory, writes_off
from titans_pytorch.hf import AddedMemory
from titans_pytorch.tasks import MQAR

WINDOW, LAYERS = 8, 3
"""All windows together reach 3 x 7 tokens back"""

NEAR = MQAR(pairs=2, keys=16, tokens=WINDOW, gap=0)
FAR = MQAR(pairs=8, keys=16, tokens=64, gap=32)
FARTHER = replace(FAR, tokens=256, gap=160)

SIZES: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=128)
OPTIONS: dict[str, Any] = dict(
    chunk_size=8,
    batch_size=16,
    heads=2,
    dim_head=32,
    activation=nn.SiLU(),
    qk_l2norm=True,
    conv_size=4,
    learned_norm_gain=True,
    gated_output=True,
    default_step_transform_max_lr=0.3,
    init_decay_bias=-4.0,
)
BESIDE = (1, 2)


@dataclass(frozen=True)
class Budget:
    """Steps of the model and of its memories."""

    model: int = 400
    memory: int = 150
    rows: int = 128  # that accuracy is taken over


def base() -> Any:
    config = MistralConfig(
        vocab_size=FAR.num_tokens,
        num_key_value_heads=4,
        sliding_window=WINDOW,
        max_position_embeddings=FARTHER.tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **SIZES,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: Any, parameters: Iterable[Tensor], task: MQAR, steps: int, lr: float, rows: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        questions = task.draw(rows, generator)
        logits = model(questions.ids, use_cache=False).logits
        return F.cross_entropy(logits[questions.is_asked], questions.answers[questions.is_asked])

    def rate(step: int, seconds: float) -> float:
        return min((step + 1) / 20, 1.0) * (1 - 0.9 * step / steps)

    for step in islice(training(nn.ModuleList([model]), optimizer, loss_of, rate, clip=1.0), steps):
        if step.number % max(1, steps // 5) == 0:
            print(f"{task.tokens} tokens, step {step.number}: loss {step.loss:.4f}", flush=True)


@torch.no_grad()
def accuracy(model: Any, task: MQAR, rows: int, seed: int) -> float:
    questions = task.draw(rows, torch.Generator().manual_seed(10_000 + seed))
    guesses = model(questions.ids, use_cache=False).logits.argmax(dim=-1)
    return task.num_right(guesses, questions) / int(questions.is_asked.sum())


def accuracies(model: Any, budget: Budget, seed: int) -> dict[str, float]:
    tasks = dict(near=NEAR, far=FAR, farther=FARTHER)
    return {name: accuracy(model, task, budget.rows, seed) for name, task in tasks.items()}


def run(seed: int, budget: Budget) -> dict[str, Any]:
    """Train a model, freeze it, add memories and train those.  -> accuracies on the way"""
    torch.manual_seed(seed)
    model = base()
    train(model, model.parameters(), NEAR, budget.model, lr=3e-3, rows=64, seed=seed)
    model.eval().requires_grad_(False)
    weights: dict[str, Tensor] = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = {"alone": accuracies(model, budget, seed)}
    added = AddedMemory(SIZES["hidden_size"], BESIDE, OPTIONS)
    for memory in added.modules():
        if isinstance(memory, NeuralMemory):
            memory.init_as_association()
    added.attach_to(model)
    found["at first"] = accuracies(model, budget, seed)
    train(model, added.parameters(), FAR, budget.memory, lr=4e-3, rows=16, seed=seed)
    found["with memory"] = accuracies(model, budget, seed)
    with writes_off(added):
        found["writes off"] = accuracies(model, budget, seed)
    parameters = dict(model=sum(w.numel() for w in weights.values()), memory=sum(p.numel() for p in added.parameters()))
    is_frozen = all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    return dict(seed=seed, accuracy=found, parameters=parameters, is_frozen=is_frozen)


# ---- the table


HEADER = ["", f"inside the window ({NEAR.tokens} tokens)", f"{FAR.tokens} tokens", f"{FARTHER.tokens} tokens"]


def report(path: Path, page: Path) -> None:
    runs = records.load(path, key=lambda record: (record["seed"],))
    table = [HEADER]
    for name in runs[0]["accuracy"]:
        found = {task: [run["accuracy"][name][task] for run in runs] for task in runs[0]["accuracy"][name]}
        table.append([name, *(" / ".join(f"{value:.3f}" for value in values) for values in found.values())])
    seeds = ", ".join(str(run["seed"]) for run in runs)
    sizes = runs[0]["parameters"]
    note = (
        f"Accuracy of seeds {seeds}; chance is {FAR.chance:.3f}. The memories' {sizes['memory']:,} weights trained "
        f"for {runs[0]['budget']['memory']} steps, the model's {sizes['model']:,} stood still. {place(runs[0])}."
    )
    put(page, "added memory", f"{markdown(table)}\n\n{note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["report"]:
        parser.add_argument("report")
        parser.add_argument("results", type=Path)
        parser.add_argument("--page", type=Path, default=DOCS / "results.md")
        given = parser.parse_args()
        report(given.results, given.page)
        return
    parser.add_argument("--out", type=Path, required=True, help="results, one line a run; a later one replaces it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="of torch; default: as torch has it")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    for seed in given.seeds:
        budget = Budget()
        records.add(given.out, run(seed, budget) | dict(budget=asdict(budget), machine=describe_machine()))


if __name__ == "__main__":
    main()
