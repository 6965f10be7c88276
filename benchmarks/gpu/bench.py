"""Where measurements run: a device, the sizes of the run, a clock, and the processes of both libraries."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.speed.high_water import high_water
from benchmarks.speed.measure import Effort, Side, Worker, check_side, spread

Record = dict[str, Any]

FULL = Effort(rounds=(3, 9), seconds=3, matmul_size=8192)
QUICK = Effort(rounds=(1, 1), seconds=0, matmul_size=128)

OURS, PEER, SCAN = "ours", "0.5.5", "0.5.5, accelerated scan"


class Unavailable(Exception):
    """Something cannot be measured here, for the reason that is given; its cell stays empty."""


@dataclass(frozen=True)
class Item:
    """One measurement.

    seconds: how long it takes about, on a recent GPU; run: what measures, and says what it found
    """

    group: str
    name: str
    seconds: float
    run: Callable[[Bench], Record]

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


@dataclass
class Bench:
    """A device, and what is alive on it between measurements."""

    device: torch.device
    is_quick: bool
    sides: dict[str, Side]
    missing: dict[str, str] = field(default_factory=dict)  # sides that are not there, and why
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def effort(self) -> Effort:
        return QUICK if self.is_quick else FULL

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def need_cuda(self, what: str) -> None:
        if not self.is_cuda:
            raise Unavailable(f"{what} needs a CUDA device")

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    # ---- in this process

    def timed(self, run: Callable[[], object], warm_ups: int = 2) -> Record:
        """Seconds of one call, warmed up, and how far calls raise the peak of the device's memory."""
        self.clear()
        before = self.peak_bytes(start=True)
        for _ in range(warm_ups):
            run()
        began, seconds = time.perf_counter(), []
        fewest, most = self.effort.rounds
        while len(seconds) < fewest or (len(seconds) < most and time.perf_counter() - began < self.effort.seconds):
            seconds.append(self.seconds_of(run))
        return spread(seconds) | {"peak_bytes": self.peak_bytes() - before}

    def seconds_of(self, run: Callable[[], object]) -> float:
        """One call, on a GPU between two of its own events."""
        if not self.is_cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, start: bool = False) -> int:
        if not self.is_cuda:
            return high_water()
        if start:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def clear(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    # ---- in processes of their own

    def worker(self, name: str) -> Worker:
        """The process of a side, started when it is first asked for, and anew once it is dead."""
        worker = self.workers.get(name)
        if worker is None or worker.process.poll() is not None:
            worker = self.workers[name] = Worker(self.sides[name], self.device.type)
        worker.broken = ""
        return worker

    def close(self) -> None:
        for worker in self.workers.values():
            worker.__exit__()
        self.workers.clear()


def add_peer(bench: Bench, python: str | None) -> Record:
    """The published package as it is and with its scan, as far as they are there.  -> facts of its environment"""
    if python is None:
        bench.missing = dict.fromkeys((PEER, SCAN), "no environment with titans-pytorch 0.5.5 was given (--peer)")
        return {}
    side = Side(python)
    try:
        facts = check_side(side, bench.device.type)
    except SystemExit as error:  # the rest can be measured all the same
        why = error.__cause__ or "it imports another titans_pytorch than one of its own"
        bench.missing = dict.fromkeys((PEER, SCAN), f"the environment of --peer cannot be used: {why}")
        return {}
    bench.sides[PEER] = side
    if not bench.is_cuda:
        bench.missing[SCAN] = "its scan needs a CUDA device"
    elif facts["has_accelerated_scan"]:
        bench.sides[SCAN] = replace(side, extra={"use_accelerated_scan": True})
    else:
        bench.missing[SCAN] = "the package accelerated-scan is not installed beside it"
    return facts
