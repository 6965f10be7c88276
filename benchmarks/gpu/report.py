"""The tables of docs/gpu.md, from benchmarks/results/gpu.json: `python -m benchmarks.gpu.report`.

Every table has all of its rows; the cells of what was not measured stay empty, and its reason stands below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import attention, decoding, memories, models, precision, suite
from benchmarks.gpu.bench import OURS, PEER, SCAN, Item, Record
from benchmarks.gpu.results import load
from benchmarks.machine import DOCS, RESULTS, place
from benchmarks.pages import markdown, put
from benchmarks.speed.report import MODES, Table, difference, megabytes, ratio, seconds

FILE, PAGE = RESULTS / "gpu.json", DOCS / "gpu.md"

ITEMS: tuple[Item, ...] = (
    *suite.ITEMS,
    *memories.ITEMS,
    *models.ITEMS,
    *precision.ITEMS,
    *decoding.ITEMS,
    *attention.ITEMS,
    *models.LONG_ITEMS,
    *decoding.LONG_ITEMS,
)
"""All measurements, in the order in which they are taken"""


def filled(cell: str) -> str:
    """Nothing, where another page has a dash."""
    return "" if cell == "–" else cell


def of_group(found: dict[str, Record], group: str) -> list[tuple[str, Record]]:
    """The measurements of a group by name; an empty record where there is none."""
    return [(item.name, found.get(item.key, {})) for item in ITEMS if item.group == group]


def memory_table(found: dict[str, Record]) -> Table:
    header = ["workload", "", "ours, s", "0.5.5, s", "faster", "with its scan, s", "faster"]
    table = [[*header, "ours, MB", "0.5.5, MB", "with its scan, MB", "outputs differ by"]]
    for name, record in of_group(found, "memory"):
        for mode, words in MODES.items():
            ours, peer, scan = (record.get(mode, {}).get(side, {}) for side in (OURS, PEER, SCAN))
            cells = [seconds(ours), seconds(peer), ratio(peer, ours, "seconds", "×")]
            cells += [seconds(scan), ratio(scan, ours, "seconds", "×")]
            cells += [megabytes(side, "peak_bytes") for side in (ours, peer, scan)]
            table.append([name, words, *map(filled, [*cells, difference(record)])])
    return table


def model_table(found: dict[str, Record]) -> Table:
    table = [["model", "parameters", "s a step", "tokens/s", "peak memory, MB"]]
    for name, record in of_group(found, "models"):
        size = f"{record['parameters'] / 1e6:.0f} M" if "parameters" in record else ""
        table.append([name, size, filled(seconds(record)), rate(record), filled(megabytes(record, "peak_bytes"))])
    return table


def precision_table(found: dict[str, Record]) -> Table:
    table = [["forward + backward", "float32, s", "TF32, s", "faster", "outputs differ by"]]
    for name, record in of_group(found, "precision"):
        full, tf32 = (record.get(each, {}) for each in precision.PRECISIONS)
        cells = [seconds(full), seconds(tf32), ratio(full, tf32, "seconds", "×"), difference(tf32)]
        table.append([name, *map(filled, cells)])
    return table


def decoding_table(found: dict[str, Record]) -> Table:
    table = [["tokens/s, one at a time", *decoding.WAYS]]
    for name in decoding.MODULES:
        table.append([name, *(rate(found.get(f"decoding: {name}: {way}", {})) for way in decoding.WAYS)])
    return table


def attention_table(found: dict[str, Record]) -> Table:
    header = ["2 × 8,192 tokens, dim 512", "", "FlexAttention, s", "dense, s", "faster"]
    table = [[*header, "FlexAttention, MB", "dense, MB"]]
    for name, record in of_group(found, "attention"):
        for mode, words in MODES.items():
            flex, dense = (record.get(mode, {}).get(each, {}) for each in ("flex", "dense"))
            cells = [seconds(flex), seconds(dense), ratio(dense, flex, "seconds", "×")]
            cells += [megabytes(flex, "peak_bytes"), megabytes(dense, "peak_bytes")]
            table.append([name, words, *map(filled, cells)])
    return table


def rate(record: Record) -> str:
    return f"{record['tokens_per_second']:,.0f}" if "tokens_per_second" in record else ""


SECTIONS: tuple[tuple[str, Callable[[dict[str, Record]], Table]], ...] = (
    ("Memories, float32", memory_table),
    ("Training steps of 170M parameters, 1 × 4,096 tokens, bfloat16 autocast", model_table),
    ("TF32", precision_table),
    ("Decoding, float32", decoding_table),
    ("FlexAttention and dense masks, bfloat16 autocast", attention_table),
)


def report(run: Record | None) -> str:
    """All tables of a run; of none, with empty cells."""
    found = {} if run is None else run["items"]
    parts = ["Not measured yet."] if run is None else [heading(run)]
    for title, to_table in SECTIONS:
        parts += [f"### {title}", markdown(to_table(found))]
    return "\n\n".join([*parts, *reasons(found)])


def heading(run: Record) -> str:
    """Where it was measured, and whether the tests pass there."""
    key, settings = run["key"], run["settings"]
    tests = run["items"].get(suite.ITEMS[0].key, {})
    said = ", ".join(f"{count} {word}" for word, count in tests.get("counts", {}).items()) or "not run"
    said += f" ({', '.join(f'`{name}`' for name in tests['failed'])})" if tests.get("failed") else ""
    return (
        f"{key['device']}, torch {key['torch']}, CUDA {settings['cuda']}; {place(run)}. "
        f"`pytest -m cuda`: {said}. Medians, with the fastest and the slowest call."
    )


def reasons(found: dict[str, Record]) -> list[str]:
    """Why cells are empty, each reason once."""
    why: dict[str, list[str]] = {}
    for key, record in found.items():
        if "reason" in record:
            why.setdefault(record["reason"], []).append(key)
        for side, reason in record.get("missing", {}).items():
            why.setdefault(f"{side}: {reason}", [])
    lines = [f"- {'; '.join(keys)}: {reason}" if keys else f"- {reason}" for reason, keys in why.items()]
    return ["Empty, because:", "\n".join(lines)] if lines else []


def write(results: Path, page: Path) -> None:
    """The last run of every device, one under the other."""
    latest = {run["key"]["device"]: run for run in load(results)}
    put(page, "gpu", "\n\n".join(map(report, latest.values())) if latest else report(None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    write(arguments.results, arguments.page)


if __name__ == "__main__":
    main()
