"""Does memory help to classify DNA?  A small model around `TitansBackbone`, the same frozen, and a convolutional net.

    python -m benchmarks.learning.dna --out FILE --threads 1                               # synthetic sequences
    python -m benchmarks.learning.dna --data human_enhancers_cohn.csv.gz --out FILE --threads 1
    python -m benchmarks.learning.continuous_report    # the table of docs/results.md

A CSV has a sequence and a label in every row, as GenomicBenchmarks has them (seq,label). Eight tenths of the rows
train, one validates, one is tested on: a split of our own. Each run adds a line to the results; what is there already
is not done again.
"""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from benchmarks.learning.asking import generator_of
from benchmarks.learning.fitting import fitted
from benchmarks.learning.small_runs import Study
from titans_pytorch import TitansBackbone, TitansConfig, writes_off
from titans_pytorch.sampling import evaluating
from titans_pytorch.tasks.texts import OPENERS
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.models import size
from titans_pytorch.training.settings import Training

BASES = "ACGT"
UNKNOWN = len(BASES)
"""Whatever else stands in a sequence, and what follows its end"""

MODELS = ("memory", "memory, frozen", "convolutions")
SPLIT_SEED = 0
ROWS_AT_ONCE = 256


class Sequences(NamedTuple):
    """DNA with labels."""

    name: str
    bases: Tensor  # (sequences n) numbers of BASES, or UNKNOWN
    labels: Tensor  # (sequences) from 0
    parts: dict[str, Tensor]  # which rows train, validate, are tested on

    @property
    def chance(self) -> float:
        """The accuracy of who always says the label that is most frequent in the test."""
        counts = self.labels[self.parts["test"]].bincount()
        return float(counts.max() / counts.sum())


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run beside data, model and seed."""

    kmer: int = 10
    dim: int = 32
    depth: int = 1
    batch: int = 32
    steps: int = 200
    lr: float = 3e-3


class MemoryClassifier(nn.Module):
    """Pieces of a few bases, through memories, to the label's logits: the mean over all pieces."""

    def __init__(self, settings: Settings, num_labels: int) -> None:
        super().__init__()
        self.kmer = settings.kmer
        config = TitansConfig(dim=settings.dim, depth=settings.depth, heads=2, memory_chunk=4, memory_refresh=16)
        self.to_features = nn.Linear(settings.kmer * (UNKNOWN + 1), settings.dim)
        self.backbone = TitansBackbone("lmm", config)
        self.to_logits = nn.Linear(settings.dim, num_labels)

    def forward(self, bases: Tensor) -> Tensor:
        """(b n) -> (b labels)"""
        padded = F.pad(bases, (0, -bases.shape[1] % self.kmer), value=UNKNOWN)
        pieces = F.one_hot(padded, UNKNOWN + 1).float().unflatten(1, (-1, self.kmer)).flatten(2)
        read, _ = self.backbone(self.to_features(pieces))
        logits: Tensor = self.to_logits(read.mean(dim=1))
        return logits


class ConvolutionalNet(nn.Module):
    """Motifs, motifs of motifs, and the strongest of each."""

    def __init__(self, num_labels: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv1d(UNKNOWN + 1, width, 11, padding=5), nn.GELU(), nn.MaxPool1d(4)),
            *(nn.Conv1d(width, width, 7, padding=3), nn.GELU(), nn.MaxPool1d(4)),
            *(nn.Conv1d(width, 2 * width, 5, padding=2), nn.GELU(), nn.AdaptiveMaxPool1d(1), nn.Flatten()),
            nn.Linear(2 * width, num_labels),
        )

    def forward(self, bases: Tensor) -> Tensor:
        """(b n) -> (b labels)"""
        logits: Tensor = self.layers(F.one_hot(bases, UNKNOWN + 1).float().transpose(1, 2))
        return logits


def build(name: str, settings: Settings, num_labels: int) -> nn.Module:
    return ConvolutionalNet(num_labels) if name == "convolutions" else MemoryClassifier(settings, num_labels)


# ---- data


def sequences_of(data: str | None) -> Sequences:
    """What --data names, or synthetic ones."""
    if data is None:
        return split("synthetic", *synthetic())
    path = Path(data)
    if not path.is_file():
        raise SettingsError(f"--data must be a CSV file, got nothing at {path}")
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="ascii", errors="replace") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"seq", "label"} <= set(rows[0]):
        raise SettingsError(f"--data must have columns seq and label, got {', '.join(rows[0]) if rows else 'no rows'}")
    names = sorted({row["label"] for row in rows})
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    return split(path.name.split(".")[0], encoded([row["seq"] for row in rows]), labels)


def encoded(texts: list[str]) -> Tensor:
    """(sequences n), as long as the longest"""
    numbers = np.full(256, UNKNOWN, dtype=np.int64)
    for number, base in enumerate(BASES):
        numbers[[ord(base), ord(base.lower())]] = number
    found = np.full((len(texts), max(map(len, texts))), UNKNOWN, dtype=np.int64)
    for row, text in enumerate(texts):
        found[row, : len(text)] = numbers[np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)]
    return torch.from_numpy(found)


def split(name: str, bases: Tensor, labels: Tensor) -> Sequences:
    """The same for every seed of a training."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    first, second = int(0.8 * len(order)), int(0.9 * len(order))
    parts = dict(train=order[:first], valid=order[first:second], test=order[second:])
    return Sequences(name, bases, labels, parts)


def synthetic(rows: int = 2000, length: int = 200, motif: int = 10) -> tuple[Tensor, Tensor]:
    """Random bases; a sequence of label 1 has a piece of its first half once more in its second."""
    drawn = torch.Generator().manual_seed(SPLIT_SEED)
    bases = torch.randint(UNKNOWN, (rows, length), generator=drawn)
    labels = torch.randint(2, (rows,), generator=drawn)
    starts = torch.randint(length // 2 - motif, (2, rows), generator=drawn)
    steps, each = torch.arange(motif), torch.arange(rows)[:, None]
    copied = bases[each, starts[0][:, None] + steps]
    places = length // 2 + starts[1][:, None] + steps
    bases[each, places] = torch.where(labels[:, None] == 1, copied, bases[each, places])
    return bases, labels


# ---- runs


@torch.no_grad()
def evaluated(model: nn.Module, data: Sequences, part: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a part."""
    total, right, which = 0.0, 0, data.parts[part]
    with evaluating(model):
        for some in which.split(ROWS_AT_ONCE):
            logits, labels = model(data.bases[some]), data.labels[some]
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
    return total / len(which), right / len(which)


def run(name: str, data: Sequences, seed: int, settings: Settings) -> records.Record:
    """Train one model on one data set, and say everything that its numbers depend on."""
    torch.manual_seed(seed)
    model = build(name, settings, int(data.labels.max()) + 1)
    every = max(settings.steps // 5, 1)
    how = Training(steps=settings.steps, lr=settings.lr, lr_end=0.05, warmup=10, clip=1.0, validate_every=every)
    train = data.parts["train"]

    def loss_of(step: int) -> Tensor:
        some = train[torch.randint(len(train), (settings.batch,), generator=generator_of(seed, step))]
        return F.cross_entropy(model(data.bases[some]), data.labels[some])

    with writes_off(model) if name == "memory, frozen" else nullcontext():
        found = fitted(model, loss_of, lambda: evaluated(model, data, "valid")[0], how)
        loss, accuracy = evaluated(model, data, "test")
    results, rows = dict(accuracy=accuracy, loss=loss, chance=data.chance), {p: len(r) for p, r in data.parts.items()}
    return dict(parameters=size(model), steps=settings.steps, results=results, rows=rows, **found._asdict())


def told(record: records.Record) -> str:
    return f"accuracy {record['results']['accuracy']:.3f}"


STUDY = Study(__doc__, MODELS, Settings, sequences_of, run, told)

if __name__ == "__main__":
    raise SystemExit(STUDY.main())
