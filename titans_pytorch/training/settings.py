"""How to train: settings of the loop, the same for every model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from titans_pytorch.checks.field_checks import check_fields
from titans_pytorch.training.errors import SettingsError


def setting(default: Any, about: str) -> Any:
    """A field of a settings dataclass: its default, and what --help says about it."""
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Training:
    steps: int = setting(1000, "optimizer steps")
    batch: int = setting(4, "sequences per process and micro-batch")
    accumulate: int = setting(1, "micro-batches per step")
    sequence: int = setting(512, "tokens per sequence")
    carry: int = setting(1, "segments of a document that a state is carried over, a step each; 1: no state is carried")
    seed: int = setting(0, "decides the initial weights and all batches")

    lr: float = setting(2e-4, "learning rate at its highest")
    lr_end: float = setting(0.1, "share of it that is left at the end of the cosine")
    warmup: int = setting(100, "steps over which the learning rate rises")
    weight_decay: float = setting(0.01, "of matrices, in shares of the learning rate")
    clip: float = setting(0.5, "largest norm of a step's gradient")
    step_cost: float = setting(0.0, "of the memories' mean step size, added to the loss; rises evenly over training")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "muon: torch's Muon for matrices, AdamW for the rest")
    minutes: float | None = setting(None, "train so long instead of `steps` (such a run cannot be repeated exactly)")

    validate_every: int = setting(100, "steps between validations; 0: only at the end")
    validate_sequences: int = setting(32, "fixed sequences that are validated on")
    sample_every: int = setting(500, "steps between samples; 0: only at the end")
    sample_length: int = setting(512, "tokens of a sample")
    prime_length: int = setting(100, "tokens of validation text before it")
    temperature: float = setting(1.0, "of samples; 0: the most probable token")
    checkpoint_every: int = setting(100, "steps between checkpoints; 0: only at the end")
    keep: int = setting(2, "checkpoints kept beside the best")

    pictures: bool = setting(True, "draw the run when it ends")

    device: Literal["auto", "cpu"] = setting("auto", "cpu: leave accelerators alone")
    precision: Literal["auto", "float32", "bf16"] = setting("auto", "auto: bf16 on accelerators, float32 on CPU")
    compile: bool = setting(False, "torch.compile feed-forwards and the steps of memories; samples are drawn without")
    shard: bool = setting(False, "FSDP2: parameters, gradients and optimizer state shared out among processes")
    trackers: tuple[str, ...] = setting((), "tensorboard, wandb, trackio: where metrics go besides metrics.jsonl")

    data: str | None = setting(
        None,
        "enwik8, python (its own source text) or a file: text, or documents in the field text of a .jsonl or .parquet "
        "(.gz and .xz too); default: enwik8, or python without network",
    )
    tokenizer: str | None = setting(
        None, "tokenizer.json of the package tokenizers: train on its tokens; default: on bytes"
    )
    data_dir: str = setting("data", "where downloaded and unpacked text goes")

    def check(self) -> None:
        check_types(self)
        at_least = dict(
            steps=1, batch=1, accumulate=1, sequence=2, carry=1, warmup=0, validate_sequences=1, sample_length=1
        )
        at_least |= dict(prime_length=1, validate_every=0, sample_every=0, checkpoint_every=0, keep=1, seed=0)
        for name, smallest in at_least.items():
            if (value := getattr(self, name)) < smallest:
                raise SettingsError(f"--{dashed(name)} must be at least {smallest}, got {value}")
        if self.minutes is None and self.steps % self.carry:
            raise SettingsError(f"--steps must be a multiple of --carry {self.carry}, got {self.steps}")
        for name in ("lr", "clip", "minutes"):
            if (number := getattr(self, name)) is not None and not 0 < number < float("inf"):
                raise SettingsError(f"--{name} must be above 0, got {number}")
        for name in ("weight_decay", "temperature", "step_cost"):
            if not 0 <= (number := getattr(self, name)) < float("inf"):
                raise SettingsError(f"--{dashed(name)} must be at least 0, got {number}")
        if not 0 <= self.lr_end <= 1:
            raise SettingsError(f"--lr-end must be a share between 0 and 1, got {self.lr_end}")
        for tracker in self.trackers:
            if tracker not in (allowed := ("tensorboard", "wandb", "trackio")):
                raise SettingsError(f"--trackers must be among {', '.join(allowed)}, got {tracker!r}")


def check_types(settings: Any) -> None:
    """Saved settings come from a file that somebody may have edited."""
    try:
        check_fields(settings, lambda name: f"--{dashed(name)}")
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def dashed(name: str) -> str:
    return name.replace("_", "-")
