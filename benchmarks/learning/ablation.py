"""What the memory is worth: the same transformer with it and without, of as many parameters.

    python -m benchmarks.learning.ablation                                        # the cpu preset, Python's source text
    python -m benchmarks.learning.ablation --data FILE --steps 300 --minutes 10 --seeds 0,1

Trains both for equal steps, and both for equal time, by train_mac.py, one after the other. Writes ablation.json, a
table (ablation.md) and a plot (ablation.png) to --out. Runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning.scripts import train
from benchmarks.machine import CHECKOUT, describe_machine
from benchmarks.pages import markdown

Runs = list[dict[str, Any]]
COLORS = {"on": "#c44e52", "off": "#4c72b0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--data", default="python", help="as of train_mac.py")
    parser.add_argument("--steps", type=int, default=300, help="of the comparison by steps; 0: leave it out")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the comparison by time; 0: leave it out")
    parser.add_argument("--seeds", default="0", help="0,1,...")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "runs" / "ablation")
    parser.add_argument("more", nargs="*", metavar="-- OPTIONS", help="further options of train_mac.py, after --")
    given = parser.parse_args()
    runs: Runs = []
    for seed in map(int, given.seeds.split(",")):
        for by, amount in (("steps", given.steps), ("minutes", given.minutes)):
            for memory in ("on", "off"):
                if amount:
                    runs.append(one_run(given, memory, by, amount, seed))
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": describe_machine(), "preset": given.preset, "more": given.more, "runs": runs}
    (given.out / "ablation.json").write_text(json.dumps(record, indent=1))
    (given.out / "ablation.md").write_text(table(runs) + "\n")
    draw(runs, given.out / "ablation.png")
    print(table(runs))
    print(*(given.out / f"ablation.{kind}" for kind in ("json", "md", "png")), sep="\n")


def one_run(given: argparse.Namespace, memory: str, by: str, amount: float, seed: int) -> dict[str, Any]:
    folder = given.out / f"memory-{memory}-{by}-{amount}-seed-{seed}"
    data = given.data if given.data in ("python", "enwik8") else Path(given.data).resolve()
    options = {"preset": given.preset, "memory": memory, by: amount, "seed": seed, "validate_sequences": 128}
    flags = [*(["--resume"] if (folder / "config.json").exists() else []), *given.more]
    records = train("train_mac.py", folder, *flags, data=data, **options)
    valid = [each for each in records if "valid_bits_per_byte" in each]
    config = json.loads((folder / "config.json").read_text())
    return {
        **dict(memory=memory, by=by, amount=amount, seed=seed, parameters=config["parameters"]),
        **dict(steps=valid[-1]["step"], seconds=valid[-1]["seconds"], bits=valid[-1]["valid_bits_per_byte"]),
        **dict(by_position=valid[-1]["by_position"], sequence=config["training"]["sequence"]),
        "curve": [[each["step"], each["seconds"], each["valid_bits_per_byte"]] for each in valid],
    }


def table(runs: Runs) -> str:
    head = [
        "compared by",
        "memory",
        "seed",
        "parameters",
        "steps",
        "training",
        "bits per byte",
        "first quarter",
        "last",
    ]
    rows = [head]
    for run in runs:
        quarter = max(len(run["by_position"]) // 4, 1)
        rows.append(
            [
                f"equal {'steps' if run['by'] == 'steps' else 'time'}",
                *(run["memory"], str(run["seed"]), f"{run['parameters']:,}", str(run["steps"])),
                *(f"{run['seconds']:.0f} s", f"{run['bits']:.3f}"),
                *(f"{mean(part):.3f}" for part in (run["by_position"][:quarter], run["by_position"][-quarter:])),
            ]
        )
    return markdown(rows)


def draw(runs: Runs, path: Path) -> None:
    """Curves over what is equal, and bits by position at the end, of every comparison."""
    from titans_pytorch.training.pictures import figure, write

    kinds = sorted({run["by"] for run in runs}, reverse=True)
    fig = figure(11, 3.8 * len(kinds))
    for (left, right), by in zip(fig.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        for run in (each for each in runs if each["by"] == by):
            style = dict(color=COLORS[run["memory"]], label=f"memory {run['memory']}, seed {run['seed']}", marker="o")
            x = [point[0] if by == "steps" else point[1] for point in run["curve"]]
            left.plot(x, [point[2] for point in run["curve"]], markersize=3, **style)
            width = run["sequence"] / len(run["by_position"])
            middles = [(i + 0.5) * width for i in range(len(run["by_position"]))]
            right.plot(middles, run["by_position"], markersize=3, **style)
        left.set(xlabel="step" if by == "steps" else "seconds of training", ylabel="bits per byte (validation)")
        right.set(xlabel="position in the context", ylabel="bits per byte (validation)")
        left.set_title("equal steps" if by == "steps" else "equal time", fontsize=10)
        for ax in (left, right):
            ax.grid(alpha=0.25)
            ax.legend(frameon=False)
    write(fig, path)


if __name__ == "__main__":
    main()
