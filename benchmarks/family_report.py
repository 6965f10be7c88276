"""Tables about the family in docs/, from results of other benchmarks: `python -m benchmarks.family_report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.family_stability import PRECISIONS, VARIANTS
from benchmarks.family_stability import RESULTS as STABILITY
from benchmarks.machine import CHECKOUT
from benchmarks.pages import put
from benchmarks.report import markdown

RESULTS = Path(__file__).with_name("results")
DOCS = CHECKOUT / "docs"

Record = dict[str, Any]


def speed(record: Record) -> str:
    """A training step of every model, and how often the plain transformer does one in that time."""
    settings, rows = record["settings"], record["rows"]
    plain = next(row["seconds"] for row in rows if row["model"] == "attention")
    table = [["model", "parameters", "s a step", "tokens/s", "time over that of attention"]]
    for row in rows:
        size, times = f"{row['parameters'] / 1e6:.1f} M", f"{row['seconds'] / plain:.1f}×"
        seconds = f"{row['seconds']:.2f} ({row['fastest']:.2f}–{row['slowest']:.2f})"
        table.append([row["model"], size, seconds, f"{row['tokens_per_second']:,.0f}", times])
    about = (
        f"Forward and backward of {settings['rows']} × {settings['tokens']:,} tokens at dim {settings['dim']}, depth "
        f"{settings['depth']}, window {settings['window']}, {settings['threads']} threads; {where(record)}."
    )
    return f"{about}\n\n{markdown(table)}"


def stability(records: list[Record]) -> str:
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
        f"inner step {settings['max_step']}; {where(records[0])}. *Bits* are per byte of validation text; *setback* is "
        "how far a mean of the training bits over 50 steps lay above the best one before it; *norm* is the largest of "
        "a gradient before it was clipped."
    )
    return f"{about}\n\n{markdown(table)}"


def long_context(record: Record) -> str:
    table = [["model", "tokens/s, second tenth", "last tenth", "ratio", "peak at 20,000 tokens", "at the end", "ratio"]]
    for variant, reports in record["runs"].items():
        first, second, last = reports[0], reports[2], reports[-1]
        speeds, peaks = (second["tokens_per_second"], last["tokens_per_second"]), (first["peak_mb"], last["peak_mb"])
        cells = [f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{speeds[1] / speeds[0]:.2f}"]
        cells += [f"{peaks[0]:.0f} MB", f"{peaks[1]:.0f} MB", f"{peaks[1] / peaks[0]:.3f}"]
        table.append([variant.upper(), *cells])
    about = f"{reports[-1]['tokens']:,} tokens each, {record['threads']} thread(s); {where(record)}."
    return f"{about}\n\n{markdown(table)}"


def where(record: Record) -> str:
    machine = record["machine"]
    return f"{machine['cpu']}, {machine['date']}, commit {machine['commit']}"


# ---- where they come from and go

SECTIONS: tuple[tuple[str, str, str, Callable[[Record], str]], ...] = (
    ("family.json", "benchmarks.md", "family", speed),
    ("long_context.json", "results.md", "long context", long_context),
)


def main() -> None:
    for file, page, section, write in SECTIONS:
        if (path := RESULTS / file).exists():
            put(DOCS / page, section, write(json.loads(path.read_text())))
    runs = [STABILITY / f"{v}_{p}.json" for v in VARIANTS for p in PRECISIONS]
    if records := [json.loads(path.read_text()) for path in runs if path.exists()]:
        put(DOCS / "stability.md", "family", stability(records))


if __name__ == "__main__":
    main()
