"""Texts that every machine has: the source of Python's own library, and its documentation."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import random
import re
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
HELD_OUT = 20  # of so many documents one is not trained on
SHARES = (0.90, 0.95)  # of a single file: up to here it is trained on, from there to here held out
ENOUGH = 1 << 18
LONGEST_LINE = 200
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}

Parts = dict[str, list[bytes]]
"""Documents by the part they are in, train or valid"""


def library_files(root: Path) -> list[tuple[str, Path]]:
    """Python files below a folder with the part that each is in; order and part depend on their names alone."""
    found = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    order = sorted((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in found)
    return [("valid" if digest[-1] % HELD_OUT == 0 else "train", path) for digest, path in order]


@lru_cache(maxsize=4)
def documents(data: str | None = None) -> Parts:
    """Documents to learn from: files of Python's library (None) or of a folder; a single file is one for each part."""
    if data is not None and Path(data).is_file():
        text = contents(Path(data))
        first, second = (int(len(text) * share) for share in SHARES)
        return {"train": [text[:first]], "valid": [text[first:second]]}
    root = Path(sysconfig.get_paths()["stdlib"] if data is None else data)
    parts: Parts = {"train": [], "valid": []}
    for part, path in library_files(root) if data is None else folder_files(root):
        parts[part].append(contents(path))
    if not all(parts.values()):
        raise ValueError(f"data must be a text file or a folder with at least two, got {root}")
    return parts


def folder_files(root: Path) -> list[tuple[str, Path]]:
    """All files below a folder, every 20th of which is held out, the last one at least."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [
        ("valid" if number % HELD_OUT == 0 or number == 1 else "train", path)
        for number, path in zip(range(len(files), 0, -1), files, strict=True)
    ]


def contents(path: Path) -> bytes:
    """A file's bytes, unpacked if it is packed."""
    opener = OPENERS.get(path.suffix)
    if opener is None:
        return path.read_bytes()
    with opener(path, "rb") as file:
        unpacked: bytes = file.read()
    return unpacked


@lru_cache(maxsize=4)
def haystack(data: str | None = None) -> bytes:
    """One long text: held-out documents, since models that are asked may have been trained on the others.

    All documents, where those are less than ENOUGH bytes. A text of one's own comes `in_lines`.
    """
    parts = documents(data)
    held_out = b"\n".join(parts["valid"])
    text = held_out if len(held_out) >= ENOUGH else b"\n".join([held_out, *parts["train"]])
    return text if data is None else in_lines(text)


def in_lines(text: bytes) -> bytes:
    """Every sentence a line, and longer ones cut, where words end if there are any: things are hidden between lines."""
    lines = re.sub(rb"(?<=[.!?]) ", b"\n", text)
    at_words = re.sub(rb"([^\n]{%d,%d}) " % (LONGEST_LINE // 2, LONGEST_LINE), rb"\1\n", lines)
    return re.sub(rb"([^\n]{%d})(?=[^\n])" % LONGEST_LINE, rb"\1\n", at_words)


@lru_cache(maxsize=1)
def documentation() -> bytes:
    """Python's language reference, which comes with it: prose, in lines."""
    from pydoc_data.topics import topics  # half a megabyte that few ask for

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def piece(text: bytes, length: int, drawn: random.Random) -> bytes:
    """So many bytes of a text, from the beginning of one of its lines on; a text that is too short is repeated."""
    if length <= 0:
        return b""
    while len(text) < 2 * length:
        text = text + b"\n" + text
    start = text.find(b"\n", drawn.randrange(len(text) - length)) + 1
    return text[start : start + length] if start + length <= len(text) else text[:length]
