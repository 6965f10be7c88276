"""Accelerate, set up for what the settings ask: devices, processes, precision, trackers."""

from __future__ import annotations

import os
from typing import Any

from titans_pytorch.training.errors import SettingsError, needed
from titans_pytorch.training.settings import Training

ASKS_FOR_FSDP = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`


def wants_sharding(settings: Training) -> bool:
    return settings.shard or os.environ.get(ASKS_FOR_FSDP, "false").lower() == "true"


def accelerator(settings: Training) -> Any:
    """One process or many, as `accelerate launch` or `torchrun` has started them.

    Sharding is done by our own few lines (sharding.py), the same on CPU and accelerators, so that accelerate is not
    told of it.
    """
    accelerate = needed("accelerate", "training")
    for tracker in settings.trackers:
        needed("torch.utils.tensorboard" if tracker == "tensorboard" else tracker, f"--trackers {tracker}")
    os.environ.pop(ASKS_FOR_FSDP, None)
    is_cpu = settings.device == "cpu" or not has_accelerator()
    precision = ("float32" if is_cpu else "bf16") if settings.precision == "auto" else settings.precision
    return accelerate.Accelerator(
        cpu=is_cpu,
        mixed_precision={"float32": "no", "bf16": "bf16"}[precision],
        log_with=list(settings.trackers) or None,
    )


def broadcast(values: list[Any]) -> list[Any]:
    """What the first process has, on all of them."""
    from accelerate.utils import broadcast_object_list

    shared: list[Any] = broadcast_object_list(values)
    return shared


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def check_sharding(num_processes: int) -> None:
    if num_processes < 2:
        raise SettingsError("--shard needs at least 2 processes to share among, got 1: start it with torchrun")
