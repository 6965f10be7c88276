"""Time and peak memory of NeuralMemory, beside the published package if `--peer` names an environment that has it.

python -m benchmarks.speed.memory --peer ../peer-env/bin/python
python -m benchmarks.speed.report
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import CHECKOUT, RESULTS, describe_machine
from benchmarks.speed.flops import chunk_matrices, memory_matrices, useful_flops
from benchmarks.speed.measure import Effort, Side, Worker, WorkerError, alternate, check_side, peak
from benchmarks.speed.workloads import DECODING, GROUPS, NAMES, Case, Decoding

QUICK = Effort(rounds=(2, 2), seconds=0, matmul_size=1024)
FULL = {
    "cpu": Effort(rounds=(3, 9), seconds=45, matmul_size=2048),
    "cuda": Effort(rounds=(5, 9), seconds=10, matmul_size=8192),
}

Record = dict[str, Any]
Sides = dict[str, Side]


def measure_case(case: Case, sides: Sides, *, device: str, dtype: str, effort: Effort) -> Iterator[Record]:
    """One record per mode, with the seconds and bytes of both sides."""
    present = {name: side for name, side in sides.items() if case.peer or side.checkout}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(side, device)) for name, side in present.items()}
        failures = prepare(workers, case, dtype)
        for mode in case.modes:
            turns = {name: partial(worker.ask, "time", mode=mode) for name, worker in workers.items()}
            turns |= yardsticks(workers["ours"], case, mode, effort.matmul_size)
            measured = alternate(turns, effort)
            for name, side in present.items():
                measured[name] |= peak(side, case, device=device, dtype=dtype, mode=mode)
            yield {"name": case.name, "mode": mode, "dtype": dtype, "batch": case.batch, "tokens": case.tokens,
                   "memory": case.memory, "useful_flops": useful_flops(case, mode),
                   "matmul_flops": 2 * effort.matmul_size**3} | failures | measured  # fmt: skip


def prepare(workers: dict[str, Worker], case: Case, dtype: str) -> Record:
    """Build both modules; ours takes over the peer's parameters and input, and compares the outputs."""
    for worker in workers.values():
        worker.build(case, dtype)
    if "peer" not in workers:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "published.pt")
        try:
            workers["peer"].ask("publish", path=path)
            return workers["ours"].ask("adopt", path=path)
        except WorkerError as error:
            return {"difference": None, "difference_error": str(error)}


def yardsticks(worker: Worker, case: Case, mode: str, size: int) -> dict[str, Any]:
    """What takes turns with the libraries: a large matmul, and with spectral norm its products alone."""
    turns = {"matmul": partial(worker.ask, "matmul", size=size)}
    if case.memory.get("spectral_norm_surprises"):
        matrices = [(chunk_matrices(case), *shape) for shape in memory_matrices(case)]
        for form in ("direct", "gram"):
            arguments = {"form": form, "mode": mode, "matrices": matrices}
            turns[f"newton_schulz_{form}"] = partial(worker.ask, "newton_schulz", **arguments)
    return turns


def measure_decoding(decoding: Decoding, sides: Sides, *, device: str) -> Iterator[Record]:
    """One record per position, both sides' windows one after the other."""
    case = Case("decoding", decoding.memory, tokens=1)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(side, device)) for name, side in sides.items()}
        for worker in workers.values():
            worker.build(case, "float32")
        for position in decoding.positions:
            record: Record = {"position": position, "memory": decoding.memory}
            for name, worker in workers.items():
                if position > decoding.peer_up_to and not worker.side.checkout:
                    continue
                try:
                    record[name] = worker.ask(
                        "decode", position=position, window=decoding.window, pieces=decoding.pieces
                    )
                except WorkerError as error:
                    record[name] = {"error": str(error)}
            yield record


def run(arguments: argparse.Namespace, sides: Sides) -> Iterator[tuple[str, Record]]:
    """Every record of the groups and cases that were asked for."""
    device, only = arguments.device, arguments.only or NAMES
    effort = QUICK if arguments.quick else FULL[device]
    for group, cases in GROUPS.items():
        dtypes = ["float32", "bfloat16"] if device == "cuda" and group == "workloads" else ["float32"]
        for dtype in dtypes:
            for case in cases:
                if group in only or case.name in only:
                    sized = case.quick() if arguments.quick else case
                    for record in measure_case(sized, sides, device=device, dtype=dtype, effort=effort):
                        yield group, record
    if "decoding" in only:
        decoding = DECODING.quick() if arguments.quick else DECODING
        for record in measure_decoding(decoding, sides, device=device):
            yield "decoding", record


def summary(group: str, record: Record) -> str:
    """One line on the screen while the run goes on."""
    label = [record.get("name", group), *(record[key] for key in ("mode", "dtype", "position") if key in record)]
    sides = [side_summary(name, record[name]) for name in ("ours", "peer") if name in record]
    return f"{' '.join(map(str, label)):40}" + "   ".join(sides)


def side_summary(name: str, facts: Record) -> str:
    if "error" in facts:
        return f"{name}: {facts['error']}"
    if "mean_ms" in facts:
        return f"{name} {facts['mean_ms']:.3f} ms/token"
    memory = f"{facts['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in facts else facts["peak_error"]
    return f"{name} {facts['seconds']:.4f} s ({facts['fastest']:.4f}–{facts['slowest']:.4f}), {memory}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with titans-pytorch 0.5.5")
    parser.add_argument("--device", choices=tuple(FULL), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=NAMES, help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--out", metavar="FILE.json", type=Path,
                        help="default: benchmarks/results/DEVICE.json, but nothing with --quick or --only")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    sides = {"ours": Side(sys.executable, CHECKOUT)}
    if arguments.peer:
        extra = {"use_accelerated_scan": True} if arguments.device == "cuda" else {}
        sides["peer"] = Side(arguments.peer, extra=extra)
    facts = {name: check_side(side, arguments.device) for name, side in sides.items()}
    results: Record = {"device": arguments.device, "machine": describe_machine(), "sides": facts, "groups": {}}
    is_whole = not (arguments.quick or arguments.only)
    out = arguments.out or (RESULTS / f"{arguments.device}.json" if is_whole else None)
    for group, record in run(arguments, sides):
        print(summary(group, record), flush=True)
        results["groups"].setdefault(group, []).append(record)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
