"""The tests that need a GPU, before anything is measured on one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from benchmarks.gpu.bench import Bench, Item, Record
from benchmarks.machine import CHECKOUT

MARK = "mark.cuda"
"""What stands in files with such tests; to collect all others would take as long as to run these"""

NUM_PROCESSES = 4
"""Each of which needs some of the device's memory for itself"""

NUM_NAMED = 20
"""Failures that are named; of more there is only the number"""


def run_tests(bench: Bench) -> Record:
    """How many passed, failed and were skipped, and which failed."""
    files = [str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / "tests").glob("*.py") if MARK in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--tb=line", "-p", "no:cacheprovider", *files]
    command += [] if bench.is_quick else in_parallel()
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        try:
            output, _ = tests.communicate()
        finally:
            tests.kill()
    return {"status": tests.returncode} | outcome(output)


def in_parallel() -> list[str]:
    """Options for several processes, where the plug-in for them is there."""
    return ["-n", str(NUM_PROCESSES)] if importlib.util.find_spec("xdist") else []


def outcome(output: str) -> Record:
    """What pytest says at its end."""
    lines = output.strip().splitlines()
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    failed = [line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return {"counts": counts, "failed": failed[:NUM_NAMED]}


ITEMS = [Item("tests", "pytest -m cuda", 90, run_tests)]
