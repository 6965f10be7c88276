"""Runs of the training scripts, each in a process of its own, and what they logged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import CHECKOUT


def train(script: str, folder: Path, *flags: str, may_fail: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Run `script` with `--name value` for each option, and give all records of training and validation."""
    named = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(CHECKOUT / script), "--folder", str(folder.resolve()), *named, *flags]
    ended = subprocess.run(command, check=not may_fail, cwd=CHECKOUT).returncode
    if ended:
        print(f"{script} ended with {ended}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
