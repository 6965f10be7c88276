"""The comparisons run, and say what they are said to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import text

CHECKOUT = Path(__file__).parent.parent


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ablation(tmp_path: Path) -> None:
    data, out = text(tmp_path / "words.txt"), tmp_path / "out"
    common = ["--preset", "debug", "--steps", "6", "--minutes", "0.02", "--data", str(data), "--out", str(out)]
    run("benchmarks.learning.ablation", *common, "--", "--data-dir", str(tmp_path), "--validate-sequences", "8")
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert [(each["by"], each["memory"]) for each in runs] == [
        (by, memory) for by in ("steps", "minutes") for memory in ("on", "off")
    ]
    assert [each["steps"] for each in runs[:2]] == [6, 6]
    assert all(1.2 < each["seconds"] < 3 for each in runs[2:])
    assert abs(runs[0]["parameters"] / runs[1]["parameters"] - 1) < 0.02
    assert all(len(each["by_position"]) == 16 for each in runs)
    assert (out / "ablation.png").stat().st_size > 10_000
    assert "| equal time | off | 0 |" in (out / "ablation.md").read_text()


@pytest.mark.slow
def test_side_by_side(tmp_path: Path) -> None:
    data, results = text(tmp_path / "words.txt"), tmp_path / "results.json"
    run(
        "benchmarks.learning.side_by_side",
        "--data",
        str(data),
        "--seconds",
        "2",
        "--threads",
        "1",
        "--out",
        str(results),
    )
    run("benchmarks.learning.side_by_side_report", "--results", str(results), "--docs", str(tmp_path))
    record = json.loads(results.read_text())
    assert [each["model"] for each in record["runs"]] == ["ours", "ours without memory"]
    assert all(each["seconds"] >= 2 for each in record["runs"])
    page = (tmp_path / "results.md").read_text()
    assert "| ours without memory | 0 |" in page
    assert str(tmp_path) not in page + results.read_text()
