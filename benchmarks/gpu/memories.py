"""NeuralMemory beside the published package, which runs as it is and with its accelerated scan."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from benchmarks.gpu.bench import OURS, PEER, Bench, Item, Record
from benchmarks.speed.before_after import RENEWAL
from benchmarks.speed.measure import WorkerError, alternate
from benchmarks.speed.memory import prepare
from benchmarks.speed.workloads import WIDE, Case

CASES = (
    Case("dim 384, chunk 64, 2 × 1,024 tokens", WIDE, batch=2),
    Case("dim 384, chunk 64, 2 × 8,192 tokens", WIDE, batch=2, tokens=8192),
    Case("dim 384, chunk 16, 2 × 1,024 tokens", WIDE | {"chunk_size": 16}, batch=2),
    Case("16 rows, d 32, h 128, chunk 8, renewed every 16, 1,024 tokens", RENEWAL.memory, batch=RENEWAL.batch),
    Case("8 rows, d 64, h 256, chunk 16, 1,024 tokens", dict(dim=256, dim_head=64, heads=4, chunk_size=16), batch=2),
)


def measure(case: Case, bench: Bench) -> Record:
    """Both modes of all sides, which take turns.  -> mode -> side -> seconds and bytes, or what went wrong"""
    sized = case.quick() if bench.is_quick else case
    workers = {name: bench.worker(name) for name in bench.sides}
    pair = {OURS: workers[OURS]} | ({"peer": workers[PEER]} if PEER in workers else {})
    found: Record = prepare(pair, sized, "float32")
    for name in set(workers) - {OURS, PEER}:
        workers[name].build(sized, "float32")
    for mode in sized.modes:
        turns = {name: partial(worker.ask, "time", mode=mode) for name, worker in workers.items()}
        found[mode] = alternate(turns, bench.effort)
        for name, worker in workers.items():
            try:
                found[mode][name] |= {"peak_bytes": worker.ask("peak", mode=mode)["peak_bytes"]}
            except WorkerError as error:
                found[mode][name] |= {"peak_error": str(error)}
    for worker in workers.values():
        with suppress(WorkerError):  # one that is dead holds nothing
            worker.ask("forget")
    return found | {"tokens": sized.batch * sized.tokens, "missing": bench.missing}


ITEMS = [Item("memory", case.name, 15, partial(measure, case)) for case in CASES]
