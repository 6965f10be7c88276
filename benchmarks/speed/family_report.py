"""The family's tables of speed and of long streams in docs/: `python -m benchmarks.speed.family_report`."""

from __future__ import annotations

import json
from collections.abc import Callable

from benchmarks.machine import DOCS, RESULTS, place
from benchmarks.pages import markdown, put, without_options
from benchmarks.records import Record


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
        f"{settings['depth']}, window {settings['window']}, {settings['threads']} threads; {place(record)}."
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
    about = f"{reports[-1]['tokens']:,} tokens each, {record['threads']} thread(s); {place(record)}."
    return f"{about}\n\n{markdown(table)}"


SECTIONS: tuple[tuple[str, str, str, Callable[[Record], str]], ...] = (
    ("family.json", "benchmarks.md", "family", speed),
    ("long_context.json", "results.md", "long context", long_context),
)


def main() -> None:
    without_options(__doc__)
    for file, page, section, write in SECTIONS:
        if (path := RESULTS / file).exists():
            put(DOCS / page, section, write(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
