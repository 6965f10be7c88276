"""Files of documents, JSON Lines and Parquet, and how documents become a text that is mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titans_pytorch.tasks.texts import HELD_OUT, OPENERS
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import writing

FIELD = "text"
"""Where a line or a row has its document"""

Part = tuple[str, bytes]
"""train or valid, and a document of it"""


class StoredPart(NamedTuple):
    """One part of a text: its bytes, and where its documents begin."""

    text: Path
    starts: Path


def has_documents(path: Path) -> bool:
    """Whether a file is one of documents, by its name."""
    return kind(path) in READERS


def kind(path: Path) -> str:
    """.jsonl, .parquet or what else a name ends with, but for how it is packed."""
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def stored(stem: Path, documents: Callable[[], Iterable[Part]]) -> tuple[StoredPart, StoredPart]:
    """The parts of a text, written where they are not there yet.  -> train, valid"""
    parts = {
        part: StoredPart(stem.with_name(f"{stem.name}-{part}.txt"), stem.with_name(f"{stem.name}-{part}.starts.npy"))
        for part in ("train", "valid")
    }
    train, valid = parts.values()
    if not all(path.exists() for path in (*train, *valid)):
        lengths: dict[str, list[int]] = {part: [0] for part in parts}
        with writing(train.text) as first, writing(valid.text) as second:
            with first.open("wb") as of_train, second.open("wb") as of_valid:
                files = dict(train=of_train, valid=of_valid)
                for part, document in documents():
                    files[part].write(document)
                    lengths[part].append(len(document))
            for part, found in lengths.items():
                with writing(parts[part].starts) as temporary, temporary.open("wb") as file:
                    np.save(file, np.cumsum(found, dtype=np.int64)[:-1])
    return train, valid


def split_documents(path: Path) -> Iterator[Part]:
    """The documents of a file that are not empty, one after the other; one in 20 is held out, the second one first."""
    number = 0
    for document in READERS[kind(path)](path):
        if document:
            yield "valid" if number % HELD_OUT == 1 else "train", document.encode()
            number += 1
    if number < 2:
        raise SettingsError(f"--data must have at least two documents, got {number} in {path}")


def lines(path: Path) -> Iterator[str]:
    """Documents of a JSON Lines file."""
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise SettingsError(
                    f"--data must have JSON in every line, got {path}, line {number}: {error}"
                ) from None
            yield text_of(found, path, f"line {number}")


def rows(path: Path) -> Iterator[str]:
    """Documents of a Parquet file."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise SettingsError(
            "--data with a .parquet file needs the package pyarrow, which is not installed: pip install pyarrow"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise SettingsError(f"--data must be a whole .parquet file, got {path}: {error}") from None
    if FIELD not in file.schema_arrow.names:
        known = ", ".join(file.schema_arrow.names)
        raise SettingsError(f"--data must have its documents in the column {FIELD}, got {path} with {known}")
    batches = (batch.to_pylist() for batch in file.iter_batches(columns=[FIELD]))
    for number, row in enumerate(chain.from_iterable(batches), start=1):
        yield text_of(row, path, f"row {number}")


def text_of(found: Any, path: Path, where: str) -> str:
    """The document of a line or a row."""
    text = found.get(FIELD) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise SettingsError(f"--data must have a text in the field {FIELD} everywhere, got {path}, {where}, without")
    return text


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".jsonl": lines, ".parquet": rows}
"""Documents of a file, by the end of its name"""
