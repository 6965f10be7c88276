"""Does memory help to forecast?  A small model around `TitansBackbone`, the same frozen, and DLinear, on one CSV.

    python -m benchmarks.learning.forecasting --out FILE --threads 1                       # a synthetic series
    python -m benchmarks.learning.forecasting --data ETTh1.csv ETTm1.csv.gz --out FILE --threads 1
    python -m benchmarks.learning.continuous_report    # the table of docs/results.md

One model forecasts 720 steps, and is held to the first 96, 192, 336 and 720 of them alike. Splits are the usual ones
(ETT 12, 4 and 4 months; others 70, 10 and 20 %), series have mean 0 and deviation 1 over what is trained on. Each run
adds a line to the results; what is there already is not done again, so the same command completes the file.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from benchmarks.learning.asking import generator_of
from benchmarks.learning.fitting import fitted
from benchmarks.learning.series import Series, series_of
from benchmarks.learning.small_runs import Study
from titans_pytorch import TitansBackbone, TitansConfig, writes_off
from titans_pytorch.sampling import evaluating
from titans_pytorch.training.models import size
from titans_pytorch.training.settings import Training

HORIZONS = (96, 192, 336, 720)
MODELS = ("memory", "memory, frozen", "DLinear")
EPSILON = 1e-5
MOST_ROWS = dict(valid=1000, test=10_000)
"""Series of windows that are forecast, at most: windows are spread evenly over their part"""

ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run beside data, model and seed.

    lookback: steps that are seen, in patches; batch: series of windows; linear_steps: of DLinear, whose steps
    cost little
    """

    lookback: int = 336
    patch: int = 16
    dim: int = 32
    depth: int = 1
    batch: int = 128
    steps: int = 100
    linear_steps: int = 1000
    lr: float = 2e-3

    def __post_init__(self) -> None:
        if self.lookback % self.patch:
            raise ValueError(f"lookback must be a multiple of patch {self.patch}, got {self.lookback}")


class MemoryForecaster(nn.Module):
    """Patches of one series, through memories, to its next steps; levels and scales of windows are taken out."""

    def __init__(self, settings: Settings, horizon: int) -> None:
        super().__init__()
        self.patch = settings.patch
        config = TitansConfig(
            dim=settings.dim, depth=settings.depth, heads=2, memory_chunk=1, memory_refresh=7, max_step=0.1
        )
        self.to_features = nn.Linear(settings.patch, settings.dim)
        self.backbone = TitansBackbone("lmm", config)
        self.to_future = nn.Linear(settings.lookback // settings.patch * settings.dim, horizon)

    def forward(self, past: Tensor) -> Tensor:
        """(b lookback) -> (b horizon)"""
        level, spread = past.mean(dim=1, keepdim=True), past.std(dim=1, keepdim=True) + EPSILON
        patches = ((past - level) / spread).unflatten(1, (-1, self.patch))
        read, _ = self.backbone(self.to_features(patches))
        future: Tensor = self.to_future(read.flatten(1))
        return future * spread + level


class DLinear(nn.Module):
    """A moving mean and what is left of it, each through one matrix (arXiv 2205.13504)."""

    kernel = 25

    def __init__(self, lookback: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(lookback, horizon), nn.Linear(lookback, horizon)

    def forward(self, past: Tensor) -> Tensor:
        """(b lookback) -> (b horizon)"""
        side = self.kernel // 2
        padded = F.pad(past[:, None], (side, side), mode="replicate")
        trend = F.avg_pool1d(padded, self.kernel, stride=1)[:, 0]
        out: Tensor = self.trend(trend) + self.rest(past - trend)
        return out


def build(name: str, settings: Settings) -> nn.Module:
    if name == "DLinear":
        return DLinear(settings.lookback, HORIZONS[-1])
    return MemoryForecaster(settings, HORIZONS[-1])


def errors(forecast: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared and absolute errors over the first steps, up to each horizon.  -> (horizons), (horizons)"""
    off = forecast - future
    squared = torch.stack([off[:, :horizon].square().mean() for horizon in HORIZONS])
    return squared, torch.stack([off[:, :horizon].abs().mean() for horizon in HORIZONS])


def windows(series: Series, part: str, settings: Settings) -> Tensor:
    """First steps of the windows that are validated or tested on."""
    return series.windows(part, settings.lookback, HORIZONS[-1], max(MOST_ROWS[part] // series.values.shape[1], 2))


@torch.no_grad()
def evaluated(model: nn.Module, series: Series, part: str, settings: Settings) -> tuple[Tensor, Tensor]:
    """The errors over all series of all windows of a part."""
    firsts, count = windows(series, part, settings), series.values.shape[1]
    all_firsts, which = firsts.repeat_interleave(count), torch.arange(count).repeat(len(firsts))
    totals = torch.zeros(2, len(HORIZONS), dtype=torch.float64)
    with evaluating(model):
        for some, of in zip(all_firsts.split(ROWS_AT_ONCE), which.split(ROWS_AT_ONCE), strict=True):
            past, future = series.cut(some, of, settings.lookback, HORIZONS[-1])
            totals += len(some) * torch.stack(errors(model(past), future)).double()
    return tuple(totals / len(all_firsts))  # type: ignore[return-value]


def run(name: str, series: Series, seed: int, settings: Settings) -> records.Record:
    """Train one model on one data set, and say everything that its numbers depend on."""
    torch.manual_seed(seed)
    model = build(name, settings)
    firsts = series.windows("train", settings.lookback, HORIZONS[-1])
    steps = settings.linear_steps if name == "DLinear" else settings.steps
    how = Training(steps=steps, lr=settings.lr, lr_end=0.05, warmup=10, clip=1.0, validate_every=max(steps // 5, 1))

    def loss_of(step: int) -> Tensor:
        drawn = generator_of(seed, step)
        some = firsts[torch.randint(len(firsts), (settings.batch,), generator=drawn)]
        which = torch.randint(series.values.shape[1], (settings.batch,), generator=drawn)
        past, future = series.cut(some, which, settings.lookback, HORIZONS[-1])
        return errors(model(past), future)[0].mean()

    with writes_off(model) if name == "memory, frozen" else nullcontext():
        found = fitted(model, loss_of, lambda: float(evaluated(model, series, "valid", settings)[0].mean()), how)
        squared, absolute = evaluated(model, series, "test", settings)
    scores = {str(h): dict(mse=float(s), mae=float(a)) for h, s, a in zip(HORIZONS, squared, absolute, strict=True)}
    tested = {part: len(windows(series, part, settings)) for part in MOST_ROWS}
    return dict(parameters=size(model), steps=steps, results=scores, windows=tested, **found._asdict())


def told(record: records.Record) -> str:
    found = record["results"].items()
    return ", ".join(f"{horizon} steps {each['mse']:.3f}/{each['mae']:.3f}" for horizon, each in found)


STUDY = Study(__doc__, MODELS, Settings, series_of, run, told)

if __name__ == "__main__":
    raise SystemExit(STUDY.main())
