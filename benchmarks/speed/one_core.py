"""Renewed memories on one core: an earlier commit, this one, and this one with compiled steps, taking turns.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.one_core ../before

Each side is a process of its own with one thread, float32, random numbers from seed 0; they take turns call by call,
and the table has the least CPU time of each. Beside it: the seconds of the products and of the passes over whole
weights of this commit's call, alone (`replay`). The table goes to docs/benchmarks.md, with `--turns 1` nowhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import CHECKOUT, DOCS, describe_machine
from benchmarks.pages import markdown, put
from benchmarks.speed.before_after import commit_of
from benchmarks.speed.one_core_worker import MEMORIES, MODELS

WORKER = Path(__file__).with_name("one_core_worker.py")
NAMES = {
    "a": "16 rows, d 32, h 128, chunk 8, renewed every 16",
    "b": "8 rows, d 64, h 256, chunk 16, renewed every 16",
    "wide": "2 rows, d 384, h 1536, chunk 64, renewed every 64",
    "mag": "`TitansMAG`, dim 128, 4 blocks, window 32, 4 × 1,024 tokens",
    "mag, one block of four": "the same, memory in one block of four",
    "mag, no memory": "the same, no memory",
}
MODES = {"forward": "forward", "training": "forward + backward"}
HEADER = ["1,024 tokens", "", "before, ms", "now, ms", "×", "compiled step, ms", "×", "products alone", "passes alone"]


class Timer:
    """A process that times calls of one checkout."""

    def __init__(self, checkout: Path, *, is_compiled: bool = False) -> None:
        command = [sys.executable, "-P", str(WORKER), str(checkout.resolve()), *(["--compile"] if is_compiled else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        file = Path(self.answer("file")).resolve()
        if not file.is_relative_to(checkout.resolve()):
            self.close()
            raise SystemExit(f"{checkout} must be a checkout with titans_pytorch in it, got {file} from elsewhere")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, *words: str) -> list[float]:
        return [float(each) for each in self.answer(*words).split()]

    def answer(self, *words: str) -> str:
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        requests.write("|".join(words) + "\n")
        requests.flush()
        if not (line := answers.readline()):
            raise SystemExit(f"the process that was asked for {' '.join(words)} has ended, see above")
        return line.rstrip("\n")


def row(sides: dict[str, Timer], workload: str, mode: str, turns: int) -> list[str]:
    """The least of each side, how often faster, and the shares of this commit's call."""
    taking_part = {name: side for name, side in sides.items() if name != "before" or workload not in list(MODELS)[1:]}
    found = dict.fromkeys(taking_part, float("inf"))
    for turn in range(1 + turns):
        for name, side in taking_part.items():
            (seconds,) = side.ask(workload, mode)
            if turn:
                found[name] = min(found[name], seconds)
    products, passes = sides["now"].ask("shares", workload, mode)
    before, now, compiled = found.get("before"), found["now"], found["compiled"]

    def ratio(seconds: float) -> str:
        return "" if before is None else f"{before / seconds:.2f}"

    shown = ["" if before is None else f"{1e3 * before:.0f}", f"{1e3 * now:.0f}", ratio(now)]
    shares = [f"{products / now:.0%}", f"{passes / now:.0%}"]
    return [NAMES[workload], MODES[mode], *shown, f"{1e3 * compiled:.0f}", ratio(compiled), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    sides = {
        "before": Timer(arguments.before),
        "now": Timer(CHECKOUT),
        "compiled": Timer(CHECKOUT, is_compiled=True),
    }
    rows = [HEADER]
    for workload in (*MEMORIES, *MODELS):
        for mode in MODES if workload in MEMORIES else ("training",):
            rows.append(row(sides, workload, mode, arguments.turns))
            print(" | ".join(rows[-1]), flush=True)
    for side in sides.values():
        side.close()
    if arguments.turns > 1:
        where = describe_machine()
        commits = " and ".join(commit_of(path) for path in (arguments.before, CHECKOUT))
        about = f"{where['cpu']}, 1 thread, {where['date']}, load {where['load']}, commits {commits}"
        told = f"{about}; least of {arguments.turns} turns. × is how many times as fast as before; shares are of *now*."
        put(DOCS / "benchmarks.md", "one core", f"{told}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
