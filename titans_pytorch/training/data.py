"""Text: where it comes from, how it is split, and which of it each step sees."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_pytorch.tasks.texts import OPENERS, library_files
from titans_pytorch.training import download
from titans_pytorch.training.documents import StoredPart, has_documents, split_documents, stored
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import COPY_BYTES, writing
from titans_pytorch.training.text import ByteText, Ids, Text

Bytes = NDArray[np.uint8]
Starts = NDArray[np.int64]
"""The first token of each document, (documents)"""

TRAIN, VALID = 0.90, 0.05  # shares of a file, in this order; the rest is for tests
PYTHON = "python"


@dataclass(frozen=True)
class Corpus:
    """Two stretches of tokens; bytes are mapped into memory: however many processes read them, they are there once."""

    about: str
    train: Ids
    valid: Ids
    train_bytes_per_token: float = 1.0
    valid_bytes_per_token: float = 1.0
    train_starts: Starts | None = None  # where documents begin; None: all is one
    valid_starts: Starts | None = None

    def check(self, sequence: int, unit: str = "byte", carry: int = 1) -> None:
        """Refuse a text that has not one sequence, or, where states are carried, no document as long as all of them."""
        for name, part, starts in (
            ("training", self.train, self.train_starts),
            ("validation", self.valid, self.valid_starts),
        ):
            if len(part) < sequence + 1:
                raise SettingsError(
                    f"--data must have more than --sequence {sequence} {unit}s of {name} text, got {len(part)} "
                    f"from {self.about}"
                )
            longest = len(part) if starts is None else int(np.diff(np.append(starts, len(part))).max())
            if carry > 1 and longest < carry * sequence + 1:
                raise SettingsError(
                    f"--data must have a document of {name} text with more than --carry {carry} times --sequence "
                    f"{sequence} {unit}s, got at most {longest} from {self.about}"
                )


def tokenized(corpus: Corpus, text: Text) -> Corpus:
    """Turn a text into the tokens of a tokenizer."""
    if isinstance(text, ByteText):
        return corpus
    train, train_starts = encoded(corpus.train, corpus.train_starts, text)
    valid, valid_starts = encoded(corpus.valid, corpus.valid_starts, text)
    shares = len(corpus.train) / max(len(train), 1), len(corpus.valid) / max(len(valid), 1)
    return Corpus(f"{corpus.about}, {shares[0]:.2f} bytes a token", train, valid, *shares, train_starts, valid_starts)


def encoded(part: Ids, starts: Starts | None, text: Text) -> tuple[Ids, Starts | None]:
    """Documents as tokens, and where each of them begins then."""
    if starts is None:
        return text.encode(bytes(part)), None
    found = [text.encode(bytes(document)) for document in np.split(part, starts[1:])]
    return np.concatenate(found), starts_of(found)


def starts_of(documents: Sequence[Sized]) -> Starts:
    """Where each of some documents begins, one after the other."""
    return np.cumsum([0, *map(len, documents)], dtype=np.int64)[:-1]


def batch(text: Ids, *, seed: int, step: int, index: int, size: int, length: int) -> Tensor:
    """Random sequences that depend on these numbers only.  -> (size length)

    index: of the micro-batch among all of the step, whichever process takes it
    """
    starts = np.random.default_rng([seed, step, index]).integers(0, len(text) - length + 1, size=size)
    return rows(text, starts, length)


def evenly(text: Ids, count: int, length: int) -> NDArray[np.int64]:
    """Starts of `count` sequences, spread over a text: what is validated on."""
    return np.linspace(0, len(text) - length, count).astype(np.int64)


def rows(text: Ids, starts: NDArray[np.int64], length: int) -> Tensor:
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))


def choose_data(data: str | None, folder: Path) -> tuple[str, str]:
    """What to train on, and what is to be said of that if nobody named it: enwik8 unless it cannot be had."""
    if data is not None:
        return data, ""
    try:
        download.enwik8(folder)
    except download.Unreachable as error:
        return PYTHON, f", as enwik8 cannot be fetched ({error.why}); --data FILE trains on something else"
    return "enwik8", "; --data FILE trains on something else"


def corpus(data: str, folder: Path) -> Corpus:
    """What --data names."""
    if data == PYTHON:
        return standard_library(folder)
    if data == "enwik8":
        return split(download.enwik8(folder), "enwik8")
    path = existing(Path(data))
    if has_documents(path):
        name = path.name.partition(".")[0]
        return of_documents(path.name, "document", stored(made_of(path, folder, name), partial(split_documents, path)))
    return split(plain(path, folder), path.name)


def split(path: Path, about: str) -> Corpus:
    text = mapped(path)
    first, second = int(len(text) * TRAIN), int(len(text) * (TRAIN + VALID))
    return Corpus(f"{about} ({len(text):,} bytes)", text[:first], text[first:second])


def mapped(path: Path) -> Bytes:
    if path.stat().st_size == 0:
        raise SettingsError(f"--data must be a file with text, got {path}, which is empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


def existing(path: Path) -> Path:
    """A file that is there."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing"
        raise SettingsError(f"--data must be enwik8, {PYTHON} or a file, got {got} at {path}")
    return path


def made_of(path: Path, folder: Path, name: str) -> Path:
    """Where what is made of a file is kept, until the file changes."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return folder / "unpacked" / f"{name}-{key}"


def plain(path: Path, folder: Path) -> Path:
    """The file itself, or what a packed one unpacks to, which is kept."""
    if path.suffix not in OPENERS:
        return path
    unpacked = made_of(path, folder, path.stem)
    if not unpacked.exists():
        with writing(unpacked) as temporary:
            unpack(path, temporary)
    return unpacked


def unpack(path: Path, to: Path) -> None:
    try:
        with OPENERS[path.suffix](path, "rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise SettingsError(f"--data must be a whole {path.suffix} file, got {path}: {error}") from None


def standard_library(folder: Path) -> Corpus:
    """The source text of Python's own library, which every machine has, split by file."""
    name = f"python-{'.'.join(map(str, sys.version_info[:3]))}"
    sources = partial(library_sources, Path(sysconfig.get_paths()["stdlib"]))
    parts = stored(folder / "standard-library" / name, sources)
    return of_documents("Python's own source text", "file", parts)


def of_documents(about: str, unit: str, parts: tuple[StoredPart, StoredPart]) -> Corpus:
    """A text in documents, which are of one part or the other."""
    train, valid = (mapped(part.text) for part in parts)
    begin = [np.load(part.starts) for part in parts]
    about = f"{about} ({len(train) + len(valid):,} bytes, split by {unit})"
    return Corpus(about, train, valid, train_starts=begin[0], valid_starts=begin[1])


def library_sources(root: Path) -> list[tuple[str, bytes]]:
    """Parts and contents of all files, in an order and a split that depend only on their names."""
    sources = [(part, path.read_bytes()) for part, path in library_files(root)]
    if {part for part, _ in sources} != {"train", "valid"}:
        raise SettingsError(f"--data must name a file: Python's own source text is not at {root}")
    return sources
