"""Where and when a run took place, without naming any path."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = CHECKOUT / "benchmarks" / "results", CHECKOUT / "docs"


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def place(record: dict[str, Any]) -> str:
    """Where a record was measured, in a few words."""
    machine = record["machine"]
    return f"{machine['cpu']}, {machine['date']}, commit {machine['commit']}"


def cpu_model() -> str:
    """Its name, and what torch computes with on it: two of one name can differ by half."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str | None:
    """The checked-out commit, with a + if the library or the benchmarks differ from it; None outside a repository."""
    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", "titans_pytorch", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" if changes else name


def git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
