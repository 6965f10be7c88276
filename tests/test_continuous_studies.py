"""Forecasting and DNA: splits are the usual ones, errors are what they are called, baselines are what they say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.learning import continuous_report, dna, forecasting
from benchmarks.learning.fitting import fitted
from benchmarks.learning.series import borders_of, series_of, synthetic
from benchmarks.machine import RESULTS
from titans_pytorch import writes_off
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import Training

TINY = ["--steps", "2", "--batch", "4", "--dim", "4", "--seeds", "0", "--threads", "1"]


def written(path: Path, steps: int = 4000, count: int = 2) -> Path:
    """A CSV of dates and as many series."""
    rows = [f"day {number}," + ",".join(map(str, row)) for number, row in enumerate(synthetic(0, steps, count))]
    text = "\n".join([",".join(["date", *map(str, range(count))]), *rows])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- series


def test_the_usual_splits() -> None:
    assert borders_of("ETTh2", 17420) == (8640, 11520, 14400)
    assert borders_of("ETTm1", 69680) == (34560, 46080, 57600)
    assert borders_of("weather", 52696) == (36887, 42157, 52696)
    with pytest.raises(SettingsError, match="--data must have the 14400 steps of ETTh1, got 100"):
        borders_of("ETTh1", 100)


def test_series_are_scaled_by_what_is_trained_on() -> None:
    found, raw = series_of(None), synthetic(0)
    seen = raw[:6000]
    scaled = torch.from_numpy((raw - seen.mean(axis=0)) / seen.std(axis=0))
    assert_close(found.values.double(), scaled, rtol=0, atol=1e-5)


def test_a_csv_has_dates_and_series(tmp_path: Path) -> None:
    found, raw = series_of(str(written(tmp_path / "some.csv.gz"))), synthetic(0, 4000, 2)
    assert (found.name, found.borders) == ("some", (2800, 3200, 4000))
    assert np.corrcoef(found.values[:, 1], raw[:, 1])[0, 1] == pytest.approx(1.0)
    (tmp_path / "words.csv").write_text("date,a\nmonday,warm\n")
    with pytest.raises(SettingsError, match="--data must have dates and then numbers in every row, got"):
        series_of(str(tmp_path / "words.csv"))


@pytest.mark.parametrize("part, begin, end", [("train", 0, 6000), ("valid", 6000, 8000), ("test", 8000, 10_000)])
def test_all_futures_of_a_part_lie_in_it_and_only_they(part: str, begin: int, end: int) -> None:
    series, lookback, horizon = series_of(None), 50, 20
    firsts = series.windows(part, lookback, horizon)
    assert int(firsts[0]) == max(begin - lookback, 0)
    assert int(firsts[-1]) + lookback + horizon == end
    assert firsts.diff().eq(1).all()
    some = series.windows(part, lookback, horizon, most=7)
    assert (len(some), some[0], some[-1]) == (7, firsts[0], firsts[-1])
    past, future = series.cut(firsts[3:5], torch.tensor([1, 0]), lookback, horizon)
    assert_close(torch.cat((past, future), dim=1)[1], series.values[int(firsts[4]) :][: lookback + horizon, 0])


def test_a_part_that_is_too_short_is_refused() -> None:
    with pytest.raises(SettingsError, match="--data must have at least 6500 steps of train, got 6000 in synth"):
        series_of(None).windows("train", 5000, 1500)
    with pytest.raises(SettingsError, match="--data must have at least 2001 steps of valid, got 2000 in synth"):
        series_of(None).windows("valid", 5000, 2001)


def test_errors_are_means_up_to_each_horizon() -> None:
    forecast, future = torch.randn(3, 720), torch.randn(3, 720)
    squared, absolute = forecasting.errors(forecast, future)
    for number, horizon in enumerate((96, 192, 336, 720)):
        off = [float(forecast[row, t] - future[row, t]) for row in range(3) for t in range(horizon)]
        assert float(squared[number]) == pytest.approx(sum(each**2 for each in off) / len(off), rel=1e-4)
        assert float(absolute[number]) == pytest.approx(sum(map(abs, off)) / len(off), rel=1e-4)


def test_dlinear_by_the_book() -> None:
    """Each step's trend is the mean of 25 steps around it, with the ends repeated; two matrices, one sum."""
    model, past = forecasting.DLinear(40, 5).double(), torch.randn(2, 40, dtype=torch.float64)
    for row in past:
        trend = torch.stack([row[[min(max(t + k, 0), 39) for k in range(-12, 13)]].mean() for t in range(40)])
        expected = model.trend.weight @ trend + model.trend.bias + model.rest.weight @ (row - trend) + model.rest.bias
        assert_close(model(row[None])[0], expected)


def test_a_forecaster_follows_level_and_scale_and_uses_its_memory() -> None:
    torch.manual_seed(0)
    settings = forecasting.Settings(lookback=64, patch=8, dim=8)
    model, past = forecasting.MemoryForecaster(settings, 5).double(), torch.randn(3, 64, dtype=torch.float64)
    future = model(past)
    assert_close(model(past * 7 + 3), future * 7 + 3, rtol=1e-4, atol=1e-4)
    with writes_off(model):
        assert (model(past) - future).abs().max() > 1e-4


# ---- DNA


def test_bases_are_numbers_and_anything_else_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "some.csv.gz"
    path.write_bytes(gzip.compress(b"seq,label\nACgt,yes\nNAC,no\n" + b"TTTT,no\n" * 18))
    data = dna.sequences_of(str(path))
    assert data.bases[:2].tolist() == [[0, 1, 2, 3], [4, 0, 1, 4]]
    assert data.labels[:3].tolist() == [1, 0, 0]
    rows = torch.cat([data.parts[part] for part in ("train", "valid", "test")])
    assert [len(data.parts[part]) for part in ("train", "valid", "test")] == [16, 2, 2]
    assert rows.sort().values.tolist() == list(range(20))
    assert dna.sequences_of(str(path)).parts["test"].tolist() == data.parts["test"].tolist()


def test_synthetic_dna_is_solved_by_looking_for_what_occurs_twice() -> None:
    data = dna.sequences_of(None)

    def repeats(row: np.ndarray) -> bool:
        text = "".join(map(str, row))
        half = len(text) // 2
        return any(text[start : start + 10] in text[half:] for start in range(half - 10))

    answers = torch.tensor([repeats(row) for row in data.bases.numpy()])
    assert (answers == (data.labels == 1)).double().mean() > 0.995
    assert 0.4 < data.chance < 0.6


@pytest.mark.parametrize("name", ["memory", "convolutions"])
def test_classifiers_answer_for_every_label(name: str) -> None:
    model = dna.build(name, dna.Settings(dim=8), 3)
    assert model(torch.randint(0, 5, (2, 53))).shape == (2, 3)


# ---- the commands


def test_the_best_of_a_training_is_kept() -> None:
    """Validation gets worse after the second time: the weights of then stay."""
    model, seen, scores = torch.nn.Linear(1, 1), [], iter([3.0, 1.0, 2.0, 2.5])

    def validate() -> float:
        seen.append(model.weight.detach().clone())
        return next(scores)

    settings = Training(steps=4, validate_every=1, lr=0.1, warmup=0)
    found = fitted(model, lambda step: model(torch.ones(1, 1)).square().sum(), validate, settings)
    assert (found.best, found.best_step, found.skipped, len(found.curve)) == (1.0, 2, 0, 4)
    assert_close(model.weight, seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_a_study_goes_on_where_it_was_and_its_report_shows_it(tmp_path: Path) -> None:
    series, sequences = written(tmp_path / "some.csv", steps=8000), tmp_path / "bases.csv"
    sequences.write_text("seq,label\n" + "".join(f"{'ACGT' * 8},{row % 2}\n" for row in range(40)))
    forecasts, classes = tmp_path / "forecasting.jsonl", tmp_path / "dna.jsonl"
    slower = ["--lookback", "32", "--linear-steps", "2"]
    first = ["--data", str(series), "--out", str(forecasts), *TINY, *slower]
    assert forecasting.STUDY.main([*first, "--only", "DLinear"]) == 0
    before = forecasts.read_text()
    assert forecasting.STUDY.main(first) == 0
    assert dna.STUDY.main(["--data", str(sequences), "--out", str(classes), *TINY]) == 0
    assert forecasts.read_text().startswith(before), "what is there already is not done again"
    records = [json.loads(line) for line in forecasts.read_text().splitlines()]
    assert [each["model"] for each in records] == ["DLinear", "memory", "memory, frozen"]
    assert str(tmp_path) not in forecasts.read_text() + classes.read_text()
    given = ["--forecasting", str(forecasts), "--dna", str(classes), "--docs", str(tmp_path)]
    assert continuous_report.main(given) == 0
    page = (tmp_path / "results.md").read_text()
    for start in ("| some | memory |", "| some | DLinear |", "| bases | memory, frozen |", "| bases | convolutions |"):
        assert start in page


def test_recorded_tables_have_three_seeds_of_everything() -> None:
    tables = {RESULTS / "forecasting.jsonl": forecasting.STUDY, RESULTS / "dna.jsonl": dna.STUDY}
    for path, study in tables.items():
        groups = continuous_report.grouped(study.load_results(path))
        assert all(len(same) == 3 for _, _, same in groups)
        assert {model for _, model, _ in groups} == (set(study.models) if groups else set())


@pytest.mark.parametrize(
    "study, options, message",
    [
        (forecasting.STUDY, ["--data", "/nowhere.csv"], "--data must be a CSV file, got nothing at /nowhere.csv"),
        (forecasting.STUDY, ["--patch", "17"], "lookback must be a multiple of patch 17, got 336"),
        (dna.STUDY, ["--data", "/nowhere.csv"], "--data must be a CSV file, got nothing at /nowhere.csv"),
        (dna.STUDY, ["--steps", "0"], "--steps must be above 0, got 0"),
    ],
)
def test_wrong_options_are_one_sentence(
    study: object, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*options, "--out", str(tmp_path / "out.jsonl")]) == 2  # type: ignore[attr-defined]
    assert f"error: {message}" in capsys.readouterr().err
