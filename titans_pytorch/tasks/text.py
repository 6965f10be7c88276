"""Text as a task: every byte is due, and what it costs is told by where it stands and what came before."""

from __future__ import annotations

import keyword
import random
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from titans_pytorch.tasks.task import Metric, Questions, Task, check_range
from titans_pytorch.tasks.texts import documents

NO_NAME, NEVER = 0, -1
"""What `last_seen` says of a byte of no identifier, and of one whose identifier has not occurred before"""

NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
KEYWORDS = {word.encode() for word in (*keyword.kwlist, *keyword.softkwlist)}


@dataclass(frozen=True)
class TextTask(Task):
    """Pieces of documents, none of which reaches from one document into another; the next byte is always due.

    data: a text file, or a folder of documents; None: the source of Python's own library, a file a document
    part: train, or valid for documents that are never trained on
    shuffled: the control: pieces of `piece` bytes, each of another document, are joined, so that what is further away
        tells nothing but what documents share
    """

    metric: ClassVar[Metric] = "bits per byte"

    tokens: int = 1024
    data: str | None = None
    part: Literal["train", "valid"] = "train"
    shuffled: bool = False
    piece: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("tokens", self.tokens, 1)
        check_range("piece", self.piece, 1)

    @property
    def num_tokens(self) -> int:
        return 256

    def held_out(self) -> TextTask:
        return replace(self, part="valid")

    def draw(self, rows: int, generator: Generator) -> Questions:
        """-> ids (b n), answers (b n): the byte after each"""
        drawn = [random.Random(int(torch.randint(2**62, (), generator=generator))) for _ in range(rows)]
        if self.shuffled:
            count = -(-(self.tokens + 1) // self.piece)
            texts = [b"".join(self.cut(self.piece, each) for _ in range(count)) for each in drawn]
        else:
            texts = [self.cut(self.tokens + 1, each) for each in drawn]
        text = torch.tensor([list(each[: self.tokens + 1]) for each in texts], dtype=torch.long)
        text = text.view(rows, self.tokens + 1)
        return Questions(text[:, :-1], text[:, 1:])

    def cut(self, length: int, drawn: random.Random) -> bytes:
        """So many bytes of one document; all places of all documents are as probable."""
        found = [each for each in documents(self.data)[self.part] if len(each) >= length]
        if not found:
            raise ValueError(f"tokens must leave a document of {self.part} that is as long, got {self.tokens}")
        (document,) = drawn.choices(found, weights=[len(each) - length + 1 for each in found])
        start = drawn.randrange(len(document) - length + 1)
        return document[start : start + length]


def last_seen(questions: Questions) -> Tensor:
    """How far back the identifier that each answer is a byte of began the last time.  -> (b n)

    NEVER where it has not occurred in this context, NO_NAME where the byte is of no identifier, or of a keyword.
    """
    text = torch.cat((questions.ids[:, :1], questions.answers), dim=1).to(torch.uint8).numpy()
    found = np.full(text.shape, NO_NAME, dtype=np.int64)
    for row, line in enumerate(text):
        before: dict[bytes, int] = {}
        for match in NAME.finditer(line.tobytes()):
            name, (begin, end) = match.group(), match.span()
            if name not in KEYWORDS:
                found[row, begin:end] = begin - before[name] if name in before else NEVER
                before[name] = begin
    return torch.from_numpy(found[:, 1:])
