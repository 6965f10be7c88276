"""Multi-query associative recall: pairs of key and value, then keys whose values are asked for, beyond the window.

    python -m benchmarks.learning.recall --variant mac --memory on --pairs 8 --tokens 96 --steps 400 --out FILE

The task is `titans_pytorch.tasks.mqar`, with a gap that no attention of the model reaches across; also evaluated at 4
and 16 times the trained length, with as many pairs. `--set name=value` changes a field of the config
(`--set memory_refresh=8`).
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from benchmarks.learning.loop import training
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.tasks import MQAR, Task
from titans_pytorch.titans import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_pytorch.training.answers import answers_of

MODELS = {model.variant: model for model in (TitansMAC, TitansMAG, TitansMAL, TitansLMM)}
LENGTHS = (1, 4, 16)
TARGET_ACCURACY = 0.999
BATCHES = 8  # that accuracy is taken over; fewer of long sequences


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=MODELS, default="mac")
    parser.add_argument("--memory", choices=("on", "off"), default="on")
    for name, size in dict(pairs=8, keys=64, tokens=96, dim=64, layers=2, window=8, steps=400, rows=32, seed=0).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--minutes", type=float, default=10.0, help="stop training after so long")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, help="a table, to which the run adds a line")
    return parser.parse_args()


def config_of(args: argparse.Namespace) -> TitansConfig:
    fields: dict[str, Any] = {}
    for each in args.set:
        name, _, value = each.partition("=")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    base = dict(heads=2, memory_heads=1, num_persistent=4)
    return TitansConfig(
        **base | dict(dim=args.dim, depth=args.layers, window=args.window, memory=args.memory == "on") | fields
    )


def accuracy(model: CausalLM[Any], task: Task, generator: Generator, batches: int = BATCHES, rows: int = 32) -> float:
    """Of all questions, the share answered with the right value."""
    right = asked = 0
    for _ in range(batches):
        questions = task.draw(rows, generator)
        right += task.num_right(answers_of(model, questions).guesses, questions)
        asked += int(questions.is_asked.sum())
    return right / asked


def train(model: nn.Module, task: Task, args: argparse.Namespace) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)

    def loss_of(step: int) -> Tensor:
        questions = task.draw(args.rows, generator)
        logits, _ = model(questions.ids)
        return F.cross_entropy(logits[questions.is_asked], questions.answers[questions.is_asked])

    def rate(step: int, seconds: float) -> float:
        return min((step + 1) / 20, 1.0) * min(1.0, max(0.1, 2 - 2 * step / args.steps))

    log = []
    for step in islice(training(model, optimizer, loss_of, rate, clip=1.0), args.steps):
        is_late = step.seconds > 60 * args.minutes
        if step.number % 25 == 0 or step.number == args.steps or is_late:
            right = accuracy(model, task, torch.Generator().manual_seed(10_000 + args.seed), batches=1, rows=64)
            found = dict(step=step.number, loss=step.loss, norm=step.norm, accuracy=right)
            log.append(found | dict(seconds=round(step.seconds, 1)))
            print(" ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
            if right >= TARGET_ACCURACY or is_late:
                break
    return log


def main() -> None:
    args = parsed()
    config = config_of(args)
    task = MQAR(args.pairs, args.keys, args.tokens, gap=args.layers * args.window)
    torch.manual_seed(args.seed)
    model = MODELS[args.variant](task.num_tokens, config)
    log = train(model, task, args)
    found = {}
    for factor in LENGTHS:
        longer = replace(task, tokens=task.tokens * factor)
        generator, batches = torch.Generator().manual_seed(20_000 + args.seed), max(2, BATCHES // factor)
        found[str(longer.tokens)] = accuracy(model, longer, generator, batches)
    report = dict(
        variant=args.variant,
        memory=args.memory,
        task=asdict(task),
        settings={name: value for name, value in vars(args).items() if name != "out"},
        parameters=sum(p.numel() for p in model.parameters()),
        accuracy=found,
        steps=log[-1]["step"],
        seconds=log[-1]["seconds"],
        log=log,
    )
    print({name: report[name] for name in ("variant", "memory", "accuracy", "steps", "seconds")})
    if args.out is not None:
        records.add(args.out, report)


if __name__ == "__main__":
    main()
