"""Texts of different lengths as one batch for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_pytorch.causal_lm import IGNORED


class PaddingCollator:
    """Pads rows on the tokenizer's side; every token has to be predicted but the first of each row.

        Trainer(model, arguments, data_collator=PaddingCollator(tokenizer), train_dataset=rows)

    `DataCollatorForLanguageModeling` of transformers does the same for padding on the right. On the left it counts the
    first token of a row among those to be predicted, which changes what a mean over a batch is; and where padding is
    done with the token that ends a text, it never asks for an end.

    Args:
        tokenizer: with a token for padding
        pad_to_multiple_of: rows get a multiple of so many columns
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        self.tokenizer, self.pad_to_multiple_of = tokenizer, pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """rows: input_ids (n) each -> input_ids, attention_mask and labels (b longest)"""
        ids = [{"input_ids": row["input_ids"]} for row in rows]
        batch = self.tokenizer.pad(
            ids,
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = batch["attention_mask"].bool()
        is_predicted = mask & (mask.cumsum(dim=1) > 1)
        labels = batch["input_ids"].masked_fill(~is_predicted, IGNORED)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
