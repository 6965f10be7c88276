"""The examples run as they are given, with small numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_few_of_two_million_tokens() -> None:
    command = [sys.executable, "examples/two_million_tokens.py", "--tokens", "5000", "--piece", "700"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[::11]] == ["mac", "mag", "mal", "lmm"]
    assert all("5,000 tokens" in line for line in lines[9::11])
    assert all("peak memory 1.0" in line for line in lines[10::11])
