"""The tables of many conversations in docs/benchmarks.md: `python -m benchmarks.speed.conversations_report`."""

from __future__ import annotations

import json

from benchmarks.machine import DOCS, RESULTS, place
from benchmarks.pages import markdown, put, without_options
from benchmarks.records import Record

WAYS = ("rows", "groups", "one by one", "rows, compiled")


def decoding(record: Record) -> str:
    """Tokens and conversations per second."""
    sizes = record["sizes"]
    head = ["by rows, tokens/s", "by groups", "one by one", "rows, compiled"]
    table = [["model", *head, "rows over one by one", "compiled", "logits apart, at most", "compiling, s"]]
    for variant, run in record["runs"].items():
        ways = {name: run["decoding"][name] for name in WAYS if name in run["decoding"]}
        speeds = [
            f"{each['tokens_per_second']:,.0f} ({total / each['slowest']:,.0f}–{total / each['fastest']:,.0f})"
            for each in ways.values()
            if (total := each["tokens_per_second"] * each["seconds"])
        ]
        found = [ways[name]["seconds"] for name in ("rows", WAYS[-1]) if name in ways]
        times = [f"{ways['one by one']['seconds'] / seconds:.1f}×" for seconds in found]
        compiling = f"{ways[WAYS[-1]]['first']:.0f}" if WAYS[-1] in ways else "–"
        rest = [f"{max(each['apart'] for each in ways.values()):.1e}", compiling]
        dashes = ["–"] * (WAYS[-1] not in ways)
        table.append([variant.upper(), *speeds, *dashes, *times, *dashes, *rest])
    about = (
        f"{sizes['conversations']} conversations of {sizes['longest'] // 10} to {sizes['longest']:,} tokens, dim "
        f"{sizes['dim']}, depth {sizes['depth']}, window {sizes['window']}, float32, CPU time of 1 thread; medians of "
        f"{sizes['rounds']} turns of {sizes['tokens']} tokens each (slowest–fastest); {places(record)}."
    )
    return f"{about}\n\n{markdown(table)}"


def places(record: Record) -> str:
    """Where and when the models were measured, those that were measured together in one breath."""
    found: dict[str, list[str]] = {}
    for variant, run in record["runs"].items():
        found.setdefault(place(run), []).append(variant.upper())
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(variants)}: {where}" for where, variants in found.items())


def serving(record: Record) -> str:
    """Conversations that come and go."""
    sizes = record["sizes"]
    table = [["model", "together, conversations/s", "one by one", "ratio"]]
    for variant, run in record["runs"].items():
        both = [run["serving"][name]["per_second"] for name in ("together", "one by one")]
        table.append([variant.upper(), *(f"{each:.2f}" for each in both), f"{both[0] / both[1]:.1f}×"])
    about = (
        f"{sizes['served']} conversations, questions of 1 to {sizes['asked']} tokens, answers of 1 to "
        f"{sizes['answered']}, at most {sizes['conversations']} at a time; the same models."
    )
    return f"{about}\n\n{markdown(table)}"


def held(record: Record) -> str:
    """Bytes of a conversation."""
    sizes = record["sizes"]
    runs = {variant: run["held"] for variant, run in record["runs"].items() if run["held"]}
    table = [["tokens read", *(f"{variant.upper()}, kB" for variant in runs), "key-value cache, kB"]]
    for number, length in enumerate(sizes["lengths"]):
        cells = [f"{each[number]['state_bytes'] / 1000:,.0f}" for each in runs.values()]
        table.append([f"{length:,}", *cells, f"{next(iter(runs.values()))[number]['cache_bytes'] / 1000:,.0f}"])
    about = (
        f"Dim {sizes['stream_dim']}, depth {sizes['stream_depth']}, window {sizes['window']}, float32. Every token was "
        "read. The cache is that of attention to all tokens, as wide and as deep: computed, not measured."
    )
    return f"{about}\n\n{markdown(table)}"


def main() -> None:
    without_options(__doc__)
    record = json.loads((RESULTS / "conversations.json").read_text())
    parts = [write(record) for write in (decoding, serving, held)]
    put(DOCS / "benchmarks.md", "conversations", "\n\n".join(parts))


if __name__ == "__main__":
    main()
