"""Series of numbers to forecast: from a CSV or synthetic, split and scaled as is usual, and windows of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titans_pytorch.tasks.texts import OPENERS
from titans_pytorch.training.errors import SettingsError

MONTH_HOURS = 30 * 24
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Series:
    """Several series of equal length, each with mean 0 and deviation 1 over what is trained on.

    values: (time series); borders: where validation begins, where the test does, and where it ends
    """

    name: str
    values: Tensor
    borders: tuple[int, int, int]

    def windows(self, part: str, lookback: int, horizon: int, most: int | None = None) -> Tensor:
        """First steps of all windows whose future lies in a part; with `most` at most so many, spread evenly.

        What is looked back at may lie in the part before.
        """
        number = PARTS.index(part)
        begin = lookback if number == 0 else self.borders[number - 1]
        count = self.borders[number] - horizon + 1 - begin
        if count < 1:
            needed, got = (horizon + begin if number == 0 else horizon), count - 1 + horizon + (number == 0) * begin
            raise SettingsError(f"--data must have at least {needed} steps of {part}, got {got} in {self.name}")
        numbers = torch.arange(count) if most is None or count <= most else torch.linspace(0, count - 1, most).long()
        return numbers + begin - lookback

    def cut(self, firsts: Tensor, which: Tensor, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
        """The past and the future of one series each.  firsts, which: (b) -> (b lookback), (b horizon)"""
        whole = self.values[firsts[:, None] + torch.arange(lookback + horizon), which[:, None]]
        return whole[:, :lookback], whole[:, lookback:]


def series_of(data: str | None, seed: int = 0) -> Series:
    """What --data names, or a synthetic one."""
    if data is None:
        return scaled("synthetic", synthetic(seed), (6000, 8000, 10000))
    values = read(Path(data))
    name = Path(data).name.split(".")[0]
    return scaled(name, values, borders_of(name, len(values)))


def borders_of(name: str, length: int) -> tuple[int, int, int]:
    """ETT: 12, 4 and 4 months of 30 days; all others 70, 10 and 20 percent."""
    if name.startswith("ETT"):
        month = MONTH_HOURS * (4 if name.startswith("ETTm") else 1)
        if length < 20 * month:
            raise SettingsError(f"--data must have the {20 * month} steps of {name}, got {length}")
        return 12 * month, 16 * month, 20 * month
    train, test = int(length * 0.7), int(length * 0.2)
    return train, length - test, length


def scaled(name: str, values: np.ndarray, borders: tuple[int, int, int]) -> Series:
    seen = values[: borders[0]]
    spread = seen.std(axis=0)
    even = (values - seen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return Series(name, torch.from_numpy(even.astype(np.float32)), borders)


def read(path: Path) -> np.ndarray:
    """All columns but the first, which holds dates.  -> (time series)"""
    if not path.is_file():
        raise SettingsError(f"--data must be a CSV file, got nothing at {path}")
    opener = OPENERS.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        _, *rows = csv.reader(file)
    try:
        return np.array([[float(cell) for cell in row[1:]] for row in rows if row])
    except ValueError as error:
        raise SettingsError(f"--data must have dates and then numbers in every row, got {path}: {error}") from None


def synthetic(seed: int, steps: int = 10_000, count: int = 4) -> np.ndarray:
    """Days and weeks of different shape, a level that wanders, noise with a short memory.  -> (time series)"""
    drawn = np.random.default_rng(seed)
    time = np.arange(steps)[:, None]
    day = sum(
        drawn.normal(size=count) / k * np.sin(2 * np.pi * (k * time / 24 + drawn.random(count))) for k in (1, 2, 3)
    )
    week = drawn.normal(size=count) * np.sin(2 * np.pi * (time / 168 + drawn.random(count)))
    level = np.cumsum(drawn.normal(size=(steps, count)), axis=0) * 0.02
    noise = drawn.normal(size=(steps, count)) * 0.3
    for step in range(1, steps):
        noise[step] += 0.7 * noise[step - 1]
    return day + week + level + noise
