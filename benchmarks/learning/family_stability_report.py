"""The family's table of docs/stability.md: `python -m benchmarks.learning.family_stability_report`."""

from __future__ import annotations

from benchmarks.learning.family_stability import RESULTS, runs
from benchmarks.machine import DOCS, place
from benchmarks.pages import markdown, put, without_options
from benchmarks.records import Record


def section(records: list[Record]) -> str:
    steps = records[0]["settings"]["steps"]
    shown = [str(step) for step in (steps // 10, steps // 2, steps)]
    table = [["model", "precision", "steps", "all finite", *(f"bits at {step}" for step in shown), "setback", "norm"]]
    for run in (record["run"] for record in records):
        bits = [f"{run['valid_bits'][step]:.2f}" if step in run["valid_bits"] else "–" for step in shown]
        finite = "yes" if run["is_finite"] else "**no**"
        cells = [run["variant"].upper(), run["precision"], f"{run['steps']:,}", finite, *bits]
        table.append([*cells, f"{run['setback']:.2f}", f"{run['largest_norm']:.3g}"])
    settings = records[0]["settings"]
    about = (
        f"`--preset {settings['preset']} --steps {steps} --seed {settings['seed']}` on `{settings['data']}`, largest "
        f"inner step {settings['max_step']}; {place(records[0])}. *Bits* are per byte of validation text; *setback* is "
        "how far a mean of the training bits over 50 steps lay above the best one before it; *norm* is the largest of "
        "a gradient before it was clipped."
    )
    return f"{about}\n\n{markdown(table)}"


def main() -> None:
    without_options(__doc__)
    put(DOCS / "stability.md", "family", section(runs(RESULTS)))


if __name__ == "__main__":
    main()
