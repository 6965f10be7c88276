"""What was measured, in a file that is whole after every measurement: a run goes on where a lease ended."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Record
from benchmarks.machine import CHECKOUT, commit, describe_machine
from titans_pytorch.training.files import writing


class Results:
    """The runs in a file; the one of this code on this device is added to."""

    def __init__(self, path: Path, key: Record, about: Record) -> None:
        self.path = path
        self.runs: list[Record] = load(path)
        matching = [run for run in self.runs if run["key"] == key]
        self.run: Record = matching[0] if matching else {"key": key, **about, "items": {}}
        if not matching:
            self.runs.append(self.run)

    @property
    def items(self) -> dict[str, Record]:
        return self.run["items"]

    def add(self, key: str, record: Record) -> None:
        self.items[key] = record
        with writing(self.path) as file:
            file.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")


def load(path: Path) -> list[Record]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def key_of(bench: Bench) -> Record:
    """What results have to have in common to stand in one table."""
    return {
        "device": torch.cuda.get_device_name(bench.device) if bench.is_cuda else "CPU",
        "torch": torch.__version__,
        "commit": version(),
        "is_quick": bench.is_quick,
    }


def about(bench: Bench, peer: Record) -> Record:
    """Settings that a reader has to know of."""
    settings: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if bench.is_cuda else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "rounds": bench.effort.rounds,
        "peer": peer,
    }
    return {"machine": describe_machine(), "settings": settings}


def version() -> str:
    """The commit; with the name of the sources, if they differ from it or it is not known."""
    name = commit() or ""
    return name if name and not name.endswith("+") else f"{name} {sources()}".strip()


def sources() -> str:
    """A name of the code, by what is in it."""
    digest = hashlib.sha256()
    for folder in ("titans_pytorch", "benchmarks"):
        for file in sorted((CHECKOUT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return f"sources {digest.hexdigest()[:12]}"
