"""The recall table and plot of docs/results.md: `python -m benchmarks.learning.recall_report`."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import DOCS, RESULTS
from benchmarks.pages import put
from benchmarks.records import load

Key = tuple[str, str, int]  # variant, memory, pairs


def grouped(table: Path) -> dict[Key, list[dict[str, Any]]]:
    runs: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for run in load(table, lambda run: (*key_of(run), run["settings"]["seed"])):
        runs[key_of(run)].append(run)
    return runs


def key_of(run: dict[str, Any]) -> Key:
    return run["variant"], run["memory"], run["task"]["pairs"]


def shown(values: list[float]) -> str:
    """The median, and the range if there is more than one."""
    middle = f"{statistics.median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f}–{max(values):.3f})"


def table(runs: dict[Key, list[dict[str, Any]]]) -> str:
    lines = [
        "| model | memory | pairs | trained tokens | seeds | steps | accuracy | at 4× | at 16× |",
        "|" + "---|" * 9,
    ]
    for (variant, memory, pairs), same in runs.items():
        tokens = same[0]["task"]["tokens"]
        steps = "–".join(map(str, sorted({min(r["steps"] for r in same), max(r["steps"] for r in same)})))
        columns = [shown([run["accuracy"][str(tokens * factor)] for run in same]) for factor in (1, 4, 16)]
        cells = [variant.upper(), memory, str(pairs), str(tokens), str(len(same)), steps, *columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: dict[Key, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    variants = sorted({variant for variant, _, _ in runs})
    _, axes = plt.subplots(1, len(variants), figsize=(3.4 * len(variants), 3.2), sharey=True, squeeze=False)
    for ax, variant in zip(axes[0], variants, strict=True):
        for (name, memory, pairs), same in runs.items():
            if name == variant:
                lengths = sorted(map(int, same[0]["accuracy"]))
                heights = [statistics.median(run["accuracy"][str(length)] for run in same) for length in lengths]
                style = "-o" if memory == "on" else "--x"
                ax.plot(lengths, heights, style, label=f"{pairs} pairs, memory {memory}")
        ax.set(title=variant.upper(), xlabel="tokens", xscale="log", ylim=(-0.03, 1.03))
        ax.legend(fontsize=7)
    axes[0][0].set_ylabel("accuracy")
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "recall.jsonl")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    runs = grouped(args.results)
    put(args.docs / "results.md", "recall", table(runs))
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    plot(runs, args.docs / "images" / "recall.png")


if __name__ == "__main__":
    main()
