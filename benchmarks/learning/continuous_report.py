"""The tables of forecasting and DNA of docs/results.md: `python -m benchmarks.learning.continuous_report`."""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

from benchmarks.learning import dna, forecasting
from benchmarks.learning.compare_report import spread
from benchmarks.machine import DOCS, RESULTS
from benchmarks.pages import markdown, put
from benchmarks.records import Record

Groups = list[tuple[str, str, list[Record]]]
"""Data, model, and the runs of all its seeds"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forecasting", type=Path, default=RESULTS / "forecasting.jsonl")
    parser.add_argument("--dna", type=Path, default=RESULTS / "dna.jsonl")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args(arguments)
    if given.forecasting.exists():
        runs = forecasting.STUDY.load_results(given.forecasting)
        put(given.docs / "results.md", "forecasting", f"{of_forecasts(runs)}\n\n{measured(runs)}")
    if given.dna.exists():
        runs = dna.STUDY.load_results(given.dna)
        put(given.docs / "results.md", "dna", f"{of_dna(runs)}\n\n{measured(runs)}")
    return 0


def grouped(runs: list[Record]) -> Groups:
    return [(*key, list(same)) for key, same in groupby(runs, key=lambda run: (run["data"], run["model"]))]


def of_forecasts(runs: list[Record]) -> str:
    """A line for each data set and model, mean squared and absolute errors at every horizon."""
    rows = [["data", "model", "parameters", "seeds", *(f"MSE, MAE at {each}" for each in forecasting.HORIZONS)]]
    for data, model, same in grouped(runs):
        cells = [data, model, f"{same[0]['parameters']:,}", str(len(same))]
        for horizon in map(str, forecasting.HORIZONS):
            both = [spread([run["results"][horizon][kind] for run in same], "{:.3f}") for kind in ("mse", "mae")]
            cells.append(", ".join(both))
        rows.append(cells)
    return markdown(rows)


def of_dna(runs: list[Record]) -> str:
    """A line for each data set and model."""
    rows = [["data", "model", "parameters", "seeds", "accuracy", "always the same label"]]
    for data, model, same in grouped(runs):
        accuracy = spread([run["results"]["accuracy"] for run in same], "{:.3f}")
        cells = [data, model, f"{same[0]['parameters']:,}", str(len(same)), accuracy]
        rows.append([*cells, f"{same[0]['results']['chance']:.3f}"])
    return markdown(rows)


def measured(runs: list[Record]) -> str:
    """Where, when and with what settings."""
    settings = sorted({", ".join(f"{name} {value}" for name, value in run["settings"].items()) for run in runs})
    machines = sorted({f"{run['machine']['cpu']}, commit {run['machine']['commit']}" for run in runs})
    dates = sorted(run["machine"]["date"] for run in runs)
    return f"Settings: {'; '.join(settings)}. Measured on {'; '.join(machines)}, {dates[0]} to {dates[-1]}."


if __name__ == "__main__":
    raise SystemExit(main())
