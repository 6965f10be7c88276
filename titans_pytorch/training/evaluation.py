"""What a model that is being trained can do by now: bits on validation text, and how it goes on with a piece of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titans_pytorch.training import data
from titans_pytorch.training.carrying import Stretches, losses_over_segments
from titans_pytorch.training.settings import Training
from titans_pytorch.training.text import Ids, Text

BITS = 1 / math.log(2)


@torch.no_grad()
def validate(model: nn.Module, corpus: data.Corpus, settings: Training, accelerator: Any) -> tuple[float, Tensor]:
    """Bits per byte of the fixed sequences, and by position (n); every process takes its share of the batches.

    Where states are carried, a sequence is as many segments of one document, read one after the other.

    model: ids (b n) to the loss of each token but the first (b n-1), as `NextTokenLoss` with per_token=True
    """
    length = settings.carry * settings.sequence + 1
    if settings.carry == 1:
        starts = data.evenly(corpus.valid, settings.validate_sequences, length)
    else:
        stretches = Stretches.of(corpus.valid, corpus.valid_starts, length)
        starts = stretches.evenly(settings.validate_sequences)
    total = torch.zeros(length - 1, device=accelerator.device, dtype=torch.float32)
    count, world = math.ceil(len(starts) / settings.batch), accelerator.num_processes
    model.eval()
    # Sharded models are gathered by all processes together: all make the same number of calls.
    for i in range(0, count, world):
        index = min(i + accelerator.process_index, count - 1)
        ids = data.rows(corpus.valid, np.array_split(starts, count)[index], length).to(accelerator.device)
        with accelerator.autocast():
            losses = losses_over_segments(model, ids, settings.carry).sum(dim=0)
        if i + accelerator.process_index < count:
            total += losses
    model.train()
    bits = accelerator.reduce(total, "sum").cpu() / len(starts) * BITS / corpus.valid_bytes_per_token
    return float(bits.mean()), bits


def prime(ids: Ids, text: Text, length: int, seed: int, step: int) -> Ids:
    """A piece of validation text that is not mostly space, if a few draws find one."""
    length = min(length, len(ids))
    drawn = np.random.default_rng([seed, step]).integers(0, len(ids) - length + 1, size=20)
    candidates = [ids[start : start + length] for start in drawn]
    return next((each for each in candidates if len(text.readable(each).split()) > length // 12), candidates[0])
