"""Starts the workers of both sides and takes turns between them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from typing_extensions import Self

from benchmarks.machine import CHECKOUT
from benchmarks.speed.workloads import Case

WORKER = Path(__file__).with_name("worker.py")

Answer = dict[str, Any]


class WorkerError(RuntimeError):
    """A request failed on one side; the other one goes on."""


@dataclass(frozen=True)
class Side:
    """A library in some environment, or that of a checkout; `extra` are arguments of NeuralMemory of this side only."""

    python: str
    checkout: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """A measurement takes `rounds` = (fewest, most) turns and stops between them once `seconds` are spent."""

    rounds: tuple[int, int]
    seconds: float
    matmul_size: int


class Process:
    """A script of one side that answers every line with one of JSON."""

    def __init__(self, side: Side, script: Path, *arguments: str) -> None:
        command = [side.python, "-I", str(script), *arguments]
        command += ["--checkout", str(side.checkout)] if side.checkout else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self, line: str = "") -> Answer:
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(f"{line}\n")
            requests.flush()
            told = answers.readline()
        except BrokenPipeError:
            told = ""
        if not told:
            raise WorkerError(f"process ended with status {self.process.wait()} (-9: killed, as when memory runs out)")
        answer: Answer = json.loads(told)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


class Worker(Process):
    """One side's process.  Requests are method names of worker.Session with their arguments."""

    def __init__(self, side: Side, device: str) -> None:
        super().__init__(side, WORKER, "--device", device)
        self.side = side
        self.broken = ""  # why the module could not be built, the answer to everything after

    def ask(self, do: str, **arguments: Any) -> Answer:
        if self.broken:
            raise WorkerError(self.broken)
        return self.answer(json.dumps({"do": do, **arguments}))

    def build(self, case: Case, dtype: str) -> None:
        memory = case.memory | self.side.extra
        try:
            self.ask("build", memory=memory, batch=case.batch, tokens=case.tokens, dtype=dtype)
        except WorkerError as error:
            self.broken = str(error)


def check_side(side: Side, device: str) -> Answer:
    """What the environment is made of, once it is sure that it imports the library it should."""
    with Worker(side, device) as worker:
        try:
            facts = worker.ask("hello")
        except WorkerError as error:
            raise SystemExit(f"{side.python} cannot run titans_pytorch on {device}: {error}") from error
    file = Path(facts.pop("file")).resolve()
    if not file.is_relative_to(side.checkout) if side.checkout else file.is_relative_to(CHECKOUT):
        wanted = f"that of {side.checkout}" if side.checkout else "one of its own"
        raise SystemExit(f"{side.python} imports titans_pytorch from {file}, but must import {wanted}")
    return facts


def alternate(turns: Mapping[str, Callable[[], Answer]], effort: Effort) -> dict[str, Answer]:
    """One warm-up, then `rounds` turns each.  The answers hold the last turn's facts and the spread of seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    answers: dict[str, Answer] = {name: {} for name in turns}
    start = time.perf_counter()
    fewest, most = effort.rounds
    for turn in range(1 + most):
        for name, take in turns.items():
            if "error" in answers[name]:
                continue
            try:
                answers[name] = take()
            except WorkerError as error:
                answers[name] = {"error": str(error)}
            else:
                seconds[name] += [answers[name]["seconds"]] if turn else []
        if turn >= fewest and time.perf_counter() - start > effort.seconds:
            break
    return {name: answer if "error" in answer else answer | spread(seconds[name]) for name, answer in answers.items()}


def spread(seconds: list[float]) -> Answer:
    return {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds), "rounds": len(seconds)}


def peak(side: Side, case: Case, *, device: str, dtype: str, mode: str) -> Answer:
    """Peak memory of one call, in a process that did nothing before but build the module and its input."""
    with Worker(side, device) as worker:
        worker.build(case, dtype)
        try:
            return {"peak_bytes": worker.ask("peak", mode=mode)["peak_bytes"]}
        except WorkerError as error:
            return {"peak_error": str(error)}
