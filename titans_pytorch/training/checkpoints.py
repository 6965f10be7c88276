"""Checkpoints that are whole or not there, and that notice when they are damaged.

    RUN/checkpoints/step-00000100/
        config.json, model.safetensors      the model, for `from_pretrained`
        optimizer.safetensors               by name of parameter
        progress.json                       step, time, validation, lengths of the run's logs
        manifest.json                       length and sha256 of all of these

Nothing in them is ever unpickled. Learning rate, batches and random numbers are functions of the step.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import UNFINISHED, remove, sha256, writing

MANIFEST, PROGRESS, OPTIMIZER, WEIGHTS = "manifest.json", "progress.json", "optimizer.safetensors", "model.safetensors"
NAME = re.compile(r"step-(\d{8})")


class Savable(Protocol):
    def save_pretrained(self, save_directory: str | Path) -> Any: ...


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its tensors."""

    step: int = 0
    seconds: float = 0.0  # of training, validation and samples not counted
    bits: float | None = None  # validated at this very step
    best: float | None = None  # of all steps up to it
    lengths: dict[str, int] = field(default_factory=dict)  # of the run's logs, in bytes


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    progress: Progress

    def model(self) -> dict[str, Tensor]:
        with safetensors_only(self.path):
            return load_file(self.path / WEIGHTS)

    def optimizer(self) -> dict[str, Tensor]:
        with safetensors_only(self.path):
            return load_file(self.path / OPTIMIZER)


@contextmanager
def safetensors_only(path: Path) -> Iterator[None]:
    """Safetensors hold numbers only; whatever else lies in their place is refused."""
    try:
        yield
    except SafetensorError as error:
        raise SettingsError(f"{path} must hold safetensors, got other files: {error}") from None


def save(folder: Path, model: Savable, optimizer: Mapping[str, Tensor], progress: Progress, keep: int) -> Path:
    """Write a checkpoint, then remove those that are no longer needed."""
    path = folder / f"step-{progress.step:08d}"
    if path.exists():  # of an earlier attempt, past the one that was resumed
        set_aside(path)
    with writing(path) as temporary:
        temporary.mkdir()
        model.save_pretrained(temporary)
        save_file(dict(optimizer), temporary / OPTIMIZER)
        (temporary / PROGRESS).write_text(json.dumps(progress.__dict__, indent=1))
        (temporary / MANIFEST).write_text(json.dumps(described(temporary), indent=1))
    prune(folder, keep)
    return path


def described(path: Path) -> dict[str, dict[str, Any]]:
    files = (each for each in sorted(path.iterdir()) if each.name != MANIFEST)
    return {each.name: {"bytes": each.stat().st_size, "sha256": sha256(each)} for each in files}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in {PROGRESS, OPTIMIZER, WEIGHTS, "config.json", *manifest}:
            expected, file = manifest[name], path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def paths(folder: Path) -> list[Path]:
    """All checkpoints, whole or damaged, the last one first."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), reverse=True)


def last(folder: Path) -> Checkpoint | None:
    """The last whole checkpoint; None where there is none at all."""
    candidates = paths(folder)
    for path in candidates:
        if (problem := damage(path)) is None:
            return opened(path)
        warnings.warn(
            f"the checkpoint {path} is damaged ({problem}): the one before is used", UserWarning, stacklevel=2
        )
    if candidates:
        raise SettingsError(f"all checkpoints in {folder} are damaged, {len(candidates)} of them: start a new run")
    return None


def best(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the lowest validation, or the last one where none was validated."""
    whole = [opened(path) for path in paths(folder) if damage(path) is None]
    validated = [each for each in whole if each.progress.bits is not None]
    return min(validated, key=lambda each: each.progress.bits or 0.0) if validated else last(folder)


def opened(path: Path) -> Checkpoint:
    return Checkpoint(path, Progress(**json.loads((path / PROGRESS).read_text())))


def prune(folder: Path, keep: int) -> None:
    """Keep the last ones, one of which damage may befall, and the best."""
    kept = paths(folder)[: max(keep, 2)]
    scores = {path: bits for path in paths(folder) if (bits := bits_of(path)) is not None}
    if scores:
        kept.append(min(scores, key=lambda path: scores[path]))
    for path in paths(folder):
        if path not in kept:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            remove(path.rename(path.with_name(UNFINISHED + path.name)))


def bits_of(path: Path) -> float | None:
    try:
        bits = json.loads((path / PROGRESS).read_text())["bits"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return bits if isinstance(bits, float) else None


def set_aside(path: Path) -> None:
    remove(path.with_name(path.name + ".old"))
    path.rename(path.with_name(path.name + ".old"))


def sweep(folder: Path) -> None:
    """Remove what a process that was killed has left unfinished."""
    for path in folder.glob(f"{UNFINISHED}*") if folder.is_dir() else ():
        remove(path)
