"""Tables of results: one JSON record a line, one line a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def add(path: Path, record: Record) -> None:
    """Append a record; several processes may share one table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def load(path: Path, key: Callable[[Record], tuple[Any, ...]]) -> list[Record]:
    """All records in the order of their keys; of several with one key the one that was added last."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {key(record): record for record in records}
    return [latest[each] for each in sorted(latest)]
