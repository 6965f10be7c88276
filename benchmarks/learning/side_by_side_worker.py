"""Trains one model for one job, in the environment of the library that it measures; of ours it uses loop.py alone.

python side_by_side_worker.py JOB.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import training  # beside this file, which runs as a script
from torch import Tensor
from torch.nn import functional as F

from titans_pytorch import MemoryAsContextTransformer, MemoryMLP

BITS = 1 / math.log(2)
NUM_BINS = 16


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    kwargs: dict[str, Any] = dict(job["kwargs"])
    kwargs["neural_memory_layers"] = tuple(kwargs["neural_memory_layers"])
    model = MemoryAsContextTransformer(**kwargs, neural_memory_model=MemoryMLP(**job["memory_model"]))
    for parameter in model.parameters():  # the published heads share one storage, which optimizers refuse to write to
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    text = np.memmap(job["text"], dtype=np.uint8, mode="r")
    result = train(model, text[: job["train_bytes"]], text[job["train_bytes"] :][: job["valid_bytes"]], job)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["with_gradient"] = sum(p.numel() for p in model.parameters() if p.grad is not None)
    Path(job["out"]).write_text(json.dumps(result))


def train(model: torch.nn.Module, train_text: Any, valid_text: Any, job: dict[str, Any]) -> dict[str, Any]:
    """AdamW with a cosine over the time; validation does not count."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=job["weight_decay"]),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=(0.9, 0.95))
    points = [job["budget"] * i / job["validations"] for i in range(1, job["validations"] + 1)]
    steps, curve = [], []
    for step in training(
        model,
        optimizer,
        lambda step: model(batch(train_text, job, step), return_loss=True),
        lambda step, seconds: rate(job, step, seconds / job["budget"]),
        job["clip"],
    ):
        steps.append(step)
        if points and step.seconds >= points[0]:
            points = [point for point in points if point > step.seconds]
            by_position = validate(model, valid_text, job)
            curve.append([round(step.seconds, 2), step.number, float(by_position.mean())])
        if step.seconds >= job["budget"]:
            break
    stretches = [float(each.mean()) for each in by_position.tensor_split(NUM_BINS)]
    return dict(
        **dict(steps=step.number, seconds=step.seconds, skipped=sum(not each.is_taken for each in steps)),
        **dict(bits=curve[-1][2], curve=curve, by_position=stretches),
        **dict(losses=[round(each.loss * BITS, 4) for each in steps], torch=torch.__version__),
    )


def rate(job: dict[str, Any], step: int, share: float) -> float:
    """A warmup over steps, and a cosine over the time."""
    rise, fall = min(1.0, (step + 1) / (job["warmup"] + 1)), 0.5 * (1 + math.cos(math.pi * min(share, 1)))
    return rise * (0.1 + 0.9 * fall)


def batch(text: Any, job: dict[str, Any], step: int) -> Tensor:
    """The same text for every model at the same step of the same seed."""
    length = job["sequence"] + 1
    starts = np.random.default_rng([job["seed"], step]).integers(0, len(text) - length + 1, size=job["batch"])
    return rows(text, starts, length)


def rows(text: Any, starts: Any, length: int) -> Tensor:
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))


@torch.no_grad()
def validate(model: torch.nn.Module, text: Any, job: dict[str, Any]) -> Tensor:
    """Bits per byte by position, over fixed sequences.  -> (n)"""
    length = job["sequence"] + 1
    starts = np.linspace(0, len(text) - length, job["validate_sequences"]).astype(np.int64)
    total = torch.zeros(job["sequence"])
    model.eval()
    for part in np.array_split(starts, max(len(starts) // job["batch"], 1)):
        ids = rows(text, part, length)
        logits = model(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += losses.view(len(part), -1).sum(dim=0)
    model.train()
    return total / len(starts) * BITS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
