"""All that a GPU has to say, in the minutes that there are: tests, times, memory.

    python -m benchmarks.gpu --minutes 9 --peer ../peer-env/bin/python
    python -m benchmarks.gpu --device cpu --quick           # tiny, to see that everything works

What was measured for this commit on this device is not measured again; every result is in the file at once, so that
the next lease goes on where one ended. Results go to benchmarks/results/gpu.json and docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import OURS, Bench, Item, Record, Unavailable, add_peer
from benchmarks.gpu.budget import Budget, OutOfTime
from benchmarks.gpu.report import FILE, ITEMS, PAGE, write
from benchmarks.gpu.results import Results, about, key_of
from benchmarks.machine import CHECKOUT
from benchmarks.speed.measure import Side

GROUPS = tuple(dict.fromkeys(item.group for item in ITEMS))


def measured(item: Item, bench: Bench) -> Record:
    """What an item finds, or the reason why it finds nothing."""
    began = time.monotonic()
    try:
        found = item.run(bench)
    except Unavailable as reason:
        found = {"reason": str(reason)}
    except Exception as error:  # whatever goes wrong in one measurement, the others go on
        message = " ".join(str(error).split())
        found = {"reason": f"{type(error).__name__}: {message[:300]}"}
    return found | {"took": round(time.monotonic() - began, 1)}


def run(items: list[Item], bench: Bench, budget: Budget, results: Results) -> list[str]:
    """Measure what fits into the time.  -> what did not"""
    left: list[str] = []
    group = ""
    for item in items:
        if not budget.allows(item.seconds if not bench.is_quick else 0):
            left.append(item.key)
            continue
        if item.group != group:
            bench.close()  # what other processes hold of the device's memory would be missing
            group = item.group
        try:
            with budget.spent_on(item.seconds):
                record = measured(item, bench)
        except OutOfTime:
            left.append(item.key)
            continue
        results.add(item.key, record)
        print(f"{budget.left:5.0f} s left   {item.key}   {record.get('reason', '')}", flush=True)
        if not is_usable(bench):
            print("the device answers no more: start again, and the run goes on after this measurement")
            return [*left, *(each.key for each in items[items.index(item) + 1 :])]
    return left


def is_usable(bench: Bench) -> bool:
    """Whether a device still works after what went wrong on it."""
    try:
        bench.clear()
    except RuntimeError:
        return False
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with titans-pytorch 0.5.5")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--again", action="store_true", help="measure anew what is recorded for this commit")
    parser.add_argument("--only", metavar="GROUP", nargs="+", choices=GROUPS, help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="default: benchmarks/results/gpu.json")
    parser.add_argument("--page", metavar="FILE.md", type=Path, help="default: docs/gpu.md, or none with --out")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        raise SystemExit("--device cpu needs --quick: on a CPU it is only tried whether everything works")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device, and there is none (--device cpu --quick tries everything on a CPU)")
    return arguments


def places(arguments: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where results and tables go; what was only tried stays out of the repository."""
    if arguments.out is not None or not arguments.quick:
        return arguments.out or FILE, arguments.page or (None if arguments.out else PAGE)
    folder = Path(tempfile.mkdtemp())
    print(f"results of a trial: {folder}")
    return folder / "gpu.json", arguments.page or folder / "gpu.md"


def main() -> None:
    arguments = parse()
    budget = Budget(arguments.minutes)
    bench = Bench(torch.device(arguments.device), arguments.quick, {OURS: Side(sys.executable, CHECKOUT)})
    file, page = places(arguments)
    peer = add_peer(bench, arguments.peer)
    results = Results(file, key_of(bench), about(bench, peer))
    wanted = [item for item in ITEMS if arguments.only is None or item.group in arguments.only]
    due = [item for item in wanted if arguments.again or item.key not in results.items]
    try:
        left = run(due, bench, budget, results)
    finally:
        bench.close()
    if page is not None:
        write(file, page)
    print(f"{len(results.items)} of {len(ITEMS)} measured" + "".join(f"\nleft for another time: {key}" for key in left))


if __name__ == "__main__":
    main()
