"""What a change did to the times: this checkout beside one of an earlier commit, taking turns.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.before_after ../before
    python -m benchmarks.speed.before_after ../before --only transformers   # prints, and leaves the table as it is

Memories are those of `workloads`, both sides with the same seed 0, float32. Every side has a process, and they take
turns call by call. The table goes to docs/benchmarks.md, with `--quick` nowhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.machine import CHECKOUT, DOCS, describe_machine
from benchmarks.pages import markdown, put
from benchmarks.speed.measure import Answer, Effort, Side, Worker, alternate, check_side
from benchmarks.speed.transformer import WORKLOADS, measure, stepper
from benchmarks.speed.workloads import GROUPS, Case

RENEWAL = Case("renewal", dict(dim=128, dim_head=32, heads=4, chunk_size=8, batch_size=16), batch=4)
FULL, STEPS, QUICK = Effort((5, 15), 25, 0), Effort((6, 15), 25, 0), Effort((1, 1), 0, 0)
MODES = {"forward": "forward", "training": "forward + backward"}
HEADER = ["workload", "", "before, s", "after, s", "after / before"]


def memories(sides: dict[str, Side], is_quick: bool) -> Iterator[list[str]]:
    """A row for each memory and mode."""
    for case in (*GROUPS["workloads"], RENEWAL):
        sized = case.quick() if is_quick else case
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(side, "cpu")) for name, side in sides.items()}
            for worker in workers.values():
                worker.build(sized, "float32")
            for mode in case.modes:
                turns = {name: partial(worker.ask, "time", mode=mode) for name, worker in workers.items()}
                yield row(case.name, MODES[mode], alternate(turns, QUICK if is_quick else FULL))


def transformers(sides: dict[str, Side], is_quick: bool) -> Iterator[list[str]]:
    """A row for each transformer's training step, and one for the products of this side's step alone."""
    for name, workload in WORKLOADS.items():
        sized = workload | dict(tokens=64, batch=1) if is_quick else workload
        with ExitStack() as stack:
            turns = {which: stack.enter_context(stepper(side, sized)).answer for which, side in sides.items()}
            yield row(f"transformer: {name}", "training step", alternate(turns, QUICK if is_quick else STEPS))
        found = measure(sides["after"].python, "products", sized, 1 if is_quick else 3, sides["after"].checkout)
        if "error" in found:
            raise SystemExit(f"products: {found['error']}")
        yield [f"transformer: {name}", "its products alone", "", f"{found['seconds']:.3g}", ""]


def row(name: str, what: str, found: dict[str, Answer]) -> list[str]:
    """Medians, with the fastest and the slowest turn, and their ratio."""
    for which, each in found.items():
        if "error" in each:
            raise SystemExit(f"{which}: {each['error']}")
    shown = [f"{each['seconds']:.3g} ({each['fastest']:.3g}–{each['slowest']:.3g})" for each in found.values()]
    before, after = (each["seconds"] for each in found.values())
    return [name, what, *shown, f"{after / before:.2f}"]


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


PARTS = (memories, transformers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    arguments = parser.parse_args()
    sides = {name: Side(sys.executable, path.resolve()) for name, path in
             (("before", arguments.before), ("after", CHECKOUT))}  # fmt: skip
    for side in sides.values():
        check_side(side, "cpu")
    rows = [HEADER]
    for rows_of in [part for part in PARTS if arguments.only in (None, part.__name__)]:
        for found in rows_of(sides, arguments.quick):
            print(" | ".join(found), flush=True)
            rows.append(found)
    if not arguments.quick and not arguments.only:
        where = describe_machine()
        commits = " and ".join(commit_of(path) for path in (arguments.before, CHECKOUT))
        about = f"{where['cpu']}, 2 threads, {where['date']}, commits {commits}; medians (fastest–slowest)."
        put(DOCS / "benchmarks.md", "before and after", f"{about}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
