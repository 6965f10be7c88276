"""Writes the tables of docs/benchmarks.md from benchmarks/results/*.json: `python -m benchmarks.speed.report`.

Only what stands between the markers `<!-- DEVICE -->` and `<!-- end of DEVICE -->` is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.machine import DOCS, RESULTS
from benchmarks.pages import markdown, put, without_options

PAGE = DOCS / "benchmarks.md"
DEVICES = ("cpu", "cuda")
MODES = {"forward": "forward", "training": "forward + backward"}

DISTURBANCE = 1.25  # how much slower than its best of the run the large matrix product may be
DISTURBED = "Rows with \\* ran while other programs kept the machine busy: do not rely on their times."

Record = dict[str, Any]
Table = list[list[str]]


def main() -> None:
    without_options(__doc__)
    for device in DEVICES:
        file = RESULTS / f"{device}.json"
        if file.exists():
            put(PAGE, device, report(json.loads(file.read_text())))
            print(f"{PAGE.name}: {device} tables from {file.name}")


def report(results: Record) -> str:
    """The machine, then one section per group of measurements."""
    parts = [describe(results)]
    if mark_disturbed([record for records in results["groups"].values() for record in records]):
        parts += [DISTURBED]
    for title, group, to_table in SECTIONS:
        header, *rows = to_table(results["groups"].get(group, []))
        parts += [f"### {title}", markdown([header, *rows])] if rows else []
    return "\n\n".join(parts)


def mark_disturbed(records: list[Record]) -> int:
    """Other programs on the machine slow the large matrix product down too: say so in the rows beside it."""
    count = 0
    for dtype in {record["dtype"] for record in records if "matmul" in record}:
        timed = [record for record in records if record.get("dtype") == dtype and "seconds" in record["matmul"]]
        fastest = min((record["matmul"]["fastest"] for record in timed), default=0.0)
        for record in timed:
            record["is_disturbed"] = record["matmul"]["seconds"] > DISTURBANCE * fastest
            count += record["is_disturbed"]
    return count


def describe(results: Record) -> str:
    machine, ours = results["machine"], results["sides"]["ours"]
    place = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, load {machine['load']} at the start"
    )
    place += f", {ours['gpu']}" if ours["gpu"] else f", {ours['threads']} threads"
    versions = f"Python {ours['python']}, torch {ours['torch']}"
    if peer := results["sides"].get("peer"):
        versions += f" (titans-pytorch 0.5.5: Python {peer['python']}, torch {peer['torch']})"
    return f"{place}. {versions}. {machine['date']}, commit {machine['commit'] or 'unknown'}."


def workloads(records: list[Record]) -> Table:
    header = ["workload", "", "ours, s", "0.5.5, s", "faster", "ours, MB", "0.5.5, MB", "memory", "matmul rate"]
    header += ["outputs differ by"]
    rows = [[label(record), call(record), *comparison(record), difference(record)] for record in records]
    return [header, *rows]


def scaling(name: str, key: str) -> Callable[[list[Record]], Table]:
    """One size varies, `key` of the record or of the memory's arguments."""

    def table(records: list[Record]) -> Table:
        header = [name, "", "ours, s", "0.5.5, s", "faster", "ours, MB", "0.5.5, MB", "memory", "matmul rate"]
        header += ["µs per token", "beyond output, MB", "state, MB"]
        rows = []
        for record in records:
            size = record.get(key, record["memory"].get(key))
            rows.append([f"{size:,}", call(record), *comparison(record), *per_token(record)])
        return [header, *rows]

    return table


def label(record: Record) -> str:
    memory = record["memory"]
    words = [f"dim {memory['dim']}"]
    words += [f"{memory['heads']} heads × {memory['dim_head']}"] if "heads" in memory else []
    words += [f"chunk {memory['chunk_size']}"]
    words += [f"batch {memory['batch_size']}"] if "batch_size" in memory else []
    words += ["spectral norm"] if memory.get("spectral_norm_surprises") else []
    return ", ".join([*words, f"{record['batch']}×{record['tokens']:,} tokens"])


def call(record: Record) -> str:
    precision = "" if record["dtype"] == "float32" else ", bf16"
    return MODES[record["mode"]] + precision + (" \\*" if record.get("is_disturbed") else "")


def comparison(record: Record) -> list[str]:
    """Seconds, ratio, megabytes, ratio, and the share of the matmul rate that the useful work reaches."""
    ours, peer = record["ours"], record.get("peer", {})
    return [
        seconds(ours),
        seconds(peer),
        ratio(peer, ours, "seconds", "×"),
        megabytes(ours, "peak_bytes"),
        megabytes(peer, "peak_bytes"),
        ratio(ours, peer, "peak_bytes", ""),
        matmul_share(record),
    ]


def seconds(facts: Record) -> str:
    if "error" in facts:
        return "fails"
    return f"{facts['seconds']:.3g} ({facts['fastest']:.3g}–{facts['slowest']:.3g})" if "seconds" in facts else "–"


def ratio(upper: Record, lower: Record, key: str, unit: str) -> str:
    return f"{upper[key] / lower[key]:.3g}{unit}" if key in upper and lower.get(key) else "–"


def megabytes(facts: Record, key: str) -> str:
    return (
        f"{facts[key] / 1e6:,.3g}"
        if 0 < facts.get(key, 0) < 1e8
        else f"{facts[key] / 1e6:,.0f}"
        if key in facts
        else "–"
    )


def matmul_share(record: Record) -> str:
    ours, matmul = record["ours"], record["matmul"]
    if "seconds" not in ours or "seconds" not in matmul:
        return "–"
    return f"{record['useful_flops'] / ours['seconds'] / (record['matmul_flops'] / matmul['seconds']):.0%}"


def difference(record: Record) -> str:
    """Between the outputs of both sides, given the same parameters and input; a dash if one is missing or infinite."""
    return f"{record['difference']:.1e}" if record.get("difference") is not None else "–"


def per_token(record: Record) -> list[str]:
    ours = record["ours"]
    if "seconds" not in ours:
        return ["–"] * 3
    beyond = f"{(ours['peak_bytes'] - ours['output_bytes']) / 1e6:,.0f}" if "peak_bytes" in ours else "–"
    return [
        f"{1e6 * ours['seconds'] / (record['batch'] * record['tokens']):.1f}",
        beyond,
        megabytes(ours, "state_bytes"),
    ]


def decoding(records: list[Record]) -> Table:
    header = ["from token", "ours, ms per token", "worst", "state, MB", "0.5.5, ms per token", "worst", "state, MB"]
    sides = ("ours", "peer")
    return [
        header,
        *([f"{r['position']:,}", *(cell for side in sides for cell in window(r.get(side, {})))] for r in records),
    ]


def window(facts: Record) -> list[str]:
    if "mean_ms" not in facts:
        return ["fails" if "error" in facts else "–", "–", "–"]
    return [f"{facts['mean_ms']:.2f}", f"{facts['worst_ms']:.1f}", megabytes(facts, "state_bytes")]


def newton_schulz(records: list[Record]) -> Table:
    """How much of a call with spectral norm its Newton-Schulz products would take by themselves."""
    header = ["workload", "", "products, form", "s", "share of ours", "share of 0.5.5"]
    rows = []
    for record in records:
        for form in ("direct", "gram"):
            facts = record.get(f"newton_schulz_{form}", {})
            if "seconds" in facts:
                shares = [share(facts, record[side]) if side in record else "–" for side in ("ours", "peer")]
                rows.append([label(record), call(record), form, seconds(facts), *shares])
    return [header, *rows]


def share(part: Record, whole: Record) -> str:
    return f"{part['seconds'] / whole['seconds']:.0%}" if "seconds" in whole else "–"


SECTIONS: tuple[tuple[str, str, Callable[[list[Record]], Table]], ...] = (
    ("The four workloads", "workloads", workloads),
    ("The share of the Newton–Schulz products", "workloads", newton_schulz),
    ("Sequence length", "length", scaling("tokens", "tokens")),
    ("Chunk size", "chunk", scaling("chunk", "chunk_size")),
    ("Memory size", "size", scaling("dim", "dim")),
    ("One token at a time", "decoding", decoding),
)


if __name__ == "__main__":
    main()
