"""Writes its part of docs/results.md and its picture from results/side_by_side.json: `python -m benchmarks.learning.side_by_side_report`."""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning.side_by_side import MODELS, RESULTS
from benchmarks.machine import DOCS
from benchmarks.pages import markdown, put

COLORS = dict(zip(MODELS, ("#c44e52", "#4c72b0", "#555555"), strict=True))
PICTURE = "images/results.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    record = json.loads(given.results.read_text())
    (given.docs / "images").mkdir(parents=True, exist_ok=True)
    draw(record["runs"], record["settings"]["sequence"], given.docs / PICTURE)
    put(given.docs / "results.md", "equal time", section(record))
    print(given.docs / "results.md")


def section(record: dict[str, Any]) -> str:
    machine, settings = record["machine"], record["settings"]
    name, kwargs = settings["data"], record["architecture"]["kwargs"]
    seeds = sorted({run["seed"] for run in record["runs"]})
    return f"""`python -m benchmarks.learning.side_by_side` trained each model for {settings["budget"]:.0f} seconds on `{name}`, with
{settings["threads"]} thread(s) of {machine["cpu"]} ({machine["cores"]} cores), {machine["date"]}, commit
{machine["commit"]}, seeds {", ".join(map(str, seeds))}. *published* is titans-pytorch 0.5.5 in an environment of its own;
the loop is the same file for all ([loop.py](../benchmarks/learning/loop.py)): AdamW, learning rate
{settings["lr"]:g} with a cosine over the time, clipping at {settings["clip"]}, batches of {settings["batch"]} ×
{settings["sequence"]} bytes, the same ones for all. Validation is on {settings["validate_sequences"]} fixed sequences and
does not count as time. The first {settings["train_bytes"]:,} bytes train, the next {settings["valid_bytes"]:,} validate.

{table(record["runs"])}

*First* and *last quarter* are positions in the context. *Without memory* has wider feed-forward networks of as many
parameters. *Skipped* steps had a gradient that was not finite.

![Bits per byte over the time of training, and by position in the context at its end.]({PICTURE})

The architecture is the `cpu` preset of [train_mac.py](../train_mac.py): dim {kwargs["dim"]}, {kwargs["depth"]} layers,
window {kwargs["segment_len"]}, memories in layers {", ".join(map(str, kwargs["neural_memory_layers"]))} with chunks of
{kwargs["neural_memory_segment_len"]} and batches of {kwargs["neural_memory_batch_size"]} tokens. This section is written by
`python -m benchmarks.learning.side_by_side_report`.
"""


def table(runs: list[dict[str, Any]]) -> str:
    rows = [["model", "seed", "parameters", "steps", "steps/s", "skipped", "bits per byte", "first quarter", "last"]]
    for run in sorted(runs, key=lambda run: MODELS.index(run["model"])):
        quarter = max(len(run["by_position"]) // 4, 1)
        quarters = (mean(run["by_position"][:quarter]), mean(run["by_position"][-quarter:]))
        rows.append(
            [
                *(run["model"], str(run["seed"]), f"{run['parameters']:,}", f"{run['steps']:,}"),
                *(f"{run['steps'] / run['seconds']:.2f}", str(run["skipped"]), f"**{run['bits']:.3f}**"),
                *(f"{each:.3f}" for each in quarters),
            ]
        )
    return markdown(rows)


def draw(runs: list[dict[str, Any]], sequence: int, path: Path) -> None:
    from titans_pytorch.training.pictures import figure, write

    fig = figure(11, 4)
    left, right = fig.subplots(1, 2)
    for run in runs:
        style = dict(color=COLORS[run["model"]], label=f"{run['model']}, seed {run['seed']}", marker="o", markersize=3)
        left.plot([point[0] for point in run["curve"]], [point[2] for point in run["curve"]], **style)
        width = sequence / len(run["by_position"])
        right.plot([(i + 0.5) * width for i in range(len(run["by_position"]))], run["by_position"], **style)
    left.set(xlabel="seconds of training", ylabel="bits per byte (validation)")
    right.set(xlabel="position in the context", ylabel="bits per byte (validation)")
    for ax in (left, right):
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
    write(fig, path)


if __name__ == "__main__":
    main()
