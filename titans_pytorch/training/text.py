"""What a text is to a model: bytes, or the tokens of a tokenizer, and how they become text again."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from titans_pytorch.training.errors import SettingsError, needed

Ids = NDArray[Any]
"""Token ids, (n), of any whole type"""

Decode = Callable[[int], str]
"""The text that has become clear with one more token; "" while a character is not complete"""


class Text(Protocol):
    """A way to see text as tokens.

    num_tokens: size of the vocabulary; unit: what one token is called
    """

    num_tokens: int
    unit: str

    def encode(self, text: bytes) -> Ids:
        """All tokens of a text."""
        ...

    def decoder(self) -> Decode:
        """Token after token of one stream becomes text."""
        ...

    def pieces(self, ids: Ids) -> list[bytes]:
        """What each token stands for."""
        ...

    def readable(self, ids: Ids) -> str:
        """All of them as text."""
        ...


class ByteText:
    """Every byte is a token."""

    num_tokens, unit = 256, "byte"

    def encode(self, text: bytes) -> Ids:
        """All bytes."""
        return np.frombuffer(text, dtype=np.uint8)

    def decoder(self) -> Decode:
        """Characters, as soon as all of their bytes are there."""
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        return lambda token: decode(bytes([token]))

    def readable(self, ids: Ids) -> str:
        """All of them as text; what is no character is shown as one that says so."""
        return bytes(ids.tolist()).decode("utf-8", errors="replace")

    def pieces(self, ids: Ids) -> list[bytes]:
        """The bytes, one by one."""
        return [bytes([token]) for token in ids.tolist()]


class TokenizedText:
    """The tokens of a file that the package tokenizers has written (tokenizer.json)."""

    unit = "token"

    def __init__(self, path: Path) -> None:
        tokenizers: Any = needed("tokenizers", "--tokenizer")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more special
            raise SettingsError(f"--tokenizer must be a file of the package tokenizers, got {path}: {error}") from None
        self.tokenizer.no_padding()  # what a file says of batches of sentences is not meant for a text
        self.tokenizer.no_truncation()
        self.new_stream = tokenizers.decoders.DecodeStream
        self.num_tokens: int = 1 + max(self.tokenizer.get_vocab().values(), default=-1)  # ids may have gaps

    def encode(self, text: bytes) -> Ids:
        """Tokens of a text, line by line, so that a long one needs little memory."""
        lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
        kind = np.uint16 if self.num_tokens <= 2**16 else np.uint32
        found = self.tokenizer.encode_batch(lines, add_special_tokens=False)
        return np.concatenate([np.array(each.ids, dtype=kind) for each in found] or [np.zeros(0, dtype=kind)])

    def decoder(self) -> Decode:
        """Text, as soon as it is known."""
        stream = self.new_stream(skip_special_tokens=False)
        return lambda token: stream.step(self.tokenizer, token) or ""

    def readable(self, ids: Ids) -> str:
        """All of them as text."""
        found: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return found

    def pieces(self, ids: Ids) -> list[bytes]:
        """What each token adds to the text."""
        decode = self.decoder()
        return [decode(token).encode() for token in ids.tolist()]


def text_of(tokenizer: str | Path | None) -> Text:
    """How a text is seen: through a tokenizer, or as bytes."""
    if tokenizer is None:
        return ByteText()
    if not Path(tokenizer).is_file():
        raise SettingsError(f"--tokenizer must be a file (tokenizer.json), got {tokenizer}, which is not there")
    return TokenizedText(Path(tokenizer))
