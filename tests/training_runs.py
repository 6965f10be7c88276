"""What the tests of training share: small texts, short runs, what of a run has to be equal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import train_implicit_mlp_attn
import train_mac
from titans_pytorch.training import start
from titans_pytorch.training.models import AttentionModel, MACModel

SMALL = ["--preset", "debug", "--sample-length", "8", "--device", "cpu", "--no-pictures"]
TIMES = {"seconds", "tokens_per_second"}


def text(path: Path, size: int = 20_000) -> Path:
    """Words that can be learned a little."""
    words = ["memory ", "learns ", "at ", "test ", "time.\n", "and ", "forgets "]
    drawn = random.Random(0).choices(words, k=size // 4)
    path.write_bytes("".join(drawn).encode()[:size])
    return path


def train(folder: Path, data: Path, *options: str) -> int:
    """train_mac.py in this process; the exit code."""
    where = ["--data", str(data), "--data-dir", str(data.parent / "data"), "--folder", str(folder)]
    AcceleratorState._reset_state(reset_partial_state=True)  # which a process otherwise keeps, precision included
    return start("mac", MACModel, train_mac.PRESETS, [*SMALL, *where, *options])


def train_attention(folder: Path, data: Path, *options: str) -> int:
    where = ["--data", str(data), "--data-dir", str(data.parent / "data"), "--folder", str(folder)]
    AcceleratorState._reset_state(reset_partial_state=True)
    return start("implicit-mlp-attn", AttentionModel, train_implicit_mlp_attn.PRESETS, [*SMALL, *where, *options])


def logged(folder: Path) -> list[dict[str, Any]]:
    """All metrics but what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def weights(folder: Path) -> dict[str, Any]:
    from titans_pytorch.training.checkpoints import last

    found = last(folder / "checkpoints")
    assert found is not None
    return found.model() | {f"optimizer:{name}": value for name, value in found.optimizer().items()}


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command has printed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
