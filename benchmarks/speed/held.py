"""What calls hold at most, in bytes of tensors alive at once: an earlier commit and this one.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.held ../before

Bytes are counted as torch gives them (`operations.held_bytes`), so they are the same on any machine, and small tensors,
code and what allocators keep are not in them. The table goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import CHECKOUT, DOCS
from benchmarks.pages import markdown, put
from benchmarks.speed.before_after import commit_of
from benchmarks.speed.transformer import WORKLOADS

WORKER = Path(__file__).with_name("held_worker.py")
TRANSFORMERS = {
    "the README's transformer": WORKLOADS["readme"],
    "train_mac, 4 × 512 tokens": WORKLOADS["train_mac"],
    "the same, no spectral norm": WORKLOADS["train_mac, no spectral norm"],
}
HEADER = ["1,024 tokens", "forward, before", "now", "forward + backward, before", "now"]


def bytes_of(checkout: Path) -> dict[str, list[int]]:
    """By workload, forward and in training, in a process of its own."""
    command = [sys.executable, "-P", str(WORKER), str(checkout.resolve()), str(CHECKOUT), json.dumps(TRANSFORMERS)]
    found: dict[str, list[int]] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def table(before: dict[str, list[int]], now: dict[str, list[int]]) -> list[list[str]]:
    """Bold where this commit holds more."""

    def cells(old: int, new: int) -> list[str]:
        shown = [f"{each / 1e6:,.0f} MB" for each in (old, new)]
        return [shown[0], f"**{shown[1]}**" if new > old else shown[1]]

    pairs: dict[str, Any] = {name: list(zip(before[name], now[name], strict=True)) for name in now}
    return [
        HEADER,
        *([name, *(cell for pair in of_modes for cell in cells(*pair))] for name, of_modes in pairs.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    before = parser.parse_args().before
    rows = table(bytes_of(before), bytes_of(CHECKOUT))
    print(markdown(rows))
    commits = " and ".join(commit_of(path) for path in (before, CHECKOUT))
    put(DOCS / "benchmarks.md", "held", f"Commits {commits}, float32, seed 0.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
