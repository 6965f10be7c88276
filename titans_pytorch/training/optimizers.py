"""AdamW, or Muon for matrices, and how the learning rate goes up and down."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import Training

Named = tuple[str, nn.Parameter]


def optimizers(model: nn.Module, settings: Training) -> list[Optimizer]:
    """All parameters, each in one of them."""
    named = list(model.named_parameters())
    if settings.optimizer == "adamw":
        return [adamw(named, settings)]
    if not hasattr(torch.optim, "Muon"):
        raise SettingsError(f"--optimizer muon needs torch 2.9 or later, got {torch.__version__}: use adamw")
    inner = {id(p) for name, p in named if is_inner_matrix(name, p)}
    matrices = [p for _, p in named if id(p) in inner]
    # Steps of the size that AdamW takes, so that one learning rate serves both.
    muon = torch.optim.Muon(
        matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw([(name, p) for name, p in named if id(p) not in inner], settings)]


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """A linear map between features, not a table of tokens and not a memory's initial weights."""
    if parameter.ndim != 2 or min(parameter.shape) < 8:
        return False
    return not any(part in name for part in ("token_emb", "to_logits", "longterm_mems", "memory_model_parameters"))


def adamw(named: Iterable[Named], settings: Training) -> Optimizer:
    named = list(named)
    groups = [
        dict(params=[p for _, p in named if p.ndim >= 2], weight_decay=settings.weight_decay),
        dict(params=[p for _, p in named if p.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=(0.9, 0.95))


def rate(settings: Training, step: int, progress: float) -> float:
    """The learning rate of a step (from 0), at this share of the training: a rise, then half a cosine."""
    rise = min(1.0, (step + 1) / (settings.warmup + 1))
    fall = settings.lr_end + (1 - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * rise * fall


def set_rate(each: Iterable[Optimizer], value: float) -> None:
    for optimizer in each:
        for group in optimizer.param_groups:
            group["lr"] = value
