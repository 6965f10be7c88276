"""A tokenizer whose tokens are bytes: any text, nothing to train or to download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
NO_LIMIT = 1_000_000_000
"""Tokens that a model may read; a smaller number makes harnesses cut texts off"""


def byte_tokenizer(padding_side: str = "left", model_max_length: int = NO_LIMIT) -> PreTrainedTokenizerFast:
    """Ids 0 to 2 for padding, begin and end, 3 to 258 for the bytes 0 to 255; every text comes back as it was.

    Models that were trained on bytes as such, with 256 ids, are not of this vocabulary.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *letters_of_bytes()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side=padding_side,
        model_max_length=model_max_length,
    )


def letters_of_bytes() -> list[str]:
    """The letter by which `ByteLevel` writes each byte: printable Latin-1 as it is, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
